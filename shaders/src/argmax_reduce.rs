//! Twin of `argmax_reduce.wgsl`; the formula and the mapping are in its header.

use crate::*;

/// Invocations of the workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0.
    Params {
        /// Candidates.
        n: u32,
        /// Unused.
        pad: [u32; 3],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "argmax_reduce",
    body: include_str!("argmax_reduce.wgsl"),
    preludes: &[Prelude::Order],
    constants: &[("WG", WG)],
    params: Params::FIELDS,
    trials: |_, _| Vec::new(),
};

/// Dispatch: one workgroup.
pub fn grid() -> [u32; 3] {
    [1, 1, 1]
}
