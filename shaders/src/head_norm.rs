//! Twin of `head_norm.wgsl`; the formula and the mapping are in its header.

use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 64;

params! {
    /// Uniform at binding 0.
    Params {
        /// Elements of a segment.
        dim: u32,
        /// Segments of a row.
        segments: u32,
        /// Elements of a row of x.
        stride: u32,
        /// First column of the first segment.
        offset: u32,
        /// Added to the mean of squares.
        eps: f32,
        /// Unused.
        pad: [u32; 3],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "head_norm",
    body: include_str!("head_norm.wgsl"),
    preludes: &[Prelude::Step, Prelude::Reduce],
    constants: &[("WG", WG)],
    params: Params::FIELDS,
    trials: |_, _| Vec::new(),
};

/// Dispatch for `rows` rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    [params.segments, 1, rows]
}
