//! Twin of `rms_norm.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0.
    Params {
        /// Elements normalised together.
        dim: u32,
        /// Elements of a row of x.
        x_stride: u32,
        /// First column of x.
        x_offset: u32,
        /// Elements of a row of out.
        out_stride: u32,
        /// First column of out.
        out_offset: u32,
        /// Added to the mean of squares.
        eps: f32,
        /// [`crate::RowMode`].
        row_mode: u32,
        /// Unused.
        pad: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "rms_norm",
    body: include_str!("rms_norm.wgsl"),
    preludes: &[Prelude::Step, Prelude::Reduce],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` rows.
pub fn grid(_params: &Params, rows: u32) -> [u32; 3] {
    [1, 1, rows]
}

/// Sums of squares and one reciprocal root in single precision.
pub(crate) const TOLERANCE: f32 = 1e-5;

/// Normalises one run of columns in f64.
pub(crate) fn normalise(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let squares: f64 = x.iter().map(|&v| f64::from(v).powi(2)).sum();
    let factor = 1.0 / (squares / x.len() as f64 + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(&x, &w)| (f64::from(x) * factor * f64::from(w)) as f32).collect()
}

/// out = x / sqrt(mean(x^2) + eps) * weight, with the bindings of the kernel in order.
pub fn reference(params: &Params, step: &Step, x: &[f32], weight: &[f32], out: &mut [f32]) {
    let mode = RowMode::from_u32(params.row_mode);
    let dim = params.dim as usize;
    for row in 0..mode.count(step) {
        let x_start = (mode.input_row(step, row) * params.x_stride + params.x_offset) as usize;
        let out_start = (row * params.out_stride + params.out_offset) as usize;
        let normalised = normalise(&x[x_start..x_start + dim], weight, params.eps);
        out[out_start..out_start + dim].copy_from_slice(&normalised);
    }
}

/// Input, output and weight once.
pub fn cost(params: &Params, rows: u32) -> Cost {
    let (dim, rows) = (u64::from(params.dim), u64::from(rows));
    Cost { bytes: trial::word_bytes(dim * (2 * rows + 1)), flops: 4 * dim * rows }
}

/// (dim, tokens, row mode): one element, less and more than a workgroup, every mode.
pub fn cases() -> Vec<(u32, u32, RowMode)> {
    vec![(1, 1, RowMode::All), (100, 3, RowMode::All), (4097, 5, RowMode::Logits), (512, 4, RowMode::Compacted)]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (dim, tokens, row_mode) in cases() {
        let params = Params {
            dim,
            x_stride: dim + 5,
            x_offset: 2,
            out_stride: dim + 3,
            out_offset: 1,
            eps: 1e-5,
            row_mode: row_mode as u32,
            pad: 0,
        };
        let step = Step { n_tokens: tokens, position: 0, logits_start: tokens / 2, logits_rows: tokens - tokens / 2 };
        let rows = row_mode.count(&step);
        let x = rng.activations((tokens * params.x_stride) as usize);
        let weight = rng.values(dim as usize, 2.0);
        let mut out = trial::poisoned((rows * params.out_stride) as usize);
        let storage = vec![trial::words(&x), trial::words(&weight), trial::words(&out)];
        reference(&params, &step, &x, &weight, &mut out);
        trials.push(Trial {
            label: format!("dim {dim}, {tokens} tokens, {row_mode:?}"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step,
            storage,
            grid: grid(&params, rows),
            expected: vec![Expected::near(4, out, TOLERANCE)],
        });
    }
    trials
}
