//! Twin of `attention.wgsl`; the formula and the mapping are in its header.

use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 128;
/// Query heads of a workgroup.
pub const HEADS: u32 = 4;
/// Positions in workgroup memory.
pub const TILE: u32 = 32;
/// Most elements of a head.
pub const HEAD_DIM_MAX: u32 = 256;

params! {
    /// Uniform at binding 0.
    Params {
        /// Query heads.
        heads: u32,
        /// Key/value heads; divides `heads`.
        kv_heads: u32,
        /// Elements of a head; even, at most [`HEAD_DIM_MAX`].
        head_dim: u32,
        /// Elements of a row of qkv.
        qkv_stride: u32,
        /// Positions of the cache.
        context: u32,
        /// Factor on the dot products.
        scale: f32,
        /// Positions a token sees, itself included; 0 for all.
        window: u32,
        /// Splits that the partial buffers have room for.
        splits_max: u32,
        /// Positions of a split.
        split_len: u32,
        /// Unused.
        pad: [u32; 3],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "attention",
    body: include_str!("attention.wgsl"),
    preludes: &[Prelude::Step, Prelude::Kv],
    constants: &[("WG", WG), ("HEADS", HEADS), ("TILE", TILE), ("HEAD_DIM_MAX", HEAD_DIM_MAX)],
    params: Params::FIELDS,
    trials: |_, _| Vec::new(),
};

/// Splits that any token of a step has: the y dimension of the dispatch, at most `splits_max` if that was sized with
/// [`splits_max`].
pub fn splits(window: u32, split_len: u32, position: u32, n_tokens: u32) -> u32 {
    let last = position + n_tokens.saturating_sub(1);
    if window == 0 {
        return last / split_len + 1;
    }
    // A window of w positions touches at most this many splits, wherever it lies.
    (last / split_len + 1).min((window - 1).div_ceil(split_len) + 1)
}

/// Splits that a context or a window can need.
pub fn splits_max(window: u32, split_len: u32, context: u32) -> u32 {
    splits(window, split_len, 0, context)
}

/// Positions of a split for steps of `n_tokens` tokens: long prompts fill the device with their rows, so only few
/// tokens split their positions, into pieces that keep a device busy without drowning in partial results.
pub fn split_len(n_tokens: u32, context: u32) -> u32 {
    if n_tokens > FEW_TOKENS {
        return context.max(1);
    }
    context.div_ceil(DECODE_SPLITS).next_multiple_of(TILE).max(DECODE_SPLIT_LEN)
}

/// Most tokens of a step that splits its positions.
pub const FEW_TOKENS: u32 = 4;
/// Most splits of a step of few tokens without a window.
const DECODE_SPLITS: u32 = 64;
/// Fewest positions of a split.
const DECODE_SPLIT_LEN: u32 = 64;

/// Dispatch for `rows` tokens from `position` on.
pub fn grid(params: &Params, position: u32, rows: u32) -> [u32; 3] {
    let blocks = params.kv_heads * (params.heads / params.kv_heads).div_ceil(HEADS);
    [blocks, splits(params.window, params.split_len, position, rows), rows]
}
