//! Twin of `gemv_w4.wgsl`; the formula and the mapping are in its header.

use crate::staged::{self, Layout};
use crate::trial::Expected;
use crate::w4::{self, Matrix, Shape};
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;
/// The same in the larger sizes: more slices of K, for few outputs.
pub const SIZES: &[Constants] = &[&[("WG", 512)], &[("WG", 1024)]];

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
        /// [`group_shift`] of the group size.
        group_shift: u32,
        /// Groups of a row.
        groups: u32,
        /// Elements of a row of out.
        out_stride: u32,
        /// First output column of this part.
        out_offset: u32,
        /// First element of the bias of these outputs.
        bias_offset: u32,
        /// Bits [`crate::FLAG_ACCUMULATE`], [`crate::FLAG_BIAS`], [`crate::FLAG_OFFSET_IS_BIAS`], [`crate::FLAG_SUMS`],
        /// [`crate::FLAG_NORM`], [`crate::FLAG_STAGE`], [`crate::FLAG_STAGE_NORM`].
        flags: u32,
        /// [`crate::RowMode`].
        row_mode: u32,
        /// Added to the mean of squares under [`crate::FLAG_NORM`].
        eps: f32,
        /// First element of the norm weights of these outputs.
        norm_offset: u32,
        /// Quads of a row of staged outputs.
        stage_quads: u32,
        /// Unused.
        pad: [u32; 2],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemv_w4",
    body: include_str!("gemv_w4.wgsl"),
    preludes: &[
        Prelude::Step,
        Prelude::W4,
        Prelude::Elem,
        Prelude::Stage,
        Prelude::StageEight,
        Prelude::StageOut,
        Prelude::GemvW4Chunk,
        Prelude::GemvW4,
        Prelude::GemvW4One,
    ],
    constants: &[("WG", WG)],
    sizes: SIZES,
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` input rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    crate::grid(params.n.div_ceil(w4::TILE_N as u32), rows)
}

/// Binary logarithm of a group size of whole chunks, 31 for groups as long as a row, 0 for other sizes.
pub fn group_shift(group_size: u32, k: u32) -> u32 {
    match group_size {
        _ if group_size == k => 31,
        32.. if group_size.is_power_of_two() => group_size.ilog2(),
        _ => 0,
    }
}

/// out = norm(x) W^T (+ bias) (+ out) in f64; `norm` are the weights that x was staged with.
pub fn reference(params: &Params, step: &Step, x: &[Vec<f32>], matrix: &Matrix, data: &Vectors<'_>, out: &mut [f32]) {
    let mode = RowMode::from_u32(params.row_mode);
    for row in 0..mode.count(step) {
        let x = input(params.flags, params.eps, &x[mode.input_row(step, row) as usize], data.norm);
        for n in 0..params.n as usize {
            let bias = w4::bias_of(params.flags, &data.bias[params.bias_offset as usize..], n);
            let mut sum = matrix.product(n, &x) + bias;
            let index = (row * params.out_stride + params.out_offset) as usize + n;
            if params.flags & FLAG_ACCUMULATE != 0 {
                sum += f64::from(out[index]);
            }
            out[index] = sum as f32;
        }
    }
}

/// What goes with a matrix.
#[derive(Debug, Clone, Copy)]
pub struct Vectors<'a> {
    /// Biases, from `bias_offset` on.
    pub bias: &'a [f32],
    /// Weights of the norm in front of the matrix.
    pub norm: &'a [f32],
}

/// An input row as the matrix sees it.
pub(crate) fn input(flags: u32, eps: f32, x: &[f32], norm: &[f32]) -> Vec<f32> {
    if flags & FLAG_NORM != 0 { w4::normed(x, norm, eps) } else { x.to_vec() }
}

/// Weights and activations once, two operations a weight and row.
pub fn cost(params: &Params, rows: u32) -> Cost {
    w4::cost(params.n, params.k, params.groups, rows)
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

/// Ragged outputs, one group a row, groups that cut a chunk, all flags and row modes, many inputs.
pub fn cases() -> Vec<Case> {
    let all = RowMode::All;
    let case = |n, k, group_size, tokens, row_mode, flags| Case { n, k, group_size, tokens, row_mode, flags };
    vec![
        case(1, 8, 8, 1, all, 0),
        case(5, 64, 32, 1, all, FLAG_BIAS | FLAG_NORM | FLAG_STAGE),
        case(7, 72, 24, 2, all, FLAG_ACCUMULATE | FLAG_SUMS),
        case(6, 40, 40, 1, all, FLAG_OFFSET_IS_BIAS),
        case(37, 4352, 128, 1, all, FLAG_ACCUMULATE | FLAG_BIAS | FLAG_STAGE | FLAG_STAGE_NORM),
        case(33, 4224, 64, 1, all, FLAG_NORM | FLAG_SUMS),
        case(16, 256, 64, 3, RowMode::Compacted, FLAG_OFFSET_IS_BIAS | FLAG_BIAS),
        case(9, 384, 384, 5, RowMode::Logits, 0),
    ]
}

/// Random data for a case.
pub(crate) struct Data {
    pub(crate) params: Params,
    pub(crate) step: Step,
    pub(crate) rows: u32,
    /// By token.
    pub(crate) x: Vec<Vec<f32>>,
    pub(crate) matrix: Matrix,
    pub(crate) bias: Vec<f32>,
    pub(crate) norm: Vec<f32>,
    elem: Elem,
}

impl Data {
    /// `width` is the number of output columns; inputs are at most `scale` times [`Rng::activations`].
    pub(crate) fn random(case: Case, width: u32, scale: f32, elem: Elem, rng: &mut Rng) -> Self {
        let Case { n, k, group_size, tokens, row_mode, flags } = case;
        let shape = Shape { n: n as usize, k: k as usize, group_size: group_size as usize };
        let matrix = Matrix::random(shape, flags, rng);
        let params = Params {
            n,
            k,
            chunks: shape.chunks() as u32,
            group_size,
            group_shift: group_shift(group_size, k),
            groups: shape.groups() as u32,
            out_stride: width + 3,
            out_offset: 2,
            bias_offset: 3,
            flags: flags & !(FLAG_OFFSET_IS_BIAS | FLAG_SUMS) | matrix.flags,
            row_mode: row_mode as u32,
            eps: 1e-5,
            norm_offset: 3 + n,
            stage_quads: Layout { k: width as usize, elem }.quads() as u32,
            pad: [0; 2],
        };
        let step = Step { n_tokens: tokens, position: 0, logits_start: tokens / 2, logits_rows: tokens - tokens / 2 };
        let x = (0..tokens).map(|_| rng.activations(k as usize).iter().map(|v| v * scale).collect()).collect();
        let bias = rng.values((params.bias_offset + n) as usize, 10.0);
        let norm = staged::random_norm(k as usize, rng);
        Self { params, step, rows: row_mode.count(&step), x, matrix, bias, norm, elem }
    }

    /// Weights of the norm, if there is one.
    pub(crate) fn factors(&self) -> Option<&[f32]> {
        (self.params.flags & FLAG_NORM != 0).then_some(&self.norm)
    }

    /// The first storage buffers: staged inputs, codes, groups.
    pub(crate) fn storage(&self) -> Vec<Vec<u32>> {
        let layout = Layout { k: self.params.k as usize, elem: self.elem };
        let x = self.x.iter().flat_map(|x| layout.stage(x, self.factors())).collect();
        vec![x, self.matrix.words.clone(), self.matrix.params.clone()]
    }

    /// Vectors for the reference.
    pub(crate) fn vectors(&self) -> Vectors<'_> {
        Vectors { bias: &self.bias, norm: &self.norm }
    }

    /// Input of output row `row` as the matrix sees it.
    pub(crate) fn input(&self, row: u32) -> Vec<f32> {
        let mode = RowMode::from_u32(self.params.row_mode);
        input(self.params.flags, self.params.eps, &self.x[mode.input_row(&self.step, row) as usize], &self.norm)
    }
}

/// A random run of a case; shared with the kernel for several rows.
pub(crate) fn trial(case: Case, variant: Variant, rng: &mut Rng) -> Trial {
    let f16 = variant.elem == Elem::F16;
    let data = Data::random(case, case.n, 1.0, variant.elem, rng);
    let Data { params, step, rows, matrix, .. } = &data;
    let n = case.n as usize;
    let mut out = trial::poisoned((rows * params.out_stride) as usize);
    if case.flags & FLAG_ACCUMULATE != 0 {
        for row in out.chunks_mut(params.out_stride as usize) {
            row[2..2 + n].copy_from_slice(&rng.values(n, 10.0));
        }
    }
    let next_norm = staged::random_norm(n, rng);
    let layout = Layout { k: n, elem: variant.elem };
    let mut storage = data.storage();
    storage.push(trial::words(&[data.bias.clone(), next_norm.clone()].concat()));
    storage.push(trial::words(&out));
    storage.push(layout.empty(*rows as usize));

    reference(params, step, &data.x, matrix, &data.vectors(), &mut out);
    let mut tolerance = vec![0.0; out.len()];
    let mut expected = Vec::new();
    for row in 0..*rows {
        let x = data.input(row);
        let at = (row * params.out_stride + params.out_offset) as usize;
        for n in 0..n {
            tolerance[at + n] = matrix.tolerance(n, &x, f16) + 1e-6 * (out[at + n].abs() + 20.0);
        }
        if case.flags & FLAG_STAGE != 0 {
            let error = tolerance[at..at + n].iter().fold(0.0_f32, |m, e| m.max(*e));
            let factors = (case.flags & FLAG_STAGE_NORM != 0).then_some(next_norm.as_slice());
            expected.extend(layout.expected(7, row as usize, &out[at..at + n], factors, error));
        }
    }
    let rms = if f16 && case.k >= 256 { w4::F16_RMS } else { 0.0 };
    expected.push(Expected { rms, ..Expected::close(6, out, tolerance) });
    Trial {
        label: format!("{case:?}"),
        params: bytemuck::bytes_of(params).to_vec(),
        step: *step,
        storage,
        grid: grid(params, *rows),
        expected,
    }
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let fits = |case: &Case| Groups::of(case.group_size, case.k) <= variant.groups;
    cases().into_iter().filter(fits).map(|case| trial(case, variant, rng)).collect()
}
