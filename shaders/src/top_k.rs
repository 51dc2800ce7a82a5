//! Twin of `top_k.wgsl`; the formula and the mapping are in its header.

use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;
/// Items of a workgroup.
pub const BLOCK: u32 = 1024;

params! {
    /// Uniform at binding 0.
    Params {
        /// Scores or candidates of the input.
        n: u32,
        /// First score, in elements; 0 after the first pass.
        offset: u32,
        /// Candidates kept of a block; 1 to [`crate::sample::MAX_TOP_K`].
        k: u32,
        /// 1 in the first pass, 0 after it.
        from_scores: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "top_k",
    body: include_str!("top_k.wgsl"),
    preludes: &[Prelude::Order],
    constants: &[("WG", WG), ("BLOCK", BLOCK)],
    params: Params::FIELDS,
    trials: |_, _| Vec::new(),
};

/// Candidates that a pass over `n` items writes, the `n` of the next pass; a pass whose result is `k` is the last.
pub fn kept(n: u32, k: u32) -> u32 {
    n.div_ceil(BLOCK) * k
}

/// Parameters of every pass over `n` scores, in order.
pub fn passes(n: u32, offset: u32, k: u32) -> Vec<Params> {
    let mut passes = vec![Params { n, offset, k, from_scores: 1 }];
    let mut left = kept(n, k);
    while left > k {
        passes.push(Params { n: left, offset: 0, k, from_scores: 0 });
        left = kept(left, k);
    }
    passes
}

/// Dispatch of a pass: a workgroup a block.
pub fn grid(params: &Params) -> [u32; 3] {
    [params.n.div_ceil(BLOCK), 1, 1]
}
