//! From the residual stream to token probabilities.

use awqua::Result;
use awqua::checkpoint::Checkpoint;
use awqua::quant::{self, Quantization};
use awqua::tensor::{DenseMatrix, Weight};
use awqua::{Error, ErrorKind};

use super::Decoder;
use super::forward::rms_norm;
use crate::math::{View, gemm};

/// Vocabulary entries widened at a time.
const PANEL: usize = 4096;

/// Final norm and output head.
#[derive(Debug)]
pub struct Head {
    norm: Vec<f32>,
    eps: f32,
    table: DenseMatrix,
}

impl Head {
    /// Reads the head of a checkpoint; the matrix stays mapped.
    ///
    /// # Errors
    /// As [`quant::load_linear`]; [`ErrorKind::Unsupported`] for a packed head.
    pub fn load(decoder: &Decoder, checkpoint: &Checkpoint, quantization: Option<&Quantization>) -> Result<Self> {
        let c = &decoder.config;
        let table = if c.tie_word_embeddings {
            checkpoint.dense_matrix("model.embed_tokens.weight", c.vocab_size, c.hidden_size)?
        } else {
            match quant::load_linear(checkpoint, quantization, "lm_head", c.vocab_size, c.hidden_size)? {
                Weight::Dense(table) => table,
                _ => {
                    let error = Error::new(ErrorKind::Unsupported, "packed output heads are not evaluated");
                    return Err(error.in_file(checkpoint.dir()).in_tensor("lm_head"));
                }
            }
        };
        Ok(Self { norm: checkpoint.vector("model.norm.weight", c.hidden_size)?, eps: c.rms_norm_eps, table })
    }

    /// The logits (rows, vocab_size) of rows of the residual stream.
    pub fn logits(&self, decoder: &Decoder, x: &[f32]) -> Vec<f32> {
        let (vocab, hidden) = (self.table.n, self.table.k);
        let normed = rms_norm(x, &self.norm, self.eps);
        let mut out = vec![0.0; x.len() / hidden * vocab];
        let mut panel = vec![0.0; PANEL.min(vocab) * hidden];
        for first in (0..vocab).step_by(PANEL) {
            let n = PANEL.min(vocab - first);
            let panel = &mut panel[..n * hidden];
            decoder.threads.rows(panel, hidden, |row, rows| {
                self.table.dtype.widen(&self.table.bytes[(first + row) * self.table.row_bytes()..], rows);
            });
            let (x, w) = (View::new(&normed, hidden), View::new(panel, hidden).t());
            gemm(decoder.threads, 1.0, x, w, 0.0, &mut out[first..], vocab);
        }
        out
    }
}
