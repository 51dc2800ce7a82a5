//! Twin of `gemv_w4_swiglu.wgsl`; the formula and the mapping are in its header.

use crate::gemv_w4::{Case, Data};
use crate::staged::Layout;
use crate::w4;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0; up to `eps` as in [`gemv_w4::Params`].
    Params {
        /// Outputs of gate and up together.
        n: u32,
        /// Inputs; a multiple of 8.
        k: u32,
        /// Chunks of 32 inputs, the last one padded.
        chunks: u32,
        /// Inputs of a group.
        group_size: u32,
        /// [`gemv_w4::group_shift`] of the group size.
        group_shift: u32,
        /// Groups of a row.
        groups: u32,
        /// Not read.
        out_stride: u32,
        /// Not read.
        out_offset: u32,
        /// First element of the bias.
        bias_offset: u32,
        /// As in [`gemv_w4::Params`], without accumulation and staging: the output is always staged.
        flags: u32,
        /// [`crate::RowMode`].
        row_mode: u32,
        /// Added to the mean of squares under [`crate::FLAG_NORM`].
        eps: f32,
        /// Quads of a row of staged outputs.
        stage_quads: u32,
        /// [`crate::Activation`].
        activation: u32,
        /// Unused.
        pad: [u32; 2],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemv_w4_swiglu",
    body: include_str!("gemv_w4_swiglu.wgsl"),
    preludes: &[
        Prelude::Step,
        Prelude::W4,
        Prelude::Elem,
        Prelude::Stage,
        Prelude::StageEight,
        Prelude::StageOut,
        Prelude::GemvW4Chunk,
        Prelude::GemvW4,
        Prelude::GemvW4Pair,
        Prelude::Activation,
    ],
    constants: &[("WG", WG)],
    sizes: gemv_w4::SIZES,
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` input rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    crate::grid((params.n / 2).div_ceil(32), rows)
}

/// As [`gemv_w4::cost`].
pub fn cost(params: &Params, rows: u32) -> Cost {
    w4::cost(params.n, params.k, params.groups, rows)
}

/// Gate and up of output `i` for the input `x` of the matrix, in f64.
fn gate_up(data: &Data, x: &[f32], i: usize) -> [f64; 2] {
    let width = data.params.n as usize / 2;
    let bias = &data.bias[data.params.bias_offset as usize..];
    [i, width + i].map(|n| data.matrix.product(n, x) + w4::bias_of(data.params.flags, bias, n))
}

/// Ragged widths, groups that cut a chunk, several rows, many inputs.
pub fn cases() -> Vec<Case> {
    let all = RowMode::All;
    let case = |n, k, group_size, tokens, flags| Case { n, k, group_size, tokens, row_mode: all, flags };
    vec![
        case(2, 8, 8, 1, 0),
        case(70, 64, 32, 3, FLAG_BIAS | FLAG_NORM),
        case(14, 72, 24, 2, FLAG_OFFSET_IS_BIAS),
        case(66, 4352, 128, 1, FLAG_NORM),
        case(10, 4224, 64, 1, FLAG_NORM | FLAG_SUMS),
    ]
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    trials_of(cases(), variant, rng)
}

/// Random runs of those cases that fit the variant; shared with the kernel for several rows.
pub(crate) fn trials_of(cases: Vec<Case>, variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let f16 = variant.elem == Elem::F16;
    let one = |(case, activation): (Case, Activation), rng: &mut Rng| {
        let width = (case.n / 2) as usize;
        // Gates of some tens, not thousands: beyond that silu is the identity or zero.
        let data = Data::random(case, width as u32, 0.05, variant.elem, rng);
        let shared = data.params;
        let params = Params {
            n: shared.n,
            k: shared.k,
            chunks: shared.chunks,
            group_size: shared.group_size,
            group_shift: shared.group_shift,
            groups: shared.groups,
            bias_offset: shared.bias_offset,
            flags: shared.flags,
            row_mode: shared.row_mode,
            eps: shared.eps,
            stage_quads: shared.stage_quads,
            activation: activation as u32,
            ..Params::default()
        };
        let layout = Layout { k: width, elem: variant.elem };
        let mut storage = data.storage();
        storage.push(trial::words(&data.bias));
        storage.push(layout.empty(data.rows as usize));
        let mut expected = Vec::new();
        for row in 0..data.rows {
            let x = data.input(row);
            let mut error = 0.0_f32;
            let out: Vec<f32> = (0..width)
                .map(|i| {
                    let [gate, up] = gate_up(&data, &x, i);
                    let value = (activation.of(gate) * up) as f32;
                    let [gate, up] = [gate.abs() as f32, up.abs() as f32];
                    let [gate_off, up_off] =
                        [i, width + i].map(|n| data.matrix.tolerance(n, &x, f16) + 1e-6 * (gate + up + 20.0));
                    // An activation is at most |v| + 0.3 and changes at most 1.2 times as fast as its argument.
                    error = error.max(1.2 * gate_off * (up + up_off) + up_off * (gate + 0.3) + 1e-5 * value.abs());
                    value
                })
                .collect();
            expected.extend(layout.expected(6, row as usize, &out, None, error));
        }
        Trial {
            label: format!("{case:?}, {activation:?}"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step: data.step,
            storage,
            grid: grid(&params, data.rows),
            expected,
        }
    };
    let fits = |case: &Case| Groups::of(case.group_size, case.k) <= variant.groups;
    let activations = [Activation::Silu, Activation::GeluTanh, Activation::Gelu].into_iter().cycle();
    cases.into_iter().zip(activations).filter(|(case, _)| fits(case)).map(|case| one(case, rng)).collect()
}
