//! Twin of `gemv_dense.wgsl`; the formula and the mapping are in its header.

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
        /// Words of a row of `weight`, a multiple of 4; the padding must hold finite numbers (zeros).
        row_words: u32,
        /// Elements of a row of x; a multiple of 4.
        x_stride: u32,
        /// Elements of a row of out.
        out_stride: u32,
        /// First output column of this part.
        out_offset: u32,
        /// First element of the bias of these outputs.
        bias_offset: u32,
        /// Bits [`crate::FLAG_ACCUMULATE`], [`crate::FLAG_BIAS`].
        flags: u32,
        /// [`crate::RowMode`].
        row_mode: u32,
        /// Unused.
        pad: [u32; 3],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemv_dense",
    body: include_str!("gemv_dense.wgsl"),
    preludes: &[Prelude::Step, Prelude::Dense, Prelude::GemvDense, Prelude::Reduce],
    constants: &[("WG", WG), ("ROWS", ROWS)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` input rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    crate::grid(params.n.div_ceil(ROWS), rows)
}

/// Single precision sums of some thousand products, relative to the sum of their magnitudes.
const F32_SUMS: f32 = 3e-6;

/// out = x W^T (+ bias) (+ out) in f64, with the bindings of the kernel in order.
pub fn reference(params: &Params, step: &Step, dense: Dense, x: &[f32], weight: &[u32], bias: &[f32], out: &mut [f32]) {
    let mode = RowMode::from_u32(params.row_mode);
    for row in 0..mode.count(step) {
        let x_start = (mode.input_row(step, row) * params.x_stride) as usize;
        for n in 0..params.n as usize {
            let weights = &weight[n * params.row_words as usize..];
            let mut sum = 0.0;
            for k in 0..params.k as usize {
                sum += f64::from(x[x_start + k]) * f64::from(dense.element(weights, k));
            }
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

/// Weights and activations once, two operations a weight and row.
pub fn cost(params: &Params, rows: u32) -> Cost {
    let (n, k, rows) = (u64::from(params.n), u64::from(params.k), u64::from(rows));
    Cost { bytes: trial::word_bytes(n * u64::from(params.row_words)) + 4 * rows * (k + n), flops: 2 * n * k * rows }
}

/// A shape of a dense matmul.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Outputs.
    pub n: u32,
    /// Inputs.
    pub k: u32,
    /// Tokens of the step.
    pub tokens: u32,
    /// Rows.
    pub row_mode: RowMode,
    /// Flags.
    pub flags: u32,
}

/// Ragged outputs and inputs, all flags and row modes, more inputs than one round.
pub fn cases() -> Vec<Case> {
    let case = |n, k, tokens, row_mode, flags| Case { n, k, tokens, row_mode, flags };
    vec![
        case(1, 1, 1, RowMode::All, 0),
        case(5, 13, 2, RowMode::All, FLAG_BIAS),
        case(6, 67, 1, RowMode::Compacted, FLAG_ACCUMULATE),
        case(11, 2050, 3, RowMode::Logits, FLAG_ACCUMULATE | FLAG_BIAS),
    ]
}

/// Words of a row in the element type of the variant, padded with zeros to whole vec4.
pub(crate) fn pack_row(dense: Dense, values: &[f32]) -> Vec<u32> {
    let mut words = match dense {
        Dense::F16 => trial::pack_halves(values),
        Dense::BF16 => values
            .chunks(2)
            .map(|pair| {
                let bits = |v: f32| u32::from(half::bf16::from_f32(v).to_bits());
                bits(pair[0]) | pair.get(1).map_or(0, |&v| bits(v) << 16)
            })
            .collect(),
        Dense::F32 => trial::words(values),
    };
    words.resize(words.len().next_multiple_of(4), 0);
    words
}

/// Random data for a case; shared with the tiled kernel.
pub(crate) fn trial(case: Case, dense: Dense, grid: fn(&Params, u32) -> [u32; 3], rng: &mut Rng) -> Trial {
    let Case { n, k, tokens, row_mode, flags } = case;
    let weight: Vec<u32> = (0..n).flat_map(|_| pack_row(dense, &rng.values(k as usize, 0.1))).collect();
    let params = Params {
        n,
        k,
        row_words: weight.len() as u32 / n,
        x_stride: (k + 4).next_multiple_of(4),
        out_stride: n + 3,
        out_offset: 2,
        bias_offset: 3,
        flags,
        row_mode: row_mode as u32,
        pad: [0; 3],
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
    let storage = vec![trial::words(&x), weight.clone(), trial::words(&bias), trial::words(&out)];

    reference(&params, &step, dense, &x, &weight, &bias, &mut out);
    let mut tolerance = vec![0.0; out.len()];
    for row in 0..rows {
        let x_start = (row_mode.input_row(&step, row) * params.x_stride) as usize;
        for n in 0..n as usize {
            let weights = &weight[n * params.row_words as usize..];
            let sum: f32 = (0..k as usize).map(|k| (x[x_start + k] * dense.element(weights, k)).abs()).sum();
            let at = (row * params.out_stride + params.out_offset) as usize + n;
            tolerance[at] = F32_SUMS * (sum + 20.0);
        }
    }
    Trial {
        label: format!("{case:?}"),
        params: bytemuck::bytes_of(&params).to_vec(),
        step,
        storage,
        grid: grid(&params, rows),
        expected: vec![Expected::close(5, out, tolerance)],
    }
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    cases().into_iter().map(|case| trial(case, variant.dense, grid, rng)).collect()
}
