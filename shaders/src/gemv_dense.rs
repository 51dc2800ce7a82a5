//! Twin of `gemv_dense.wgsl`; the formula and the mapping are in its header.

use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 128;
/// Outputs of a workgroup.
pub const ROWS: u32 = 4;

params! {
    /// Uniform at binding 0.
    Params {
        /// Outputs of this part.
        n: u32,
        /// Inputs.
        k: u32,
        /// Words of a row of `weight`, a multiple of 4; the padding must hold finite numbers (zeros).
        row_words: u32,
        /// Elements of a row of x; a multiple of 4.
        x_stride: u32,
        /// Elements of a row of out.
        out_stride: u32,
        /// First output column of this part.
        out_offset: u32,
        /// First element of the bias of these outputs.
        bias_offset: u32,
        /// Bits [`crate::FLAG_ACCUMULATE`], [`crate::FLAG_BIAS`].
        flags: u32,
        /// [`crate::RowMode`].
        row_mode: u32,
        /// Unused.
        pad: [u32; 3],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemv_dense",
    body: include_str!("gemv_dense.wgsl"),
    preludes: &[Prelude::Step, Prelude::Dense, Prelude::Reduce],
    constants: &[("WG", WG), ("ROWS", ROWS), ("FLAG_ACCUMULATE", FLAG_ACCUMULATE), ("FLAG_BIAS", FLAG_BIAS)],
    params: Params::FIELDS,
    trials: |_, _| Vec::new(),
};

/// Dispatch for `rows` input rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    crate::grid(params.n.div_ceil(ROWS), rows)
}
