//! From the residual stream to token probabilities.

use awqua::Result;
use awqua::checkpoint::Checkpoint;
use awqua::quant::{self, LinearWeight, Quantization};

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
    table: LinearWeight,
}

impl Head {
    /// Reads the head of a checkpoint; a dense matrix stays mapped.
    ///
    /// # Errors
    /// As [`quant::load_linear`].
    pub fn load(decoder: &Decoder, checkpoint: &Checkpoint, quantization: Option<&Quantization>) -> Result<Self> {
        let c = &decoder.config;
        let (vocab, hidden) = (c.vocab_size, c.hidden_size);
        let table = if c.tie_word_embeddings {
            quant::load_table(checkpoint, quantization, "model.embed_tokens", vocab, hidden)?.into()
        } else {
            quant::load_linear(checkpoint, quantization, "lm_head", vocab, hidden)?
        };
        Ok(Self { norm: checkpoint.vector("model.norm.weight", c.hidden_size)?, eps: c.rms_norm_eps, table })
    }

    /// The logits (rows, vocab_size) of rows of the residual stream.
    pub fn logits(&self, decoder: &Decoder, x: &[f32]) -> Vec<f32> {
        let (vocab, hidden) = self.table.weight.dims();
        let normed = rms_norm(x, &self.norm, self.eps);
        let mut out = vec![0.0; x.len() / hidden * vocab];
        let mut panel = vec![0.0; PANEL.min(vocab) * hidden];
        for first in (0..vocab).step_by(PANEL) {
            let n = PANEL.min(vocab - first);
            let panel = &mut panel[..n * hidden];
            decoder.threads.rows(panel, hidden, |row, rows| {
                for (i, out) in rows.chunks_exact_mut(hidden).enumerate() {
                    self.table.expand_row(first + row + i, out);
                }
            });
            let (x, w) = (View::new(&normed, hidden), View::new(panel, hidden).t());
            gemm(decoder.threads, 1.0, x, w, 0.0, &mut out[first..], vocab);
        }
        out
    }
}
