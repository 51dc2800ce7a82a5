//! Twin of `gemv_w4_rows_coop.wgsl`; the formula and the mapping are in its header.

use crate::gemv_w4::Case;
use crate::*;

pub use crate::gemv_w4_rows::{Params, cost};

/// Invocations of a workgroup.
pub const WG: u32 = 256;
/// Rows of a workgroup.
pub const ROWS: u32 = 16;
/// Outputs of a workgroup, or pairs of them with [`crate::FLAG_GLU`].
pub const WIDTH: u32 = 32;

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemv_w4_rows_coop",
    body: include_str!("gemv_w4_rows_coop.wgsl"),
    preludes: &[
        Prelude::Step,
        Prelude::W4,
        Prelude::Elem,
        Prelude::Coop,
        Prelude::CoopRows,
        Prelude::CoopWeights,
        Prelude::Stage,
        Prelude::StageEight,
        Prelude::Activation,
    ],
    constants: &[("WG", WG), ("ROWS", ROWS)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Whether the kernel takes groups of this size: a power of two of whole chunks, or rows.
pub fn handles(group_size: u32, k: u32) -> bool {
    gemv_w4::group_shift(group_size, k) != 0
}

/// Dispatch for `rows` input rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    let width = if params.flags & FLAG_GLU != 0 { params.n / 2 } else { params.n };
    crate::grid(width.div_ceil(WIDTH) * rows.div_ceil(ROWS), 1)
}

/// Those of [`gemv_w4_rows`] that it takes, and more rows.
pub fn cases() -> Vec<Case> {
    let all = RowMode::All;
    let case = |n, k, group_size, tokens, row_mode, flags| Case { n, k, group_size, tokens, row_mode, flags };
    let mut cases: Vec<_> = gemv_w4_rows::cases().into_iter().filter(|case| handles(case.group_size, case.k)).collect();
    cases.extend([
        case(70, 640, 64, 13, all, FLAG_NORM | FLAG_STAGE | FLAG_STAGE_NORM | FLAG_BIAS | FLAG_ACCUMULATE),
        case(96, 4352, 128, 16, all, FLAG_NORM | FLAG_ACCUMULATE | FLAG_STAGE),
        case(33, 320, 32, 35, RowMode::Logits, FLAG_SUMS | FLAG_BIAS),
    ]);
    cases
}

/// Those of [`gemv_w4_rows`] that it takes, with more rows.
pub fn glu_cases() -> Vec<Case> {
    let mut cases = gemv_w4_rows::glu_cases();
    cases.retain(|case| handles(case.group_size, case.k));
    for (case, tokens) in cases.iter_mut().zip([9, 3, 16, 19]) {
        case.tokens = tokens;
    }
    cases
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    // Group sizes that the kernel takes need no more than the variant that takes all.
    let variant = Variant { groups: Groups::Any, ..KERNEL.canonical(variant) };
    gemv_w4_rows::trials_of(cases(), glu_cases(), grid, variant, rng)
}
