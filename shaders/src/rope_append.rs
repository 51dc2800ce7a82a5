//! Twin of `rope_append.wgsl`; the formula and the mapping are in its header.

use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 128;

params! {
    /// Uniform at binding 0.
    Params {
        /// Query heads.
        heads: u32,
        /// Key/value heads.
        kv_heads: u32,
        /// Elements of a head; even.
        head_dim: u32,
        /// Leading elements that are rotated; even, 0 for none.
        rotary_dim: u32,
        /// Elements of a row of qkv.
        qkv_stride: u32,
        /// Positions of the cache.
        context: u32,
        /// Unused.
        pad: [u32; 2],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "rope_append",
    body: include_str!("rope_append.wgsl"),
    preludes: &[Prelude::Step, Prelude::Kv],
    constants: &[("WG", WG)],
    params: Params::FIELDS,
    trials: |_, _| Vec::new(),
};

/// Dispatch for `rows` tokens.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    let pairs = (params.heads + 2 * params.kv_heads) * (params.head_dim / 2);
    [pairs.div_ceil(WG), 1, rows]
}
