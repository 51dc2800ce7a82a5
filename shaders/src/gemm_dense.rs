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
    preludes: &[Prelude::Step, Prelude::Dense, Prelude::Gemm],
    constants: &[
        ("WG", WG),
        ("TILE", TILE),
        ("K_STEP", K_STEP),
        ("FLAG_ACCUMULATE", FLAG_ACCUMULATE),
        ("FLAG_BIAS", FLAG_BIAS),
    ],
    params: Params::FIELDS,
    trials: |_, _| Vec::new(),
};

/// Dispatch for `rows` input rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    crate::grid(params.n.div_ceil(TILE), rows.div_ceil(TILE))
}
