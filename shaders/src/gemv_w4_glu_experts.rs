//! Twin of `gemv_w4_glu_experts.wgsl`; the formula and the mapping are in its header.

use crate::gemv_w4_experts::Case;
use crate::staged::{self, Layout};
use crate::w4::{self, Matrix, Shape};
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0; as in [`gemv_w4_experts::Params`], for gate and up together.
    Params {
        /// Outputs of gate and up of an expert.
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
        /// As in [`gemv_w4_experts::Params`].
        flags: u32,
        /// Added to the mean of squares under [`crate::FLAG_NORM`].
        eps: f32,
        /// Quads of a row of staged outputs.
        stage_quads: u32,
        /// [`crate::Activation`].
        activation: u32,
        /// Experts of a token.
        top_k: u32,
        /// Elements of a row of routes.
        routes_stride: u32,
        /// First expert of this part.
        first_expert: u32,
        /// Experts of this part.
        experts: u32,
        /// Rows from one expert to the next; a multiple of 32.
        expert_rows: u32,
        /// Unused.
        pad: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemv_w4_glu_experts",
    body: include_str!("gemv_w4_glu_experts.wgsl"),
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
        Prelude::Activation,
    ],
    constants: &[("WG", WG)],
    sizes: gemv_w4::SIZES,
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` tokens.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    crate::grid((params.n / 2).div_ceil(32), rows * params.top_k)
}

/// As [`gemv_w4::cost`] for every expert of every token.
pub fn cost(params: &Params, rows: u32) -> Cost {
    w4::cost(params.n, params.k, params.groups, rows * params.top_k)
}

/// Ragged widths, groups that cut a chunk, several experts and rows.
pub fn cases() -> Vec<(Case, Activation)> {
    let case = |n, k, group_size, experts, top_k, tokens, flags| Case {
        n,
        k,
        group_size,
        experts,
        part: (0, experts),
        top_k,
        tokens,
        shared_input: true,
        flags,
    };
    vec![
        (case(2, 8, 8, 1, 1, 1, 0), Activation::Silu),
        (case(70, 64, 32, 4, 2, 3, FLAG_NORM), Activation::Silu),
        (case(14, 72, 24, 3, 2, 2, FLAG_OFFSET_IS_BIAS), Activation::GeluTanh),
        (case(66, 256, 128, 5, 3, 1, FLAG_SUMS), Activation::Silu),
    ]
}

fn trial((case, activation): (Case, Activation), variant: Variant, rng: &mut Rng) -> Trial {
    let Case { n, k, group_size, experts, top_k, tokens, flags, .. } = case;
    let width = (n / 2) as usize;
    let expert_rows = n.next_multiple_of(w4::TILE_N as u32);
    let shape = Shape { n: (experts * expert_rows) as usize, k: k as usize, group_size: group_size as usize };
    let matrix = Matrix::random(shape, flags, rng);
    let out = Layout { k: width, elem: variant.elem };
    let params = Params {
        n,
        k,
        chunks: shape.chunks() as u32,
        group_size,
        group_shift: gemv_w4::group_shift(group_size, k),
        groups: shape.groups() as u32,
        flags: flags & !(FLAG_OFFSET_IS_BIAS | FLAG_SUMS) | matrix.flags,
        eps: 1e-5,
        stage_quads: out.quads() as u32,
        activation: activation as u32,
        top_k,
        routes_stride: 2 * top_k,
        first_expert: 0,
        experts,
        expert_rows,
        pad: 0,
    };
    // Gates of some tens, not thousands: beyond that an activation is the identity or zero.
    let x: Vec<Vec<f32>> =
        (0..tokens).map(|_| rng.activations(k as usize).iter().map(|v| v * 0.05).collect()).collect();
    let norm = staged::random_norm(k as usize, rng);
    let factors = (flags & FLAG_NORM != 0).then_some(norm.as_slice());
    let layout = Layout { k: k as usize, elem: variant.elem };
    let staged: Vec<u32> = x.iter().flat_map(|x| layout.stage(x, factors)).collect();
    let routes = group::random_routes(experts, top_k, tokens, params.routes_stride, rng);
    let pairs = tokens * top_k;
    let storage =
        vec![staged, matrix.words.clone(), matrix.params.clone(), trial::words(&routes), out.empty(pairs as usize)];
    let mut expected = Vec::new();
    for pair in 0..pairs {
        let x = gemv_w4::input(params.flags, params.eps, &x[(pair / top_k) as usize], &norm);
        let expert = routes[(pair / top_k * params.routes_stride + top_k + pair % top_k) as usize] as usize;
        let first = expert * expert_rows as usize;
        let mut error = 0.0_f32;
        let values: Vec<f32> = (0..width)
            .map(|i| {
                let rows = [first + i, first + width + i];
                let [gate, up] = rows.map(|row| matrix.product(row, &x));
                let value = (activation.of(gate) * up) as f32;
                let [gate, up] = [gate.abs() as f32, up.abs() as f32];
                let [gate_off, up_off] =
                    rows.map(|row| matrix.tolerance(row, &x, variant.elem == Elem::F16) + 1e-6 * (gate + up + 20.0));
                // As in gemv_w4_swiglu.
                error = error.max(1.2 * gate_off * (up + up_off) + up_off * (gate + 0.3) + 1e-5 * value.abs());
                value
            })
            .collect();
        expected.extend(out.expected(6, pair as usize, &values, None, error));
    }
    Trial {
        label: format!("{case:?}, {activation:?}"),
        params: bytemuck::bytes_of(&params).to_vec(),
        step: Step { n_tokens: tokens, ..Step::default() },
        storage,
        grid: grid(&params, tokens),
        expected,
    }
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let fits = |case: &(Case, Activation)| Groups::of(case.0.group_size, case.0.k) <= variant.groups;
    cases().into_iter().filter(fits).map(|case| trial(case, variant, rng)).collect()
}
