//! Twin of `attention_each.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
use crate::*;

/// Sessions of a dispatch.
pub const MEMBERS: u32 = 8;
/// Invocations of a workgroup.
pub const WG: u32 = attention_few::WG;

params! {
    /// Uniform at binding 0.
    Params {
        /// As in [`attention::Params`], as are the following.
        heads: u32,
        /// Key/value heads.
        kv_heads: u32,
        /// Elements of a head, see [`attention_few::handles`].
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
        /// Unused.
        pad: [u32; 2],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "attention_each",
    body: include_str!("attention_each.wgsl"),
    preludes: &[
        Prelude::Kv,
        Prelude::KvEight,
        Prelude::Softcap,
        Prelude::Window,
        Prelude::Split,
        Prelude::Members,
        Prelude::AttentionEights,
    ],
    constants: &[("WG", WG), ("HEADS", attention_few::HEADS), ("PASSES", attention_few::PASSES), ("MEMBERS", MEMBERS)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Positions of a split: long contexts keep a device busy also where few sessions are together.
pub fn split_len(context: u32) -> u32 {
    const SPLITS: u32 = 32;
    const LEAST: u32 = 256;
    context.div_ceil(SPLITS).next_multiple_of(LEAST)
}

/// The same for one session with a cache of `context` positions, of which `prefix` are shared.
fn plain(params: &Params, context: u32, prefix: u32) -> attention::Params {
    attention::Params {
        heads: params.heads,
        kv_heads: params.kv_heads,
        head_dim: params.head_dim,
        qkv_stride: params.qkv_stride,
        context,
        scale: params.scale,
        window: params.window,
        splits_max: params.splits_max,
        split_len: params.split_len,
        cap: params.cap,
        prefix,
        pad: 0,
    }
}

/// Dispatch for `members` sessions at most at `position`.
pub fn grid(params: &Params, position: u32, members: u32) -> [u32; 3] {
    let [blocks, splits, _] = attention::grid(&plain(params, 0, 0), position, 1);
    [blocks, splits, members]
}

/// As [`attention::cost`].
pub fn cost(params: &Params, kv: Kv, positions: u32, members: u32) -> Cost {
    attention::cost(&plain(params, 0, 0), kv, positions, members)
}

/// Several sessions: first row, shared positions, and by session position and whether it begins with them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Case {
    pub(crate) heads: u32,
    pub(crate) kv_heads: u32,
    pub(crate) head_dim: u32,
    pub(crate) window: u32,
    pub(crate) split_len: u32,
    pub(crate) first_row: u32,
    pub(crate) prefix: u32,
    pub(crate) members: &'static [(u32, bool)],
}

/// One session, all of them, shared and own starts, windows, one and many splits.
const CASES: &[Case] = &[
    Case {
        heads: 1,
        kv_heads: 1,
        head_dim: 8,
        window: 0,
        split_len: 64,
        first_row: 0,
        prefix: 0,
        members: &[(0, false)],
    },
    Case {
        heads: 8,
        kv_heads: 2,
        head_dim: 128,
        window: 0,
        split_len: 64,
        first_row: 2,
        prefix: 50,
        members: &[(130, false), (50, true), (3, false), (90, true), (64, false), (63, false), (170, true), (7, false)],
    },
    Case {
        heads: 7,
        kv_heads: 1,
        head_dim: 80,
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
        prefix: 0,
        members: &[(300, false), (10, false)],
    },
];

/// A random cache of `positions` positions as words, and as the kernel sees it.
fn random(kv: Kv, [kv_heads, head_dim]: [u32; 2], positions: u32, rng: &mut Rng) -> (Vec<u32>, Vec<f32>) {
    let values = rng.values((positions * kv_heads * head_dim) as usize, 2.0);
    let (mut words, values) = kv.pack(&values, [kv_heads, head_dim]);
    // Whole vectors.
    words.resize(words.len().next_multiple_of(4), 0);
    (words, values)
}

/// A random run of a case; shared with the kernel of subgroups.
pub(crate) fn trial(case: &Case, variant: Variant, rng: &mut Rng) -> Trial {
    let row_len = (case.heads + 2 * case.kv_heads) * case.head_dim;
    let rows = case.first_row + case.members.len() as u32;
    let most = case.members.iter().map(|(position, _)| *position).max().unwrap_or(0);
    let params = Params {
        heads: case.heads,
        kv_heads: case.kv_heads,
        head_dim: case.head_dim,
        qkv_stride: row_len + 4,
        first_row: case.first_row,
        scale: 1.0 / (case.head_dim as f32).sqrt(),
        window: case.window,
        splits_max: attention::splits_max(case.window, case.split_len, most + 1),
        split_len: case.split_len,
        cap: if case.window > 0 { 1.5 } else { 0.0 },
        pad: [0; 2],
    };
    let qkv = rng.values((rows * params.qkv_stride) as usize, 3.0);
    let cache = |positions: u32, rng: &mut Rng| {
        let shape = [case.kv_heads, case.head_dim];
        (random(variant.kv, shape, positions, rng), random(variant.kv, shape, positions, rng))
    };
    let ((k_prefix, k_shared), (v_prefix, v_shared)) = cache(case.prefix, rng);
    let partials = (rows * case.heads * params.splits_max) as usize;
    let mut out = trial::poisoned(partials * case.head_dim as usize);
    let mut ml = vec![[f32::from_bits(trial::POISON); 2]; partials];
    let (out_words, ml_words) = (trial::words(&out), trial::words(ml.as_flattened()));
    let mut places = vec![[0; 4]; case.first_row as usize];
    let mut caches = Vec::new();
    for (row, &(position, begins_shared)) in (case.first_row..).zip(case.members) {
        let prefix = if begins_shared { case.prefix } else { 0 };
        let (context, rest) = (position.max(prefix) + 3, position.max(prefix) + 3 - prefix);
        let ((k_words, k), (v_words, v)) = cache(rest, rng);
        caches.extend([k_words, v_words]);
        places.push([position, context, prefix, 0]);
        let (k_first, v_first): (&[f32], &[f32]) = if begins_shared { (&k_shared, &v_shared) } else { (&[], &[]) };
        let one = plain(&params, context, prefix);
        let step = Step { n_tokens: 1, position, ..Step::default() };
        let of_row = |n: u32| (row * n) as usize..((row + 1) * n) as usize;
        let per_row = case.heads * params.splits_max;
        attention::reference(
            &one,
            &step,
            &qkv[of_row(params.qkv_stride)],
            &[k_first, &k].concat(),
            &[v_first, &v].concat(),
            &mut out[of_row(per_row * case.head_dim)],
            &mut ml[of_row(per_row)],
        );
    }
    // The places of sessions that are not there hold somebody's cache.
    let bound = caches.len();
    caches.extend((bound..2 * MEMBERS as usize).map(|_| vec![trial::POISON; 4]));
    let not_empty = |mut words: Vec<u32>| {
        words.resize(words.len().max(4), 0);
        words
    };
    let mut storage = vec![places.as_flattened().to_vec(), trial::words(&qkv), out_words, ml_words];
    storage.extend([not_empty(k_prefix), not_empty(v_prefix)]);
    storage.extend(caches);
    let (out_tolerance, ml_tolerance) = attention::tolerances(case.head_dim, &out, &ml);
    Trial {
        label: format!(
            "{}/{} heads of {}, window {}, sessions {:?}",
            case.heads, case.kv_heads, case.head_dim, case.window, case.members
        ),
        params: bytemuck::bytes_of(&params).to_vec(),
        step: Step::default(),
        storage,
        grid: grid(&params, most, case.members.len() as u32),
        expected: vec![
            Expected::close(4, out, out_tolerance),
            Expected::close(5, ml.as_flattened().to_vec(), ml_tolerance),
        ],
    }
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    CASES.iter().map(|case| trial(case, variant, rng)).collect()
}
