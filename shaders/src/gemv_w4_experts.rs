//! Twin of `gemv_w4_experts.wgsl`; the formula and the mapping are in its header.

use crate::staged::{self, Layout};
use crate::trial::Expected;
use crate::w4::{self, Matrix, Shape};
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0; up to `eps` as in [`gemv_w4::Params`].
    Params {
        /// Outputs of an expert.
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
        /// Elements of a row of out.
        out_stride: u32,
        /// First output column.
        out_offset: u32,
        /// As in [`gemv_w4::Params`], without bias, accumulation and staging.
        flags: u32,
        /// Added to the mean of squares under [`crate::FLAG_NORM`].
        eps: f32,
        /// Experts of a token.
        top_k: u32,
        /// 1 if the experts of a token share its input row.
        shared_input: u32,
        /// Elements of a row of routes.
        routes_stride: u32,
        /// First expert of this part.
        first_expert: u32,
        /// Experts of this part.
        experts: u32,
        /// Rows from one expert to the next; a multiple of 32.
        expert_rows: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemv_w4_experts",
    body: include_str!("gemv_w4_experts.wgsl"),
    preludes: &[
        Prelude::Step,
        Prelude::W4,
        Prelude::Elem,
        Prelude::Stage,
        Prelude::GemvW4Chunk,
        Prelude::GemvW4,
        Prelude::GemvW4One,
    ],
    constants: &[("WG", WG)],
    sizes: gemv_w4::SIZES,
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` tokens.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    crate::grid(params.n.div_ceil(w4::TILE_N as u32), rows * params.top_k)
}

/// As [`gemv_w4::cost`] for every expert of every token.
pub fn cost(params: &Params, rows: u32) -> Cost {
    w4::cost(params.n, params.k, params.groups, rows * params.top_k)
}

/// A shape of a mixture.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Outputs of an expert.
    pub n: u32,
    /// Inputs.
    pub k: u32,
    /// Inputs of a group; not read for dense experts.
    pub group_size: u32,
    /// Experts of the layer.
    pub experts: u32,
    /// First expert of the part, and number.
    pub part: (u32, u32),
    /// Experts of a token.
    pub top_k: u32,
    /// Tokens of the step.
    pub tokens: u32,
    /// Whether the experts of a token share its input row.
    pub shared_input: bool,
    /// Flags.
    pub flags: u32,
}

/// Ragged outputs, parts that hold some experts, both kinds of input, several groups.
pub fn cases() -> Vec<Case> {
    let case = |n, k, group_size, experts, part, top_k, tokens, shared_input, flags| Case {
        n,
        k,
        group_size,
        experts,
        part,
        top_k,
        tokens,
        shared_input,
        flags,
    };
    vec![
        case(1, 8, 8, 1, (0, 1), 1, 1, true, 0),
        case(70, 64, 32, 4, (0, 4), 2, 3, true, FLAG_NORM),
        case(33, 72, 24, 5, (1, 3), 3, 2, false, FLAG_OFFSET_IS_BIAS),
        case(64, 256, 128, 8, (4, 4), 2, 4, false, 0),
    ]
}

fn trial(case: Case, variant: Variant, rng: &mut Rng) -> Trial {
    let Case { n, k, group_size, experts, part: (first_expert, here), top_k, tokens, shared_input, flags } = case;
    let expert_rows = n.next_multiple_of(w4::TILE_N as u32);
    let shape = Shape { n: (here * expert_rows) as usize, k: k as usize, group_size: group_size as usize };
    let matrix = Matrix::random(shape, flags, rng);
    let params = Params {
        n,
        k,
        chunks: shape.chunks() as u32,
        group_size,
        group_shift: gemv_w4::group_shift(group_size, k),
        groups: shape.groups() as u32,
        out_stride: n + 3,
        out_offset: 2,
        flags: flags & !(FLAG_OFFSET_IS_BIAS | FLAG_SUMS) | matrix.flags,
        eps: 1e-5,
        top_k,
        shared_input: u32::from(shared_input),
        routes_stride: 2 * top_k + 1,
        first_expert,
        experts: here,
        expert_rows,
    };
    let step = Step { n_tokens: tokens, ..Step::default() };
    let pairs = tokens * top_k;
    let inputs = if shared_input { tokens } else { pairs };
    let x: Vec<Vec<f32>> = (0..inputs).map(|_| rng.activations(k as usize)).collect();
    let norm = staged::random_norm(k as usize, rng);
    let factors = (flags & FLAG_NORM != 0).then_some(norm.as_slice());
    let layout = Layout { k: k as usize, elem: variant.elem };
    let staged: Vec<u32> = x.iter().flat_map(|x| layout.stage(x, factors)).collect();
    let routes = group::random_routes(experts, top_k, tokens, params.routes_stride, rng);
    let mut out = trial::poisoned((pairs * params.out_stride) as usize);
    let storage = vec![staged, matrix.words.clone(), matrix.params.clone(), trial::words(&routes), trial::words(&out)];
    let mut tolerance = vec![0.0; out.len()];
    for pair in 0..pairs {
        let route = (pair / top_k * params.routes_stride + top_k + pair % top_k) as usize;
        let Some(expert) = (routes[route] as u32).checked_sub(first_expert).filter(|expert| *expert < here) else {
            continue;
        };
        let row = if shared_input { pair / top_k } else { pair };
        let x = gemv_w4::input(params.flags, params.eps, &x[row as usize], &norm);
        for i in 0..n {
            let weights = (expert * expert_rows + i) as usize;
            let at = (pair * params.out_stride + params.out_offset + i) as usize;
            out[at] = matrix.product(weights, &x) as f32;
            tolerance[at] = matrix.tolerance(weights, &x, variant.elem == Elem::F16) + 1e-6 * (out[at].abs() + 20.0);
        }
    }
    Trial {
        label: format!("{case:?}"),
        params: bytemuck::bytes_of(&params).to_vec(),
        step,
        storage,
        grid: grid(&params, tokens),
        expected: vec![Expected::close(6, out, tolerance)],
    }
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let fits = |case: &Case| Groups::of(case.group_size, case.k) <= variant.groups;
    cases().into_iter().filter(fits).map(|case| trial(case, variant, rng)).collect()
}
