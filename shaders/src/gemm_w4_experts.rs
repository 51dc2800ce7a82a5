//! Twin of `gemm_w4_experts.wgsl`; the formula and the mapping are in its header.

use crate::gemv_w4_experts::Case;
use crate::trial::Expected;
use crate::w4::{self, Matrix, Shape};
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = gemm_w4::WG;
/// Pairs and outputs of a workgroup.
pub const TILE: u32 = gemm_w4::TILE;
/// Inputs held in workgroup memory.
pub const K_STEP: u32 = gemm_w4::K_STEP;

params! {
    /// Uniform at binding 0.
    Params {
        /// Outputs of an expert.
        n: u32,
        /// Inputs; a multiple of 8.
        k: u32,
        /// Chunks of 32 inputs, the last one padded.
        chunks: u32,
        /// Inputs of a group.
        group_size: u32,
        /// Groups of a row.
        groups: u32,
        /// Elements of a row of x; a multiple of 4.
        x_stride: u32,
        /// Elements of a row of out.
        out_stride: u32,
        /// First output column.
        out_offset: u32,
        /// Not read.
        bias_offset: u32,
        /// Bits [`crate::FLAG_OFFSET_IS_BIAS`], [`crate::FLAG_SUMS`].
        flags: u32,
        /// Experts of a token.
        top_k: u32,
        /// 1 if the experts of a token share its input row.
        shared_input: u32,
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
    name: "gemm_w4_experts",
    body: include_str!("gemm_w4_experts.wgsl"),
    preludes: &[
        Prelude::Step,
        Prelude::W4,
        Prelude::Elem,
        Prelude::Weights8,
        Prelude::Weights8W4,
        Prelude::Gemm,
        Prelude::GemmPairs,
    ],
    constants: &[("WG", WG), ("TILE", TILE), ("K_STEP", K_STEP)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `tiles` tiles of pairs.
pub fn grid(n: u32, tiles: u32) -> [u32; 3] {
    crate::grid(n.div_ceil(TILE), tiles)
}

/// As [`gemm_w4::cost`] for every expert of every token.
pub fn cost(params: &Params, rows: u32) -> Cost {
    w4::cost(params.n, params.k, params.groups, rows * params.top_k)
}

/// Routes, pairs and tiles of a case, and what the product of pair `pair` with its expert of the part is.
pub(crate) struct Pairs {
    pub(crate) pairs: Vec<u32>,
    pub(crate) tiles: Vec<u32>,
    pub(crate) tiles_max: u32,
    /// By pair: input row and expert within the part.
    pub(crate) of: Vec<(usize, Option<u32>)>,
}

impl Pairs {
    pub(crate) fn random(case: Case, rng: &mut Rng) -> Self {
        let Case { experts, part: (first, here), top_k, tokens, shared_input, .. } = case;
        let tiles_max = group::tiles(experts, top_k, tokens) + 1;
        let grouping = group::Params { experts, top_k, routes_stride: 2 * top_k, tiles_max };
        let routes = group::random_routes(experts, top_k, tokens, 2 * top_k, rng);
        let mut pairs = vec![0; (tokens * top_k) as usize];
        let mut tiles = vec![[0; 4]; tiles_max as usize];
        let step = Step { n_tokens: tokens, ..Step::default() };
        group::reference(&grouping, &step, &routes, &mut pairs, &mut tiles);
        let of = (0..tokens * top_k).map(|pair| {
            let number = routes[(pair / top_k * 2 * top_k + top_k + pair % top_k) as usize] as u32;
            let row = if shared_input { pair / top_k } else { pair };
            (row as usize, number.checked_sub(first).filter(|expert| *expert < here))
        });
        Self { pairs, tiles: tiles.into_flattened(), tiles_max, of: of.collect() }
    }
}

/// Ragged tiles in every direction, parts that hold some experts, both kinds of input, several tiles of an expert.
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
        case(70, 64, 32, 4, (0, 4), 2, 40, true, 0),
        case(33, 72, 24, 5, (1, 3), 3, 20, false, FLAG_OFFSET_IS_BIAS),
        case(64, 256, 128, 3, (1, 2), 2, 150, false, FLAG_SUMS),
    ]
}

fn trial(case: Case, variant: Variant, rng: &mut Rng) -> Trial {
    let Case { n, k, group_size, part: (first_expert, here), top_k, tokens, shared_input, flags, .. } = case;
    let expert_rows = n.next_multiple_of(w4::TILE_N as u32);
    let shape = Shape { n: (here * expert_rows) as usize, k: k as usize, group_size: group_size as usize };
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
        bias_offset: 0,
        flags: matrix.flags,
        top_k,
        shared_input: u32::from(shared_input),
        first_expert,
        experts: here,
        expert_rows,
        pad: 0,
    };
    let pairs = Pairs::random(case, rng);
    let inputs = if shared_input { tokens } else { tokens * top_k };
    let x = rng.activations((inputs * params.x_stride) as usize);
    let mut out = trial::poisoned((tokens * top_k * params.out_stride) as usize);
    let storage = vec![
        trial::words(&x),
        matrix.words.clone(),
        matrix.params.clone(),
        vec![0],
        trial::words(&out),
        pairs.pairs.clone(),
        pairs.tiles.clone(),
    ];
    let mut tolerance = vec![0.0; out.len()];
    for (pair, (row, expert)) in pairs.of.iter().enumerate() {
        let Some(expert) = expert else { continue };
        let x = &x[row * params.x_stride as usize..][..k as usize];
        for i in 0..n as usize {
            let weights = (expert * expert_rows) as usize + i;
            let at = pair * params.out_stride as usize + params.out_offset as usize + i;
            out[at] = matrix.product(weights, x) as f32;
            tolerance[at] = matrix.tolerance(weights, x, variant.elem == Elem::F16) + 1e-6 * (out[at].abs() + 20.0);
        }
    }
    Trial {
        label: format!("{case:?}"),
        params: bytemuck::bytes_of(&params).to_vec(),
        step: Step { n_tokens: tokens, ..Step::default() },
        storage,
        grid: grid(n, pairs.tiles_max),
        expected: vec![Expected::close(6, out, tolerance)],
    }
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    cases().into_iter().map(|case| trial(case, variant, rng)).collect()
}
