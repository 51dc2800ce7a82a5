//! Twin of `gemv_packed.wgsl`; the formula and the mapping are in its header.

use crate::packed::{self, Matrix};
use crate::trial::Expected;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 128;
/// Outputs of a workgroup.
pub const ROWS: u32 = 4;

params! {
    /// Uniform at binding 0.
    Params {
        /// Outputs of this part.
        n: u32,
        /// Inputs.
        k: u32,
        /// [`Packed::row_words`].
        row_words: u32,
        /// Inputs of a group: a multiple of 8, or at least `k`. Blocks have none.
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
        /// Bits [`crate::FLAG_ACCUMULATE`], [`crate::FLAG_BIAS`], [`crate::FLAG_OFFSET_IS_BIAS`], [`crate::FLAG_WIDE`],
        /// [`crate::FLAG_BF16`], [`crate::FLAG_ROUND_PRODUCTS`].
        flags: u32,
        /// [`crate::RowMode`].
        row_mode: u32,
        /// Unused.
        pad: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemv_packed",
    body: include_str!("gemv_packed.wgsl"),
    preludes: &[Prelude::Step, Prelude::Weights8, Prelude::Packed, Prelude::Reduce],
    constants: &[("WG", WG), ("ROWS", ROWS)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` input rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    crate::grid(params.n.div_ceil(ROWS), rows)
}

/// Weights and activations once, two operations a weight and row.
pub fn cost(params: &Params, rows: u32) -> Cost {
    packed::cost((params.n, params.k), params.row_words, params.groups, rows)
}

/// Single precision sums of some thousand products, relative to the sum of their magnitudes; the weights of a bias and
/// a product of opposite signs lose a little more.
const F32_SUMS: f32 = 1e-5;
/// Half precision weights, relative to the sum of the magnitudes of products, and below the normal range of f16.
const F16_WEIGHTS: f32 = 6e-4;

/// out = x W^T (+ bias) (+ out) in f64, with the bindings of the kernel in order.
pub fn reference(params: &Params, step: &Step, matrix: &Matrix, x: &[f32], bias: &[f32], out: &mut [f32]) {
    let mode = RowMode::from_u32(params.row_mode);
    for row in 0..mode.count(step) {
        let x = &x[(mode.input_row(step, row) * params.x_stride) as usize..];
        for n in 0..params.n as usize {
            let mut sum: f64 = (0..params.k as usize).map(|k| f64::from(x[k]) * f64::from(matrix.weight(n, k))).sum();
            if params.flags & FLAG_BIAS != 0 {
                sum += f64::from(bias[params.bias_offset as usize + n]);
            }
            let index = (row * params.out_stride + params.out_offset) as usize + n;
            if params.flags & FLAG_ACCUMULATE != 0 {
                sum += f64::from(out[index]);
            }
            out[index] = sum as f32;
        }
    }
}

/// A shape of a packed matmul.
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

/// Ragged outputs and inputs, short last groups, groups longer than a row, all flags and row modes, several blocks.
pub fn cases() -> Vec<Case> {
    let all = RowMode::All;
    let case = |n, k, group_size, tokens, row_mode, flags| Case { n, k, group_size, tokens, row_mode, flags };
    vec![
        case(1, 8, 8, 1, all, 0),
        case(5, 13, 16, 2, all, FLAG_BIAS | FLAG_WIDE),
        case(6, 100, 24, 1, RowMode::Compacted, FLAG_ACCUMULATE | FLAG_OFFSET_IS_BIAS),
        case(7, 512, 32, 3, RowMode::Logits, FLAG_ACCUMULATE | FLAG_BIAS | ROUNDED),
        case(4, 256, 256, 1, all, FLAG_OFFSET_IS_BIAS),
        case(9, 2304, 128, 1, all, 0),
    ]
}

/// Every flag that says how weights come about.
pub(crate) const ROUNDED: u32 = FLAG_WIDE | FLAG_OFFSET_IS_BIAS | FLAG_BF16 | FLAG_ROUND_PRODUCTS;

/// Random data for a case; shared with the tiled kernel.
pub(crate) fn trial(
    case: Case,
    variant: Variant,
    grid: fn(&Params, u32) -> [u32; 3],
    f16: bool,
    rng: &mut Rng,
) -> Trial {
    let Case { n, k, group_size, tokens, row_mode, flags } = case;
    let matrix = Matrix::random(variant.packed, (n as usize, k as usize, group_size as usize), flags, rng);
    let params = Params {
        n,
        k,
        row_words: variant.packed.row_words(k as usize) as u32,
        group_size,
        groups: matrix.groups() as u32,
        x_stride: (k + 4).next_multiple_of(4),
        out_stride: n + 3,
        out_offset: 2,
        bias_offset: 3,
        flags: flags & !ROUNDED | matrix.flags,
        row_mode: row_mode as u32,
        pad: 0,
    };
    let step = Step { n_tokens: tokens, position: 0, logits_start: tokens / 2, logits_rows: tokens - tokens / 2 };
    let rows = row_mode.count(&step);
    // The columns between rows must never be used.
    let mut x = trial::poisoned((tokens * params.x_stride) as usize);
    for row in x.chunks_mut(params.x_stride as usize) {
        row[..k as usize].copy_from_slice(&rng.activations(k as usize));
    }
    let bias = rng.values((params.bias_offset + n) as usize, 10.0);
    let mut out = trial::poisoned((rows * params.out_stride) as usize);
    if flags & FLAG_ACCUMULATE != 0 {
        for row in out.chunks_mut(params.out_stride as usize) {
            row[2..2 + n as usize].copy_from_slice(&rng.values(n as usize, 10.0));
        }
    }
    let storage = vec![
        trial::words(&x),
        matrix.codes.clone(),
        if matrix.params.is_empty() { vec![0; 4] } else { matrix.params.clone() },
        trial::words(&bias),
        trial::words(&out),
    ];

    reference(&params, &step, &matrix, &x, &bias, &mut out);
    let mut tolerance = vec![0.0; out.len()];
    // A device may fuse the product and the sum, and then a few weights round to the other side.
    let bf16 = if flags & FLAG_BF16 != 0 { 1e-3 } else { 0.0 };
    let relative = F32_SUMS + bf16 + if f16 || variant.packed == Packed::W4 { F16_WEIGHTS } else { 0.0 };
    for row in 0..rows {
        let x = &x[(row_mode.input_row(&step, row) * params.x_stride) as usize..];
        for n in 0..n as usize {
            let sum: f32 = (0..k as usize).map(|k| x[k].abs() * (matrix.weight(n, k).abs() + 0.01)).sum();
            let at = (row * params.out_stride + params.out_offset) as usize + n;
            tolerance[at] = relative * (sum + 20.0);
        }
    }
    Trial {
        label: format!("{case:?}"),
        params: bytemuck::bytes_of(&params).to_vec(),
        step,
        storage,
        grid: grid(&params, rows),
        expected: vec![Expected::close(6, out, tolerance)],
    }
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let fits = |case: &Case| packed::fits(variant.packed, case.k, case.group_size);
    cases().into_iter().filter(fits).map(|case| trial(case, variant, grid, false, rng)).collect()
}
