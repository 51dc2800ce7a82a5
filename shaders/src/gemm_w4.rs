//! Twin of `gemm_w4.wgsl`; the formula and the mapping are in its header.

use crate::*;

use crate::gemv_w4::Vectors;
use crate::trial::Expected;
use crate::w4::{self, Matrix, Shape};

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
        /// Bits [`crate::FLAG_ACCUMULATE`], [`crate::FLAG_BIAS`], [`crate::FLAG_OFFSET_IS_BIAS`].
        flags: u32,
        /// [`crate::RowMode`].
        row_mode: u32,
        /// Unused.
        pad: u32,
    }
}

/// Invocations of a workgroup.
pub const WG: u32 = 256;
/// Rows and outputs of a workgroup.
pub const TILE: u32 = 64;
/// Inputs held in workgroup memory.
pub const K_STEP: u32 = 32;

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemm_w4",
    body: include_str!("gemm_w4.wgsl"),
    preludes: &[
        Prelude::Step,
        Prelude::W4,
        Prelude::Elem,
        Prelude::Weights8,
        Prelude::Weights8W4,
        Prelude::Gemm,
        Prelude::GemmRows,
    ],
    constants: &[("WG", WG), ("TILE", TILE), ("K_STEP", K_STEP)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` input rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    crate::grid(params.n.div_ceil(TILE), rows.div_ceil(TILE))
}

pub use crate::gemv_w4::Case;

/// As [`gemv_w4::cost`].
pub fn cost(params: &Params, rows: u32) -> Cost {
    w4::cost(params.n, params.k, params.groups, rows)
}

/// Ragged tiles in every direction, a last K step that is not full, all flags and row modes.
pub fn cases() -> Vec<Case> {
    let all = RowMode::All;
    let case = |n, k, group_size, tokens, row_mode, flags| Case { n, k, group_size, tokens, row_mode, flags };
    vec![
        case(1, 8, 8, 1, all, 0),
        case(64, 64, 32, 64, all, FLAG_BIAS),
        case(70, 72, 24, 67, all, FLAG_ACCUMULATE),
        case(33, 384, 128, 9, all, FLAG_OFFSET_IS_BIAS | FLAG_BIAS),
        case(130, 40, 40, 5, RowMode::Compacted, FLAG_SUMS),
        case(66, 128, 128, 13, RowMode::Logits, FLAG_ACCUMULATE),
    ]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    // Products are f32 in both variants, and f16 weights are the reference's.
    cases().into_iter().map(|case| trial(case, grid, false, rng)).collect()
}

/// Random data for a case; `f16` for half precision products.
pub(crate) fn trial(case: Case, grid: fn(&Params, u32) -> [u32; 3], f16: bool, rng: &mut Rng) -> Trial {
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
        out_stride: n + 3,
        out_offset: 2,
        bias_offset: 3,
        flags: flags & !(FLAG_OFFSET_IS_BIAS | FLAG_SUMS) | matrix.flags,
        row_mode: row_mode as u32,
        pad: 0,
    };
    let step = Step { n_tokens: tokens, position: 0, logits_start: tokens / 2, logits_rows: tokens - tokens / 2 };
    let rows = row_mode.count(&step);
    let x: Vec<Vec<f32>> = (0..tokens).map(|_| rng.activations(k as usize)).collect();
    // The columns between rows must never be used.
    let mut x_words = trial::words(&trial::poisoned((tokens * params.x_stride) as usize));
    for (words, x) in x_words.chunks_mut(params.x_stride as usize).zip(&x) {
        words[..k as usize].copy_from_slice(&trial::words(x));
    }
    let bias = rng.values((params.bias_offset + n) as usize, 10.0);
    let mut out = trial::poisoned((rows * params.out_stride) as usize);
    if flags & FLAG_ACCUMULATE != 0 {
        for row in out.chunks_mut(params.out_stride as usize) {
            row[2..2 + n as usize].copy_from_slice(&rng.values(n as usize, 10.0));
        }
    }
    let (words, groups) = (matrix.words.clone(), matrix.params.clone());
    let storage = vec![x_words, words, groups, trial::words(&bias), trial::words(&out)];

    let as_gemv = gemv_w4::Params {
        n,
        out_stride: params.out_stride,
        out_offset: params.out_offset,
        bias_offset: params.bias_offset,
        flags: params.flags,
        row_mode: params.row_mode,
        ..Default::default()
    };
    gemv_w4::reference(&as_gemv, &step, &x, &matrix, &Vectors { bias: &bias, norm: &[] }, &mut out);
    let mut tolerance = vec![0.0; out.len()];
    for row in 0..rows {
        let x = &x[row_mode.input_row(&step, row) as usize];
        for n in 0..n as usize {
            let at = (row * params.out_stride + params.out_offset) as usize + n;
            tolerance[at] = matrix.tolerance(n, x, f16) + 1e-6 * (out[at].abs() + 20.0);
        }
    }
    let rms = if f16 && k >= 256 { w4::F16_RMS } else { 0.0 };
    Trial {
        label: format!("{case:?}"),
        params: bytemuck::bytes_of(&params).to_vec(),
        step,
        storage,
        grid: grid(&params, rows),
        expected: vec![Expected { rms, ..Expected::close(6, out, tolerance) }],
    }
}
