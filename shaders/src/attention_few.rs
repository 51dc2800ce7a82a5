//! Twin of `attention_few.wgsl`; the formula and the mapping are in its header.

use crate::*;

pub use crate::attention::{Params, cost, grid, reference};

/// Invocations of a workgroup.
pub const WG: u32 = 128;
/// Query heads of a workgroup.
pub const HEADS: u32 = attention::HEADS;
/// Positions that an invocation reads before it waits for the others.
pub const PASSES: u32 = 4;

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "attention_few",
    body: include_str!("attention_few.wgsl"),
    preludes: &[
        Prelude::Step,
        Prelude::Kv,
        Prelude::KvEight,
        Prelude::Softcap,
        Prelude::Window,
        Prelude::Split,
        Prelude::AttentionEights,
    ],
    constants: &[("WG", WG), ("HEADS", HEADS), ("PASSES", PASSES)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Whether the kernel reads heads of this size in rows of this stride: eight elements at a time.
pub fn handles(head_dim: u32, qkv_stride: u32) -> bool {
    head_dim.is_multiple_of(8) && head_dim <= attention::HEAD_DIM_MAX && qkv_stride.is_multiple_of(4)
}

/// The cases of [`attention`] that the kernel handles, and the smallest head.
pub fn cases() -> Vec<attention::Case> {
    let mut cases = attention::cases();
    cases.retain(|case| handles(case.head_dim, 0));
    cases.push(attention::Case {
        heads: 3,
        kv_heads: 3,
        head_dim: 8,
        position: 300,
        tokens: 1,
        window: 0,
        split_len: 512,
        cap: 0.0,
        prefix: 64,
    });
    cases
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    cases().into_iter().map(|case| attention::trial(case, 4, variant, rng)).collect()
}
