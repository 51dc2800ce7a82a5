//! Twin of `attention_reduce.wgsl`; the formula and the mapping are in its header.

use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 64;

params! {
    /// Uniform at binding 0.
    Params {
        /// Query heads.
        heads: u32,
        /// Elements of a head.
        head_dim: u32,
        /// Elements of a row of out.
        out_stride: u32,
        /// As in [`crate::attention::Params`].
        window: u32,
        /// As in [`crate::attention::Params`].
        splits_max: u32,
        /// As in [`crate::attention::Params`].
        split_len: u32,
        /// Unused.
        pad: [u32; 2],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "attention_reduce",
    body: include_str!("attention_reduce.wgsl"),
    preludes: &[Prelude::Step],
    constants: &[("WG", WG)],
    params: Params::FIELDS,
    trials: |_, _| Vec::new(),
};

/// Dispatch for `rows` tokens.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    [params.heads, 1, rows]
}
