//! Twin of `gemm_w4.wgsl`; the formula and the mapping are in its header.

use crate::*;

pub use crate::gemv_w4::Params;

/// Invocations of a workgroup.
pub const WG: u32 = 256;
/// Rows and outputs of a workgroup.
pub const TILE: u32 = 64;
/// Inputs held in workgroup memory.
pub const K_STEP: u32 = 32;

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemm_w4",
    body: include_str!("gemm_w4.wgsl"),
    preludes: &[Prelude::Step, Prelude::W4, Prelude::Elem, Prelude::Gemm],
    constants: &[("WG", WG), ("TILE", TILE), ("K_STEP", K_STEP)],
    large: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` input rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    crate::grid(params.n.div_ceil(TILE), rows.div_ceil(TILE))
}

pub use crate::gemv_w4::{Case, cost, reference};

/// Ragged tiles in every direction, a last K step that is not full, all flags and row modes.
pub fn cases() -> Vec<Case> {
    let all = RowMode::All;
    let case = |n, k, group_size, tokens, row_mode, flags| Case { n, k, group_size, tokens, row_mode, flags };
    vec![
        case(1, 8, 8, 1, all, 0),
        case(64, 64, 32, 64, all, FLAG_BIAS),
        case(70, 72, 24, 67, all, FLAG_ACCUMULATE),
        case(33, 384, 128, 9, all, FLAG_OFFSET_IS_BIAS | FLAG_BIAS),
        case(130, 40, 40, 5, RowMode::Compacted, FLAG_SUMS),
        case(66, 128, 128, 13, RowMode::Logits, FLAG_ACCUMULATE),
    ]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    // Products are f32 in both variants, and f16 weights are the reference's.
    cases().into_iter().map(|case| without_norm(crate::gemv_w4::trial(case, false, grid, rng))).collect()
}

/// The trial of a kernel that has no binding for a norm.
pub(crate) fn without_norm(mut trial: Trial) -> Trial {
    // Storage bindings start at 2: 6 was the norm, 7 the output.
    trial.storage.remove(6 - 2);
    trial.expected.iter_mut().for_each(|expected| expected.binding -= 1);
    trial
}
