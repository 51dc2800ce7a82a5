//! The forward pass of a block, in stages between which weights may change.

use super::attention::{attention, rotate};
use super::{Block, Decoder, Linear, Site, Slot};
use crate::math::{View, gemm, times_transposed};

/// out = x / sqrt(mean(x²) + eps) * weight, over runs of `weight.len()` elements.
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let dim = weight.len();
    let mut out = Vec::with_capacity(x.len());
    for x in x.chunks_exact(dim) {
        let factor = inverse_rms(x, eps);
        out.extend(x.iter().zip(weight).map(|(x, w)| x * factor * w));
    }
    out
}

/// 1 / sqrt(mean(x²) + eps)
pub(super) fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64;
    (1.0 / (mean + f64::from(eps)).sqrt()) as f32
}

pub(crate) fn silu(v: f32) -> f32 {
    v / (1.0 + (-v).exp())
}

impl Linear {
    /// The output for `x` (tokens, k): (tokens, n).
    pub fn forward(&self, decoder: &Decoder, x: &[f32]) -> Vec<f32> {
        let rows = x.len() / self.k;
        let there_only = self.weight.is_empty();
        let on_device = || {
            let device = decoder.device.as_ref()?;
            let takes = there_only || device.takes(rows, self.n, self.k);
            takes.then(|| device.multiply(x, self.resident(device)?)).flatten()
        };
        let here = || match there_only {
            // The device failed after it was given a candidate; whoever asked will find it bad and try others.
            true => vec![0.0; rows * self.n],
            false => times_transposed(decoder.threads, x, &self.weight, self.k),
        };
        let mut out = on_device().unwrap_or_else(here);
        self.add_bias(&mut out);
        out
    }

    /// Adds the output for `x` (tokens, k) to `out` (tokens, n).
    pub fn accumulate(&self, decoder: &Decoder, x: &[f32], out: &mut [f32]) {
        if decoder.device.as_ref().is_some_and(|device| device.takes(x.len() / self.k, self.n, self.k)) {
            out.iter_mut().zip(self.forward(decoder, x)).for_each(|(out, more)| *out += more);
            return;
        }
        gemm(decoder.threads, 1.0, View::new(x, self.k), View::new(&self.weight, self.k).t(), 1.0, out, self.n);
        self.add_bias(out);
    }

    fn add_bias(&self, out: &mut [f32]) {
        if let Some(bias) = &self.bias {
            for row in out.chunks_exact_mut(self.n) {
                row.iter_mut().zip(bias).for_each(|(out, b)| *out += b);
            }
        }
    }
}

/// q, k and v of one sequence before attention, and what led to them.
pub(super) struct Projected {
    /// Rotated and normed.
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    /// Before the norms of the heads; empty where there are none.
    pub(super) raw_q: Vec<f32>,
    pub(super) raw_k: Vec<f32>,
}

impl Decoder {
    /// Input of q, k and v.
    pub fn attention_input(&self, block: &Block, x: &[f32]) -> Vec<f32> {
        rms_norm(x, &block.input_norm, self.config.rms_norm_eps)
    }

    pub(super) fn project(&self, block: &Block, normed: &[f32]) -> Projected {
        let out = |slot: Slot| block.linear(slot).forward(self, normed);
        let (mut q, mut k, v) = (out(Slot::Q), out(Slot::K), out(Slot::V));
        let (mut raw_q, mut raw_k) = (Vec::new(), Vec::new());
        let eps = self.config.rms_norm_eps;
        if let (Some(q_norm), Some(k_norm)) = (&block.q_norm, &block.k_norm) {
            raw_q = std::mem::take(&mut q);
            raw_k = std::mem::take(&mut k);
            q = rms_norm(&raw_q, q_norm, eps);
            k = rms_norm(&raw_k, k_norm, eps);
        }
        rotate(self, &mut q, self.config.num_attention_heads, false);
        rotate(self, &mut k, self.config.num_key_value_heads, false);
        Projected { q, k, v, raw_q, raw_k }
    }

    /// Input of o for one sequence, from that of q, k and v.
    pub fn attend(&self, block: &Block, normed: &[f32]) -> Vec<f32> {
        let p = self.project(block, normed);
        attention(self, block.layer, (&p.q, &p.k, &p.v), false).0
    }

    /// Input of gate and up, from the residual stream after attention.
    pub fn mlp_input(&self, block: &Block, x: &[f32]) -> Vec<f32> {
        rms_norm(x, &block.post_norm, self.config.rms_norm_eps)
    }

    /// Input of down, from that of gate and up.
    pub fn activate(&self, block: &Block, normed: &[f32]) -> Vec<f32> {
        let mut gate = block.linear(Slot::Gate).forward(self, normed);
        let up = block.linear(Slot::Up).forward(self, normed);
        let width = block.linear(Slot::Up).n;
        self.threads.rows(&mut gate, width, |first, rows| {
            for (g, u) in rows.iter_mut().zip(&up[first * width..]) {
                *g = silu(*g) * u;
            }
        });
        gate
    }

    /// Runs the block over the residual stream `x` (length, hidden) of one sequence; `tap` sees the input of every
    /// linear module.
    pub fn forward(&self, block: &Block, x: &mut [f32], tap: &mut dyn FnMut(Site, &[f32])) {
        let normed = self.attention_input(block, x);
        tap(Site::Attention, &normed);
        let attended = self.attend(block, &normed);
        tap(Site::Attended, &attended);
        block.linear(Slot::O).accumulate(self, &attended, x);
        let normed = self.mlp_input(block, x);
        tap(Site::Mlp, &normed);
        let activated = self.activate(block, &normed);
        tap(Site::Activated, &activated);
        block.linear(Slot::Down).accumulate(self, &activated, x);
    }
}
