//! From the residual stream to token probabilities.

use awqua::Result;
use awqua::checkpoint::Checkpoint;
use awqua::quant::{self, LinearWeight, Quantization};

use super::Decoder;
use super::backward::norm_back;
use super::forward::rms_norm;
use crate::math::{View, gemm, vectorized};

/// Vocabulary entries widened at a time.
const PANEL: usize = 4096;

/// Rows of logits held at a time.
const ROWS: usize = 128;

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
        self.panels(decoder, |first, panel| {
            let (x, w) = (View::new(&normed, hidden), View::new(panel, hidden).t());
            gemm(decoder.threads, 1.0, x, w, 0.0, &mut out[first..], vocab);
        });
        out
    }

    /// Sum over rows of KL(teacher || student), and its gradient by the rows `x` (rows, hidden) of the student's
    /// residual stream; `teacher` is the teacher's.
    pub(crate) fn divergence(&self, decoder: &Decoder, teacher: &[f32], x: &[f32]) -> (f64, Vec<f32>) {
        let (vocab, hidden) = self.table.weight.dims();
        let (mut sum, mut d_x) = (0.0, vec![0.0; x.len()]);
        for ((teacher, x), d_x) in
            teacher.chunks(ROWS * hidden).zip(x.chunks(ROWS * hidden)).zip(d_x.chunks_mut(ROWS * hidden))
        {
            let p = self.logits(decoder, teacher);
            let mut q = self.logits(decoder, x);
            let rows = x.len() / hidden;
            let losses = {
                let mut losses = vec![0.0; rows];
                let mut pairs: Vec<(&mut f64, &mut [f32])> = losses.iter_mut().zip(q.chunks_exact_mut(vocab)).collect();
                decoder.threads.rows(&mut pairs, 1, |first, pairs| {
                    for (i, (loss, q)) in pairs.iter_mut().enumerate() {
                        **loss = vectorized(|| softmax_difference(&p[(first + i) * vocab..][..vocab], q));
                    }
                });
                losses
            };
            sum += losses.iter().sum::<f64>();
            drop(p);
            let mut d_normed = vec![0.0; x.len()];
            self.panels(decoder, |first, panel| {
                let n = panel.len() / hidden;
                let d = View::strided(&q[first..(rows - 1) * vocab + first + n], n, vocab);
                gemm(decoder.threads, 1.0, d, View::new(panel, hidden), 1.0, &mut d_normed, hidden);
            });
            norm_back(x, &self.norm, self.eps, &d_normed, &mut vec![0.0; hidden], d_x);
        }
        (sum, d_x)
    }

    /// Sums over rows of KL(teacher || candidate) for several candidates' residual streams, (rows, hidden) each.
    pub(crate) fn divergences(&self, decoder: &Decoder, teacher: &[f32], candidates: &[Vec<f32>]) -> Vec<f64> {
        let (vocab, hidden) = self.table.weight.dims();
        let mut sums = vec![0.0; candidates.len()];
        for first in (0..teacher.len()).step_by(ROWS * hidden) {
            let end = teacher.len().min(first + ROWS * hidden);
            let p = self.logits(decoder, &teacher[first..end]);
            for (sum, candidate) in sums.iter_mut().zip(candidates) {
                let mut q = self.logits(decoder, &candidate[first..end]);
                let mut pairs: Vec<(f64, &mut [f32])> = q.chunks_exact_mut(vocab).map(|q| (0.0, q)).collect();
                decoder.threads.rows(&mut pairs, 1, |row, pairs| {
                    for (i, (loss, q)) in pairs.iter_mut().enumerate() {
                        *loss = vectorized(|| softmax_difference(&p[(row + i) * vocab..][..vocab], q));
                    }
                });
                *sum += pairs.iter().map(|(loss, _)| loss).sum::<f64>();
            }
        }
        sums
    }

    /// Calls `work(first entry, rows of the table)` on runs of vocabulary entries.
    fn panels(&self, decoder: &Decoder, mut work: impl FnMut(usize, &[f32])) {
        let (vocab, hidden) = self.table.weight.dims();
        let mut panel = vec![0.0; PANEL.min(vocab) * hidden];
        for first in (0..vocab).step_by(PANEL) {
            let panel = &mut panel[..PANEL.min(vocab - first) * hidden];
            decoder.threads.rows(panel, hidden, |row, rows| {
                for (i, out) in rows.chunks_exact_mut(hidden).enumerate() {
                    self.table.expand_row(first + row + i, out);
                }
            });
            work(first, panel);
        }
    }
}

/// Turns the student's logits `q` into its probabilities less the teacher's, whose logits are `p`, and returns
/// KL(teacher || student).
fn softmax_difference(p: &[f32], q: &mut [f32]) -> f64 {
    let max = |logits: &[f32]| logits.iter().fold(f32::NEG_INFINITY, |m, &l| m.max(l));
    let (p_max, q_max) = (max(p), max(q));
    let (mut p_sum, mut q_sum, mut cross) = (0.0f64, 0.0f64, 0.0f64);
    for (p, q) in p.chunks(256).zip(q.chunks(256)) {
        let (mut p_part, mut q_part, mut cross_part) = (0.0f32, 0.0f32, 0.0f32);
        for (&p, &q) in p.iter().zip(q) {
            let e = (p - p_max).exp();
            p_part += e;
            q_part += (q - q_max).exp();
            cross_part += e * ((p - p_max) - (q - q_max));
        }
        p_sum += f64::from(p_part);
        q_sum += f64::from(q_part);
        cross += f64::from(cross_part);
    }
    let (p_scale, q_scale) = (1.0 / p_sum as f32, 1.0 / q_sum as f32);
    for (&p, q) in p.iter().zip(q) {
        *q = (*q - q_max).exp() * q_scale - (p - p_max).exp() * p_scale;
    }
    cross / p_sum - p_sum.ln() + q_sum.ln()
}

#[cfg(test)]
mod tests {
    use super::super::tiny;
    use super::*;
    use crate::random::Random;
    use awqua::tensor::{Bytes, DenseMatrix, DenseType, Weight};

    #[test]
    fn the_gradient_of_the_divergence_is_its_slope() {
        let (decoder, _) = tiny(1, false);
        let mut random = Random::new(2);
        let bytes: Vec<u8> = random.normals(32 * 64).iter().flat_map(|v| v.to_le_bytes()).collect();
        let table = DenseMatrix::new(32, 64, DenseType::F32, Bytes::owned(bytes)).unwrap();
        let table = Weight::Dense(table).into();
        let head = Head { norm: random.normals(64), eps: 1e-6, table };
        let (teacher, x, direction) = (random.normals(3 * 64), random.normals(3 * 64), random.normals(3 * 64));
        let (loss, gradient) = head.divergence(&decoder, &teacher, &x);
        assert!(loss > 0.0 && head.divergence(&decoder, &x, &x).0.abs() < 1e-4);
        let at = |step: f32| {
            let moved: Vec<f32> = x.iter().zip(&direction).map(|(x, d)| x + step * d).collect();
            head.divergence(&decoder, &teacher, &moved).0
        };
        let measured = (at(1e-3) - at(-1e-3)) / 2e-3;
        let slope: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
        assert!((slope - measured).abs() < 0.01 * measured.abs().max(1.0), "{slope} against {measured}");
    }
}
