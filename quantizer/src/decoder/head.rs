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
            self.back(decoder, x, &q, d_x);
        }
        (sum, d_x)
    }

    /// Draws a token for every row of the residual stream `x` (rows, hidden) from the model's own probabilities, and
    /// returns the gradient of sum(-log p(token)) by `x`. `draws` are uniform from 0 to 1, one a row.
    pub(crate) fn surprise(&self, decoder: &Decoder, x: &[f32], draws: &[f64]) -> Vec<f32> {
        let (vocab, hidden) = self.table.weight.dims();
        let mut d_x = vec![0.0; x.len()];
        let parts = x.chunks(ROWS * hidden).zip(draws.chunks(ROWS)).zip(d_x.chunks_mut(ROWS * hidden));
        for ((x, draws), d_x) in parts {
            let mut logits = self.logits(decoder, x);
            decoder.threads.rows(&mut logits, vocab, |first, rows| {
                for (row, &draw) in rows.chunks_exact_mut(vocab).zip(&draws[first..]) {
                    vectorized(|| softmax_less_drawn(row, draw));
                }
            });
            self.back(decoder, x, &logits, d_x);
        }
        d_x
    }

    /// Adds to `d_x` the gradient by rows of the residual stream `x` from that by their logits.
    fn back(&self, decoder: &Decoder, x: &[f32], d_logits: &[f32], d_x: &mut [f32]) {
        let (vocab, hidden) = self.table.weight.dims();
        let rows = x.len() / hidden;
        let mut d_normed = vec![0.0; x.len()];
        self.panels(decoder, |first, panel| {
            let n = panel.len() / hidden;
            let d = View::strided(&d_logits[first..(rows - 1) * vocab + first + n], n, vocab);
            gemm(decoder.threads, 1.0, d, View::new(panel, hidden), 1.0, &mut d_normed, hidden);
        });
        norm_back(x, &self.norm, self.eps, &d_normed, &mut vec![0.0; hidden], d_x);
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

/// Turns logits into probabilities and takes 1 from that of the token which `draw`, from 0 to 1, falls on when the
/// probabilities stand in a row.
fn softmax_less_drawn(logits: &mut [f32], draw: f64) {
    const PART: usize = 256;
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, &l| m.max(l));
    let sums: Vec<f64> = logits
        .chunks_mut(PART)
        .map(|part| {
            part.iter_mut().for_each(|l| *l = (*l - max).exp());
            f64::from(part.iter().sum::<f32>())
        })
        .collect();
    let sum = sums.iter().sum::<f64>();
    let mut left = draw * sum;
    // Where rounding leaves something at the end, the last token that can be drawn is.
    let part = sums.iter().position(|&sum| {
        left < sum || {
            left -= sum;
            false
        }
    });
    let part = part.unwrap_or_else(|| sums.iter().rposition(|&sum| sum > 0.0).unwrap_or(0));
    let entries = &logits[part * PART..][..PART.min(logits.len() - part * PART)];
    let drawn = entries.iter().position(|&e| {
        left < f64::from(e) || {
            left -= f64::from(e);
            false
        }
    });
    let drawn = part * PART + drawn.unwrap_or_else(|| entries.iter().rposition(|&e| e > 0.0).unwrap_or(0));
    let scale = (1.0 / sum) as f32;
    logits.iter_mut().for_each(|e| *e *= scale);
    logits[drawn] -= 1.0;
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

    /// A head of 32 tokens for [`tiny`]'s 64 features.
    fn small(random: &mut Random) -> Head {
        let bytes: Vec<u8> = random.normals(32 * 64).iter().flat_map(|v| v.to_le_bytes()).collect();
        let table = DenseMatrix::new(32, 64, DenseType::F32, Bytes::owned(bytes)).unwrap();
        Head { norm: random.normals(64), eps: 1e-6, table: Weight::Dense(table).into() }
    }

    #[test]
    fn the_gradient_of_the_divergence_is_its_slope() {
        let (decoder, _) = tiny(1, false);
        let mut random = Random::new(2);
        let head = small(&mut random);
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

    #[test]
    fn tokens_are_drawn_as_often_as_they_are_likely() {
        // More than one part of the sum, and the last one not whole.
        let logits: Vec<f32> = Random::new(4).normals(600).iter().map(|v| 3.0 * v).collect();
        let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        const DRAWS: usize = 20_000;
        let mut counts = vec![0.0; logits.len()];
        for i in 0..DRAWS {
            let mut row = logits.clone();
            softmax_less_drawn(&mut row, (i as f64 + 0.5) / DRAWS as f64);
            let drawn = row.iter().position(|&p| p < 0.0).unwrap();
            counts[drawn] += 1.0;
            let p = f64::from(logits[drawn]).exp() / sum;
            assert!((f64::from(row[drawn]) + 1.0 - p).abs() < 1e-6);
        }
        for (count, &logit) in counts.iter().zip(&logits) {
            let expected = f64::from(logit).exp() / sum * DRAWS as f64;
            assert!((count - expected).abs() < 1.1, "{count} draws of {expected}");
        }
        // The ends, and what can never be drawn.
        let mut row = vec![f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY];
        softmax_less_drawn(&mut row, 1.0);
        assert_eq!(row, [0.0, 0.0, 0.0]);
        let mut row = vec![f32::NEG_INFINITY, 0.0];
        softmax_less_drawn(&mut row, 0.0);
        assert_eq!(row, [0.0, 0.0]);
    }

    #[test]
    fn the_gradient_of_the_surprise_is_its_slope() {
        let (decoder, _) = tiny(1, false);
        let mut random = Random::new(8);
        let head = small(&mut random);
        let (x, direction) = (random.normals(3 * 64), random.normals(3 * 64));
        let draws = [0.2, 0.5, 0.9];
        let gradient = head.surprise(&decoder, &x, &draws);
        let drawn: Vec<usize> = head
            .logits(&decoder, &x)
            .chunks_exact_mut(32)
            .zip(draws)
            .map(|(row, draw)| {
                softmax_less_drawn(row, draw);
                row.iter().position(|&p| p < 0.0).unwrap()
            })
            .collect();
        let at = |step: f32| {
            let moved: Vec<f32> = x.iter().zip(&direction).map(|(x, d)| x + step * d).collect();
            let logits = head.logits(&decoder, &moved);
            let surprises = logits
                .chunks_exact(32)
                .zip(&drawn)
                .map(|(row, &drawn)| row.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln() - f64::from(row[drawn]));
            surprises.sum::<f64>()
        };
        let measured = (at(1e-3) - at(-1e-3)) / 2e-3;
        let slope: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
        assert!((slope - measured).abs() < 0.01 * measured.abs().max(1.0), "{slope} against {measured}");
    }
}
