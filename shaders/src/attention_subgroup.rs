//! Twin of `attention_subgroup.wgsl`; the formula and the mapping are in its header.

use crate::attention::Case;
use crate::staged::Layout;
use crate::trial::{Expected, Values};
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;
/// Most elements of a head.
pub const HEAD_DIM_MAX: u32 = 256;
/// Smallest subgroups that the kernel is tried with.
pub const LEAST_SUBGROUP: u32 = 8;

params! {
    /// Uniform at binding 0.
    Params {
        /// As in [`attention::Params`], as are the following.
        heads: u32,
        /// Key/value heads.
        kv_heads: u32,
        /// Elements of a head, see [`handles`].
        head_dim: u32,
        /// Elements of a row of qkv; a multiple of 4.
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
        /// Bound of the scores; 0 for none.
        cap: f32,
        /// Elements of a row of out.
        out_stride: u32,
        /// Bit [`crate::FLAG_STAGE`].
        flags: u32,
        /// Quads of a staged row.
        stage_quads: u32,
        /// Unused.
        pad: [u32; 3],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "attention_subgroup",
    body: include_str!("attention_subgroup.wgsl"),
    preludes: &[
        Prelude::Step,
        Prelude::Kv,
        Prelude::KvLane,
        Prelude::Softcap,
        Prelude::Heads,
        Prelude::Window,
        Prelude::Split,
        Prelude::Elem,
        Prelude::Stage,
        Prelude::StageEight,
        Prelude::AttentionLanes,
    ],
    constants: &[("WG", WG), ("HEAD_DIM_MAX", HEAD_DIM_MAX)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Whether the kernel reads heads of this size in rows of this stride, in subgroups of at least `subgroup`.
pub fn handles(head_dim: u32, qkv_stride: u32, subgroup: u32) -> bool {
    let sizes = head_dim.is_power_of_two() && (32..=HEAD_DIM_MAX).contains(&head_dim);
    sizes && head_dim / 8 <= subgroup && subgroup >= LEAST_SUBGROUP && qkv_stride.is_multiple_of(4)
}

/// Positions of a split, of which there are 64 at most; short contexts do without the kernel that combines them.
pub fn split_len(context: u32) -> u32 {
    const SPLITS: u32 = 64;
    const LEAST: u32 = 128;
    context.div_ceil(SPLITS).next_multiple_of(LEAST)
}

/// Whether every token of a step has one split alone, so that nothing has to be combined.
pub fn is_whole(window: u32, split_len: u32, step: &Step) -> bool {
    (0..step.n_tokens).all(|token| {
        let (first, last) = attention::visible(window, step.position + token);
        first / split_len == last / split_len
    })
}

/// The plain form of the parameters.
fn plain(params: &Params) -> attention::Params {
    attention::Params {
        heads: params.heads,
        kv_heads: params.kv_heads,
        head_dim: params.head_dim,
        qkv_stride: params.qkv_stride,
        context: params.context,
        scale: params.scale,
        window: params.window,
        splits_max: params.splits_max,
        split_len: params.split_len,
        cap: params.cap,
        prefix: 0,
        pad: 0,
    }
}

/// Dispatch for `rows` tokens from `position` on.
pub fn grid(params: &Params, position: u32, rows: u32) -> [u32; 3] {
    attention::grid(&plain(params), position, rows)
}

/// As [`attention::cost`].
pub fn cost(params: &Params, kv: Kv, positions: u32, rows: u32) -> Cost {
    attention::cost(&plain(params), kv, positions, rows)
}

/// Heads that subgroups of [`LEAST_SUBGROUP`] hold: one position, ragged tiles, one and several splits, windows within
/// and across them, groups of query heads that fit, fill and exceed a workgroup.
pub fn cases() -> Vec<Case> {
    let case = |heads, kv_heads, head_dim, position, tokens, window, split_len| Case {
        heads,
        kv_heads,
        head_dim,
        position,
        tokens,
        window,
        split_len,
        cap: 0.0,
        prefix: 0,
    };
    vec![
        case(2, 2, 64, 0, 1, 0, 256),
        case(4, 4, 64, 300, 1, 0, 512),
        case(8, 2, 32, 130, 1, 0, 32),
        case(3, 3, 32, 77, 1, 0, 128),
        case(7, 1, 64, 66, 3, 0, 128),
        case(6, 1, 32, 40, 2, 24, 64),
        case(4, 2, 64, 200, 2, 90, 64),
        Case { cap: 1.5, ..case(8, 4, 32, 90, 2, 60, 64) },
    ]
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let of_variant = |case: Case| match variant.heads {
        Heads::One => Case { heads: case.kv_heads, ..case },
        Heads::Four => case,
    };
    cases().into_iter().enumerate().map(|(i, case)| trial(of_variant(case), i % 2 == 0, variant, rng)).collect()
}

/// The run of the plain kernel with the combined rows in place of the splits of tokens that have one alone.
fn trial(case: Case, stages: bool, variant: Variant, rng: &mut Rng) -> Trial {
    let mut trial = attention::trial(case, 4, variant, rng);
    let plain: attention::Params = bytemuck::pod_read_unaligned(&trial.params);
    let columns = (plain.heads * plain.head_dim) as usize;
    let layout = Layout { k: columns, elem: variant.elem };
    let params = Params {
        heads: plain.heads,
        kv_heads: plain.kv_heads,
        head_dim: plain.head_dim,
        qkv_stride: plain.qkv_stride,
        context: plain.context,
        scale: plain.scale,
        window: plain.window,
        splits_max: plain.splits_max,
        split_len: plain.split_len,
        cap: plain.cap,
        out_stride: columns as u32 + 1,
        flags: if stages { FLAG_STAGE } else { 0 },
        stage_quads: layout.quads() as u32,
        pad: [0; 3],
    };
    let [Values::F32(partial), Values::F32(ml)] = [0, 1].map(|i| trial.expected[i].values.clone()) else {
        unreachable!("attention leaves f32 numbers");
    };
    let pairs: Vec<[f32; 2]> = ml.as_chunks().0.to_vec();
    let reduce = attention_reduce::Params {
        heads: plain.heads,
        head_dim: plain.head_dim,
        out_stride: params.out_stride,
        window: plain.window,
        splits_max: plain.splits_max,
        split_len: plain.split_len,
        flags: 0,
        stage_quads: 0,
    };
    let mut combined = vec![0.0; (case.tokens * params.out_stride) as usize];
    attention_reduce::reference(&reduce, &trial.step, &partial, &pairs, &mut combined);

    let poison = f32::from_bits(trial::POISON);
    let mut out = trial::poisoned(combined.len());
    let staged = layout.empty(case.tokens as usize);
    let mut rows_staged = Vec::new();
    let per_token = (plain.heads * plain.splits_max) as usize;
    for token in 0..case.tokens {
        let step = Step { position: case.position + token, n_tokens: 1, ..trial.step };
        if !is_whole(case.window, case.split_len, &step) {
            continue;
        }
        let row = (token * params.out_stride) as usize..(token * params.out_stride) as usize + columns;
        out[row.clone()].copy_from_slice(&combined[row.clone()]);
        if stages {
            rows_staged.extend(layout.expected(8, token as usize, &combined[row], None, 1e-3));
        }
        let rows = token as usize * per_token..(token as usize + 1) * per_token;
        for (of, width) in [(0, plain.head_dim as usize), (1, 2)] {
            let Values::F32(values) = &mut trial.expected[of].values else { continue };
            values[rows.start * width..rows.end * width].fill(poison);
        }
    }
    // This kernel has no shared part.
    trial.storage.truncate(5);
    trial.storage.extend([trial::words(&trial::poisoned(out.len())), staged.clone()]);
    trial.expected.push(Expected::near(7, out, 2e-4));
    if rows_staged.is_empty() {
        trial.expected.push(Expected::exact(8, staged));
    }
    trial.expected.extend(rows_staged);
    trial.params = bytemuck::bytes_of(&params).to_vec();
    trial
}
