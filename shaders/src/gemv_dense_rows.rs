//! Twin of `gemv_dense_rows.wgsl`; the formula and the mapping are in its header.

use crate::*;

pub use crate::gemv_dense::{Case, Params, WG, cost, reference};

/// Outputs, and rows of x, of a workgroup.
pub const ROWS: u32 = 4;

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemv_dense_rows",
    body: include_str!("gemv_dense_rows.wgsl"),
    preludes: &[Prelude::Step, Prelude::Dense, Prelude::GemvDense, Prelude::Reduce],
    constants: &[("WG", WG), ("ROWS", ROWS)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` input rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    crate::grid(params.n.div_ceil(ROWS) * rows.div_ceil(ROWS), 1)
}

/// Ragged outputs, inputs and rows, all flags and row modes.
pub fn cases() -> Vec<Case> {
    let case = |n, k, tokens, row_mode, flags| Case { n, k, tokens, row_mode, flags };
    vec![
        case(1, 1, 1, RowMode::All, 0),
        case(5, 13, 2, RowMode::All, FLAG_BIAS),
        case(6, 67, 9, RowMode::Compacted, FLAG_ACCUMULATE),
        case(11, 2050, 15, RowMode::Logits, FLAG_ACCUMULATE | FLAG_BIAS),
    ]
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    cases().into_iter().map(|case| gemv_dense::trial(case, variant.dense, grid, rng)).collect()
}
