//! Twin of `silu_mul.wgsl`; the formula and the mapping are in its header.

use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0.
    Params {
        /// Elements of a row of the result.
        width: u32,
        /// Elements of a row of x.
        x_stride: u32,
        /// Elements of a row of out.
        out_stride: u32,
        /// Unused.
        pad: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "silu_mul",
    body: include_str!("silu_mul.wgsl"),
    preludes: &[Prelude::Step],
    constants: &[("WG", WG)],
    params: Params::FIELDS,
    trials: |_, _| Vec::new(),
};

/// Dispatch for `rows` tokens.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    [params.width.div_ceil(WG), 1, rows]
}
