//! Twin of `gemv_w4.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
use crate::w4::{self, Matrix, Shape};
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;
/// Bytes of inputs in workgroup memory.
pub const X_BYTES: u32 = 8192;
/// The same on large devices.
pub const LARGE: &[(&str, u32)] = &[("WG", 512), ("X_BYTES", 22528)];

params! {
    /// Uniform at binding 0.
    Params {
        /// Outputs of this part.
        n: u32,
        /// Inputs; a multiple of 8.
        k: u32,
        /// Chunks of 32 inputs, the last one padded.
        chunks: u32,
        /// Inputs of a group; a multiple of 8 that divides k.
        group_size: u32,
        /// Groups of a row.
        groups: u32,
        /// Elements of a row of x; a multiple of 4.
        x_stride: u32,
        /// Elements of a row of out.
        out_stride: u32,
        /// First output column of this part.
        out_offset: u32,
        /// First element of the bias of these outputs.
        bias_offset: u32,
        /// Bits [`crate::FLAG_ACCUMULATE`], [`crate::FLAG_BIAS`], [`crate::FLAG_OFFSET_IS_BIAS`], [`crate::FLAG_SUMS`],
        /// [`crate::FLAG_NORM`].
        flags: u32,
        /// [`crate::RowMode`].
        row_mode: u32,
        /// Added to the mean of squares under [`crate::FLAG_NORM`].
        eps: f32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemv_w4",
    body: include_str!("gemv_w4.wgsl"),
    preludes: &[Prelude::Step, Prelude::W4, Prelude::Elem, Prelude::Reduce, Prelude::GemvW4],
    constants: &[("WG", WG), ("X_BYTES", X_BYTES)],
    large: LARGE,
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` input rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    crate::grid(params.n.div_ceil(w4::TILE_N as u32), rows)
}

/// out = norm(x) W^T (+ bias) (+ out) in f64, with the bindings of the kernel in order.
pub fn reference(
    params: &Params,
    step: &Step,
    x: &[f32],
    matrix: &Matrix,
    bias: &[f32],
    norm: &[f32],
    out: &mut [f32],
) {
    let mode = RowMode::from_u32(params.row_mode);
    for row in 0..mode.count(step) {
        let x = input(params, step, x, norm, row);
        for n in 0..params.n as usize {
            let mut sum = matrix.product(n, &x) + w4::bias_of(params.flags, &bias[params.bias_offset as usize..], n);
            let index = (row * params.out_stride + params.out_offset) as usize + n;
            if params.flags & FLAG_ACCUMULATE != 0 {
                sum += f64::from(out[index]);
            }
            out[index] = sum as f32;
        }
    }
}

/// Input row of output row `row` as the matrix sees it.
pub(crate) fn input(params: &Params, step: &Step, x: &[f32], norm: &[f32], row: u32) -> Vec<f32> {
    let start = (RowMode::from_u32(params.row_mode).input_row(step, row) * params.x_stride) as usize;
    let x = &x[start..start + params.k as usize];
    if params.flags & FLAG_NORM != 0 { w4::normed(x, norm, params.eps) } else { x.to_vec() }
}

/// Weights and activations once, two operations a weight and row.
pub fn cost(params: &Params, rows: u32) -> Cost {
    let (n, k, rows) = (u64::from(params.n), u64::from(params.k), u64::from(rows));
    Cost { bytes: n * (k / 2 + 4 * u64::from(params.groups)) + 4 * rows * (k + n), flops: 2 * n * k * rows }
}

/// A shape of a W4 matmul.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Outputs.
    pub n: u32,
    /// Inputs.
    pub k: u32,
    /// Inputs of a group.
    pub group_size: u32,
    /// Tokens of the step.
    pub tokens: u32,
    /// Rows.
    pub row_mode: RowMode,
    /// Flags.
    pub flags: u32,
}

/// Ragged outputs, one group a row, groups that cut a chunk, all flags and row modes, more inputs than workgroup memory
/// holds at once in either size.
pub fn cases() -> Vec<Case> {
    let all = RowMode::All;
    let case = |n, k, group_size, tokens, row_mode, flags| Case { n, k, group_size, tokens, row_mode, flags };
    vec![
        case(1, 8, 8, 1, all, 0),
        case(5, 64, 32, 1, all, FLAG_BIAS | FLAG_NORM),
        case(7, 72, 24, 2, all, FLAG_ACCUMULATE | FLAG_SUMS),
        case(6, 40, 40, 1, all, FLAG_OFFSET_IS_BIAS),
        case(37, 4352, 128, 1, all, FLAG_ACCUMULATE | FLAG_BIAS),
        case(33, 12288, 64, 1, all, FLAG_NORM | FLAG_SUMS),
        case(16, 256, 64, 3, RowMode::Compacted, FLAG_OFFSET_IS_BIAS | FLAG_BIAS),
        case(9, 384, 384, 5, RowMode::Logits, 0),
    ]
}

/// Random data for a case.
pub(crate) struct Data {
    pub(crate) params: Params,
    pub(crate) step: Step,
    pub(crate) rows: u32,
    pub(crate) x: Vec<f32>,
    pub(crate) matrix: Matrix,
    pub(crate) bias: Vec<f32>,
    pub(crate) norm: Vec<f32>,
}

impl Data {
    /// `width` is the number of output columns.
    pub(crate) fn random(case: Case, width: u32, rng: &mut Rng) -> Self {
        let Case { n, k, group_size, tokens, row_mode, flags } = case;
        let shape = Shape { n: n as usize, k: k as usize, group_size: group_size as usize };
        let matrix = Matrix::random(shape, flags, rng);
        let params = Params {
            n,
            k,
            chunks: shape.chunks() as u32,
            group_size,
            groups: shape.groups() as u32,
            x_stride: k + 4,
            out_stride: width + 3,
            out_offset: 2,
            bias_offset: 3,
            flags: flags & !(FLAG_OFFSET_IS_BIAS | FLAG_SUMS) | matrix.flags,
            row_mode: row_mode as u32,
            eps: 1e-5,
        };
        let step = Step { n_tokens: tokens, position: 0, logits_start: tokens / 2, logits_rows: tokens - tokens / 2 };
        // The columns between rows must never be used.
        let mut x = trial::poisoned((tokens * params.x_stride) as usize);
        for row in x.chunks_mut(params.x_stride as usize) {
            row[..k as usize].copy_from_slice(&rng.activations(k as usize));
        }
        let bias = rng.values((params.bias_offset + n) as usize, 10.0);
        let norm = rng.values(k as usize, 2.0);
        Self { params, step, rows: row_mode.count(&step), x, matrix, bias, norm }
    }

    /// The storage buffers up to the norm.
    pub(crate) fn storage(&self) -> Vec<Vec<u32>> {
        let (words, params) = (self.matrix.words.clone(), self.matrix.params.clone());
        vec![trial::words(&self.x), words, params, trial::words(&self.bias), trial::words(&self.norm)]
    }
}

/// Random data for a case; shared with the tiled kernel.
pub(crate) fn trial(case: Case, f16_products: bool, grid: fn(&Params, u32) -> [u32; 3], rng: &mut Rng) -> Trial {
    let data = Data::random(case, case.n, rng);
    let Data { params, step, rows, x, matrix, bias, norm } = &data;
    let n = case.n as usize;
    let mut out = trial::poisoned((rows * params.out_stride) as usize);
    if case.flags & FLAG_ACCUMULATE != 0 {
        for row in out.chunks_mut(params.out_stride as usize) {
            row[2..2 + n].copy_from_slice(&rng.values(n, 10.0));
        }
    }
    let mut storage = data.storage();
    storage.push(trial::words(&out));

    reference(params, step, x, matrix, bias, norm, &mut out);
    let mut tolerance = vec![0.0; out.len()];
    for row in 0..*rows {
        let x = input(params, step, x, norm, row);
        for n in 0..n {
            let at = (row * params.out_stride + params.out_offset) as usize + n;
            tolerance[at] = matrix.tolerance(n, &x, f16_products) + 1e-6 * (out[at].abs() + 20.0);
        }
    }
    let rms = if f16_products && case.k >= 256 { w4::F16_RMS } else { 0.0 };
    Trial {
        label: format!("{case:?}"),
        params: bytemuck::bytes_of(params).to_vec(),
        step: *step,
        storage,
        grid: grid(params, *rows),
        expected: vec![Expected { rms, ..Expected::close(7, out, tolerance) }],
    }
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    cases().into_iter().map(|case| trial(case, variant.elem == Elem::F16, grid, rng)).collect()
}
