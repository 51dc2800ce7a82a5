//! Twin of `norm.wgsl`; the formula and the mapping are in its header.

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
        /// Bits [`crate::FLAG_CENTER`], [`crate::FLAG_BIAS`], [`crate::FLAG_ACCUMULATE`].
        flags: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "norm",
    body: include_str!("norm.wgsl"),
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

/// Normalises one run of columns in f64, after subtracting its mean under [`FLAG_CENTER`].
pub(crate) fn normalise(x: &[f32], weight: &[f32], eps: f32, flags: u32) -> Vec<f64> {
    let n = x.len() as f64;
    let center = if flags & FLAG_CENTER != 0 { x.iter().map(|&v| f64::from(v)).sum::<f64>() / n } else { 0.0 };
    let squares: f64 = x.iter().map(|&v| (f64::from(v) - center).powi(2)).sum();
    let factor = 1.0 / (squares / n + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(&x, &w)| (f64::from(x) - center) * factor * f64::from(w)).collect()
}

/// The formula of the kernel in f64, with its bindings in order.
pub fn reference(params: &Params, step: &Step, x: &[f32], weight: &[f32], bias: &[f32], out: &mut [f32]) {
    let mode = RowMode::from_u32(params.row_mode);
    let dim = params.dim as usize;
    for row in 0..mode.count(step) {
        let x_start = (mode.input_row(step, row) * params.x_stride + params.x_offset) as usize;
        let out_start = (row * params.out_stride + params.out_offset) as usize;
        let normalised = normalise(&x[x_start..x_start + dim], weight, params.eps, params.flags);
        for (i, (out, value)) in out[out_start..out_start + dim].iter_mut().zip(normalised).enumerate() {
            let bias = if params.flags & FLAG_BIAS != 0 { f64::from(bias[i]) } else { 0.0 };
            let before = if params.flags & FLAG_ACCUMULATE != 0 { f64::from(*out) } else { 0.0 };
            *out = (value + bias + before) as f32;
        }
    }
}

/// Input, output and weight once.
pub fn cost(params: &Params, rows: u32) -> Cost {
    let (dim, rows) = (u64::from(params.dim), u64::from(rows));
    Cost { bytes: trial::word_bytes(dim * (2 * rows + 1)), flops: 4 * dim * rows }
}

/// (dim, tokens, row mode, flags): one element, less and more than a workgroup, every mode and flag.
pub fn cases() -> Vec<(u32, u32, RowMode, u32)> {
    vec![
        (1, 1, RowMode::All, 0),
        (100, 3, RowMode::All, FLAG_ACCUMULATE),
        (300, 2, RowMode::All, FLAG_CENTER | FLAG_BIAS | FLAG_ACCUMULATE),
        (4097, 5, RowMode::Logits, FLAG_CENTER | FLAG_BIAS),
        (4097, 5, RowMode::Logits, 0),
        (512, 4, RowMode::Compacted, FLAG_BIAS),
    ]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (dim, tokens, row_mode, flags) in cases() {
        let params = Params {
            dim,
            x_stride: dim + 5,
            x_offset: 2,
            out_stride: dim + 3,
            out_offset: 1,
            eps: 1e-5,
            row_mode: row_mode as u32,
            flags,
        };
        let step = Step { n_tokens: tokens, position: 0, logits_start: tokens / 2, logits_rows: tokens - tokens / 2 };
        let rows = row_mode.count(&step);
        let x = rng.activations((tokens * params.x_stride) as usize);
        let weight = rng.values(dim as usize, 2.0);
        let bias = rng.values(dim as usize, 2.0);
        let mut out = trial::poisoned((rows * params.out_stride) as usize);
        if flags & FLAG_ACCUMULATE != 0 {
            for row in out.chunks_mut(params.out_stride as usize) {
                row[1..1 + dim as usize].copy_from_slice(&rng.values(dim as usize, 10.0));
            }
        }
        let storage = vec![trial::words(&x), trial::words(&weight), trial::words(&bias), trial::words(&out)];
        reference(&params, &step, &x, &weight, &bias, &mut out);
        trials.push(Trial {
            label: format!("dim {dim}, {tokens} tokens, {row_mode:?}, flags {flags}"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step,
            storage,
            grid: grid(&params, rows),
            expected: vec![Expected::near(5, out, TOLERANCE)],
        });
    }
    trials
}
