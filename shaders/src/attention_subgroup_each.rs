//! Twin of `attention_subgroup_each.wgsl`; the formula and the mapping are in its header.

use crate::attention_each::Case;
use crate::attention_subgroup::{HEAD_DIM_MAX, WG};
use crate::staged::Layout;
use crate::*;

pub use crate::attention_each::MEMBERS;

params! {
    /// Uniform at binding 0.
    Params {
        /// As in [`attention::Params`], as are the following.
        heads: u32,
        /// Key/value heads.
        kv_heads: u32,
        /// Elements of a head, see [`attention_subgroup::handles`].
        head_dim: u32,
        /// Elements of a row of qkv; a multiple of 4.
        qkv_stride: u32,
        /// Row of the first session.
        first_row: u32,
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
    name: "attention_subgroup_each",
    body: include_str!("attention_subgroup_each.wgsl"),
    preludes: &[
        Prelude::Kv,
        Prelude::KvLane,
        Prelude::Softcap,
        Prelude::Heads,
        Prelude::Window,
        Prelude::Split,
        Prelude::Elem,
        Prelude::Stage,
        Prelude::StageEight,
        Prelude::Members,
        Prelude::AttentionLanes,
    ],
    constants: &[("WG", WG), ("HEAD_DIM_MAX", HEAD_DIM_MAX), ("MEMBERS", MEMBERS)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// The form of the kernel without subgroups.
fn plain(params: &Params) -> attention_each::Params {
    attention_each::Params {
        heads: params.heads,
        kv_heads: params.kv_heads,
        head_dim: params.head_dim,
        qkv_stride: params.qkv_stride,
        first_row: params.first_row,
        scale: params.scale,
        window: params.window,
        splits_max: params.splits_max,
        split_len: params.split_len,
        cap: params.cap,
        pad: [0; 2],
    }
}

/// As [`attention_each::grid`].
pub fn grid(params: &Params, position: u32, members: u32) -> [u32; 3] {
    attention_each::grid(&plain(params), position, members)
}

/// As [`attention_each::cost`].
pub fn cost(params: &Params, kv: Kv, positions: u32, members: u32) -> Cost {
    attention_each::cost(&plain(params), kv, positions, members)
}

/// One session, all of them, shared and own starts that end within and between tiles, windows, one and many splits.
const CASES: &[Case] = &[
    Case {
        heads: 2,
        kv_heads: 2,
        head_dim: 32,
        window: 0,
        split_len: 64,
        first_row: 0,
        prefix: 0,
        members: &[(0, false)],
    },
    Case {
        heads: 8,
        kv_heads: 2,
        head_dim: 64,
        window: 0,
        split_len: 64,
        first_row: 2,
        prefix: 50,
        members: &[(130, false), (50, true), (3, false), (90, true), (64, false), (63, false), (170, true), (7, false)],
    },
    Case {
        heads: 7,
        kv_heads: 1,
        head_dim: 32,
        window: 24,
        split_len: 32,
        first_row: 0,
        prefix: 64,
        members: &[(5, false), (70, true), (200, true)],
    },
    Case {
        heads: 4,
        kv_heads: 4,
        head_dim: 64,
        window: 0,
        split_len: 256,
        first_row: 8,
        prefix: 33,
        members: &[(300, true), (10, false), (60, true)],
    },
];

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let of_variant = |case: &Case| match variant.heads {
        Heads::One => Case { heads: case.kv_heads, ..*case },
        Heads::Four => *case,
    };
    CASES.iter().enumerate().map(|(i, case)| trial(&of_variant(case), i % 2 == 0, variant, rng)).collect()
}

fn trial(case: &Case, stages: bool, variant: Variant, rng: &mut Rng) -> Trial {
    let mut trial = attention_each::trial(case, variant, rng);
    let plain: attention_each::Params = bytemuck::pod_read_unaligned(&trial.params);
    let columns = plain.heads * plain.head_dim;
    let params = Params {
        heads: plain.heads,
        kv_heads: plain.kv_heads,
        head_dim: plain.head_dim,
        qkv_stride: plain.qkv_stride,
        first_row: plain.first_row,
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
    let rows = case.first_row + case.members.len() as u32;
    let positions = (case.first_row..).zip(case.members.iter().map(|(position, _)| *position));
    attention_subgroup::leave_whole(&mut trial, &reduce, variant.elem, (rows, positions));
    trial.params = bytemuck::bytes_of(&params).to_vec();
    trial
}
