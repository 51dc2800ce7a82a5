//! Twin of `gemm_dense.wgsl`; the formula and the mapping are in its header.

use crate::*;

pub use crate::gemv_dense::Params;

/// Invocations of a workgroup.
pub const WG: u32 = 256;
/// Rows and outputs of a workgroup.
pub const TILE: u32 = 64;
/// Inputs held in workgroup memory.
pub const K_STEP: u32 = 32;

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemm_dense",
    body: include_str!("gemm_dense.wgsl"),
    preludes: &[
        Prelude::Step,
        Prelude::Dense,
        Prelude::Weights8,
        Prelude::Weights8Dense,
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

pub use crate::gemv_dense::{Case, cost, reference};

/// Ragged tiles in every direction, all flags and row modes.
pub fn cases() -> Vec<Case> {
    let case = |n, k, tokens, row_mode, flags| Case { n, k, tokens, row_mode, flags };
    vec![
        case(1, 1, 1, RowMode::All, 0),
        case(65, 13, 66, RowMode::All, FLAG_BIAS),
        case(64, 64, 64, RowMode::Compacted, FLAG_ACCUMULATE),
        case(30, 133, 21, RowMode::Logits, FLAG_ACCUMULATE | FLAG_BIAS),
    ]
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    cases().into_iter().map(|case| crate::gemv_dense::trial(case, variant.dense, grid, rng)).collect()
}
