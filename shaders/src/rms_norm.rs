//! Twin of `rms_norm.wgsl`; the formula and the mapping are in its header.

use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0.
    Params {
        /// Elements normalised together.
        dim: u32,
        /// Elements of a row of x.
        x_stride: u32,
        /// First column of x.
        x_offset: u32,
        /// Elements of a row of out.
        out_stride: u32,
        /// First column of out.
        out_offset: u32,
        /// Added to the mean of squares.
        eps: f32,
        /// [`crate::RowMode`].
        row_mode: u32,
        /// Unused.
        pad: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "rms_norm",
    body: include_str!("rms_norm.wgsl"),
    preludes: &[Prelude::Step, Prelude::Reduce],
    constants: &[("WG", WG)],
    params: Params::FIELDS,
    trials: |_, _| Vec::new(),
};

/// Dispatch for `rows` rows.
pub fn grid(_params: &Params, rows: u32) -> [u32; 3] {
    [1, 1, rows]
}
