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

fn trial(case: Case, stages: bool, variant: Variant, rng: &mut Rng) -> Trial {
    let mut trial = attention::trial(case, 4, variant, rng);
    let plain: attention::Params = bytemuck::pod_read_unaligned(&trial.params);
    let columns = plain.heads * plain.head_dim;
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
        out_stride: columns + 1,
        flags: if stages { FLAG_STAGE } else { 0 },
        stage_quads: Layout { k: columns as usize, elem: variant.elem }.quads() as u32,
        pad: [0; 3],
    };
    let reduce = attention_reduce::Params {
        heads: params.heads,
        head_dim: params.head_dim,
        out_stride: params.out_stride,
        window: params.window,
        splits_max: params.splits_max,
        split_len: params.split_len,
        flags: params.flags,
        stage_quads: params.stage_quads,
    };
    // This kernel has no shared part.
    trial.storage.truncate(5);
    let positions = (0..case.tokens).map(|token| (token, case.position + token));
    leave_whole(&mut trial, &reduce, variant.elem, (case.tokens, positions));
    trial.params = bytemuck::bytes_of(&params).to_vec();
    trial
}

/// Makes of `trial`, which expects the splits of all rows first, one that expects the combined row of `reduce`, staged with
/// its [`FLAG_STAGE`], instead of the split of a row that has one alone. There are so many rows, of which these have these
/// positions; the rows and what is staged of them become the last two bindings.
pub(crate) fn leave_whole(
    trial: &mut Trial,
    reduce: &attention_reduce::Params,
    elem: Elem,
    (rows, positions): (u32, impl Iterator<Item = (u32, u32)>),
) {
    let [Expected { values: Values::F32(partial), .. }, Expected { values: Values::F32(ml), .. }] =
        &mut trial.expected[..]
    else {
        unreachable!("attention leaves f32 numbers");
    };
    let (dim, stride) = (reduce.head_dim as usize, reduce.out_stride as usize);
    let (columns, per_row) = (reduce.heads as usize * dim, (reduce.heads * reduce.splits_max) as usize);
    let layout = Layout { k: columns, elem };
    let binding = trial.storage.len() as u32 + 2;
    let poison = f32::from_bits(trial::POISON);
    let mut out = trial::poisoned(rows as usize * stride);
    let staged = layout.empty(rows as usize);
    trial.storage.extend([trial::words(&out), staged.clone()]);
    let mut rows_staged = Vec::new();
    for (row, position) in positions {
        let step = Step { n_tokens: 1, position, ..Step::default() };
        if !is_whole(reduce.window, reduce.split_len, &step) {
            continue;
        }
        let row = row as usize;
        let partial = &mut partial[row * per_row * dim..(row + 1) * per_row * dim];
        let ml = &mut ml[row * per_row * 2..(row + 1) * per_row * 2];
        let out = &mut out[row * stride..(row + 1) * stride];
        attention_reduce::reference(reduce, &step, partial, ml.as_chunks().0, out);
        partial.fill(poison);
        ml.fill(poison);
        if reduce.flags & FLAG_STAGE != 0 {
            rows_staged.extend(layout.expected(binding + 1, row, &out[..columns], None, 1e-3));
        }
    }
    trial.expected.push(Expected::near(binding, out, 2e-4));
    if rows_staged.is_empty() {
        trial.expected.push(Expected::exact(binding + 1, staged));
    }
    trial.expected.extend(rows_staged);
}
