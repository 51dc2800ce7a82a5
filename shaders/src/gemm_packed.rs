//! Twin of `gemm_packed.wgsl`; the formula and the mapping are in its header.

use crate::*;

use crate::gemv_packed::ROUNDED;
pub use crate::gemv_packed::{Case, Params, cost, reference};

/// Invocations of a workgroup.
pub const WG: u32 = 256;
/// Rows and outputs of a workgroup.
pub const TILE: u32 = 64;
/// Inputs held in workgroup memory.
pub const K_STEP: u32 = 32;

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemm_packed",
    body: include_str!("gemm_packed.wgsl"),
    preludes: &[Prelude::Step, Prelude::Weights8, Prelude::Packed, Prelude::Elem, Prelude::Gemm, Prelude::GemmRows],
    constants: &[("WG", WG), ("TILE", TILE), ("K_STEP", K_STEP)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` input rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    crate::grid(params.n.div_ceil(TILE), rows.div_ceil(TILE))
}

/// Ragged tiles in every direction, short last groups, all flags and row modes.
pub fn cases() -> Vec<Case> {
    let all = RowMode::All;
    let case = |n, k, group_size, tokens, row_mode, flags| Case { n, k, group_size, tokens, row_mode, flags };
    vec![
        case(1, 8, 8, 1, all, 0),
        case(65, 13, 16, 66, all, FLAG_BIAS | FLAG_WIDE),
        case(64, 64, 64, 64, RowMode::Compacted, FLAG_ACCUMULATE | FLAG_OFFSET_IS_BIAS),
        case(30, 512, 32, 21, RowMode::Logits, FLAG_ACCUMULATE | FLAG_BIAS | ROUNDED),
        case(70, 256, 256, 5, all, 0),
    ]
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let fits = |case: &Case| packed::fits(variant.packed, case.k, case.group_size);
    let f16 = variant.elem == Elem::F16;
    cases().into_iter().filter(fits).map(|case| gemv_packed::trial(case, variant, grid, f16, rng)).collect()
}
