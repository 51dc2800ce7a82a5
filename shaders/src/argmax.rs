//! Twin of `argmax.wgsl`; the formula and the mapping are in its header.

use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;
/// Scores of a workgroup.
pub const BLOCK: u32 = 1024;

params! {
    /// Uniform at binding 0.
    Params {
        /// Scores.
        n: u32,
        /// First score, in elements.
        offset: u32,
        /// Unused.
        pad: [u32; 2],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "argmax",
    body: include_str!("argmax.wgsl"),
    preludes: &[Prelude::Order],
    constants: &[("WG", WG), ("BLOCK", BLOCK)],
    params: Params::FIELDS,
    trials: |_, _| Vec::new(),
};

/// Candidates that the kernel writes, the `n` of [`crate::argmax_reduce`].
pub fn blocks(n: u32) -> u32 {
    n.div_ceil(BLOCK)
}

/// Dispatch: a workgroup a block.
pub fn grid(params: &Params) -> [u32; 3] {
    [blocks(params.n), 1, 1]
}
