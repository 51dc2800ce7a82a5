//! Twin of `gemv_w4.wgsl`; the formula and the mapping are in its header.

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
        /// Inputs; a multiple of 8.
        k: u32,
        /// Words of a row of `qweight`, a multiple of 4 that is at least k / 8; the content of the padding is ignored.
        row_words: u32,
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

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemv_w4",
    body: include_str!("gemv_w4.wgsl"),
    preludes: &[Prelude::Step, Prelude::W4, Prelude::Elem, Prelude::Reduce],
    constants: &[
        ("WG", WG),
        ("ROWS", ROWS),
        ("FLAG_ACCUMULATE", FLAG_ACCUMULATE),
        ("FLAG_BIAS", FLAG_BIAS),
        ("FLAG_OFFSET_IS_BIAS", FLAG_OFFSET_IS_BIAS),
    ],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` input rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    crate::grid(params.n.div_ceil(ROWS), rows)
}

/// Largest relative error of a weight: it is rounded to half precision in the reference, not on the device.
pub(crate) const WEIGHT_ROUNDING: f32 = 6e-4;
/// Half precision products of inputs scaled to 1 with codes of at most 8 in magnitude, summed four deep, relative to
/// the sum of 8 * |s * x|.
const F16_PRODUCTS: f32 = 2.5e-3;
/// Cancellation between s * dot(q - 8, x) and c * sum(x) in single precision, relative to the same sum.
pub(crate) const F32_PRODUCTS: f32 = 1e-5;
/// What half precision may cost in the mean, so that a whole model stays within a hundredth of its largest logit.
const F16_RMS: f32 = 1e-3;

/// Scale and offset of the group of input `k` of output `n`.
fn scale_offset(params: &Params, group_params: &[u32], n: usize, k: usize) -> (f32, f32) {
    let word = group_params[n * params.groups as usize + k / params.group_size as usize];
    let half = |bits: u32| half::f16::from_bits(bits as u16).to_f32();
    (half(word), half(word >> 16))
}

/// Weight of output `n` and input `k`, rounded to half precision as the formats define it.
pub fn weight(params: &Params, qweight: &[u32], group_params: &[u32], n: usize, k: usize) -> f32 {
    let q = ((qweight[n * params.row_words as usize + k / 8] >> (4 * (k % 8))) & 15) as f32;
    let (s, o) = scale_offset(params, group_params, n, k);
    let exact = if params.flags & FLAG_OFFSET_IS_BIAS != 0 { q * s + o } else { (q - o) * s };
    half::f16::from_f32(exact).to_f32()
}

/// out = x W^T (+ bias) (+ out) in f64, with the bindings of the kernel in order.
pub fn reference(
    params: &Params,
    step: &Step,
    x: &[f32],
    qweight: &[u32],
    group_params: &[u32],
    bias: &[f32],
    out: &mut [f32],
) {
    let mode = RowMode::from_u32(params.row_mode);
    for row in 0..mode.count(step) {
        let x_start = (mode.input_row(step, row) * params.x_stride) as usize;
        for n in 0..params.n as usize {
            let mut sum = 0.0;
            for k in 0..params.k as usize {
                sum += f64::from(x[x_start + k]) * f64::from(weight(params, qweight, group_params, n, k));
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

/// Ragged outputs, one group a row, groups that cut a chunk, all flags and row modes, more inputs than one round.
pub fn cases() -> Vec<Case> {
    let all = RowMode::All;
    let case = |n, k, group_size, tokens, row_mode, flags| Case { n, k, group_size, tokens, row_mode, flags };
    vec![
        case(1, 8, 8, 1, all, 0),
        case(5, 64, 32, 1, all, FLAG_BIAS),
        case(7, 72, 24, 2, all, FLAG_ACCUMULATE),
        case(6, 40, 40, 1, all, FLAG_OFFSET_IS_BIAS),
        case(37, 4352, 128, 1, all, FLAG_ACCUMULATE | FLAG_BIAS),
        case(16, 256, 64, 3, RowMode::Compacted, FLAG_OFFSET_IS_BIAS | FLAG_BIAS),
        case(9, 384, 384, 5, RowMode::Logits, 0),
    ]
}

/// Random data for a case; shared with the tiled kernel.
pub(crate) fn trial(case: Case, f16_products: bool, grid: fn(&Params, u32) -> [u32; 3], rng: &mut Rng) -> Trial {
    let Case { n, k, group_size, tokens, row_mode, flags } = case;
    let params = Params {
        n,
        k,
        row_words: (k / 8).next_multiple_of(4),
        group_size,
        groups: k / group_size,
        x_stride: k + 4,
        out_stride: n + 3,
        out_offset: 2,
        bias_offset: 3,
        flags,
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
    let qweight: Vec<u32> = (0..n * params.row_words).map(|_| rng.next_u32()).collect();
    let group_params: Vec<u32> = (0..n * params.groups)
        .map(|_| {
            let s = rng.range(-0.02, 0.02);
            let o = if flags & FLAG_OFFSET_IS_BIAS != 0 { rng.range(-0.2, 0.2) } else { rng.below(16) as f32 };
            trial::pack_halves(&[s, o])[0]
        })
        .collect();
    let bias = rng.values((params.bias_offset + n) as usize, 10.0);
    let mut out = trial::poisoned((rows * params.out_stride) as usize);
    if flags & FLAG_ACCUMULATE != 0 {
        for row in out.chunks_mut(params.out_stride as usize) {
            row[2..2 + n as usize].copy_from_slice(&rng.values(n as usize, 10.0));
        }
    }
    let storage =
        vec![trial::words(&x), qweight.clone(), group_params.clone(), trial::words(&bias), trial::words(&out)];

    reference(&params, &step, &x, &qweight, &group_params, &bias, &mut out);
    let mut tolerance = vec![0.0; out.len()];
    for row in 0..rows {
        let x_start = (row_mode.input_row(&step, row) * params.x_stride) as usize;
        for n in 0..n as usize {
            let (mut weights, mut codes) = (0.0, 0.0);
            for k in 0..k as usize {
                let x = x[x_start + k].abs();
                weights += x * weight(&params, &qweight, &group_params, n, k).abs();
                let (s, o) = scale_offset(&params, &group_params, n, k);
                codes += x * (8.0 * s.abs() + if flags & FLAG_OFFSET_IS_BIAS != 0 { o.abs() } else { 0.0 });
            }
            let products = if f16_products { F16_PRODUCTS } else { F32_PRODUCTS };
            let at = (row * params.out_stride + params.out_offset) as usize + n;
            tolerance[at] = WEIGHT_ROUNDING * weights + products * codes + 1e-6 * (out[at].abs() + 20.0);
        }
    }
    let rms = if f16_products && k >= 256 { F16_RMS } else { 0.0 };
    Trial {
        label: format!("{case:?}"),
        params: bytemuck::bytes_of(&params).to_vec(),
        step,
        storage,
        grid: grid(&params, rows),
        expected: vec![Expected { rms, ..Expected::close(6, out, tolerance) }],
    }
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    cases().into_iter().map(|case| trial(case, variant.elem == Elem::F16, grid, rng)).collect()
}
