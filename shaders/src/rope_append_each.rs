//! Twin of `rope_append_each.wgsl`; the formula and the mapping are in its header.

use crate::rope_append::{ROTATION, cached};
use crate::trial::Expected;
use crate::*;

pub use crate::attention_each::MEMBERS;
/// Invocations of a workgroup.
pub const WG: u32 = rope_append::WG;

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
        /// Row of the first session.
        first_row: u32,
        /// Unused.
        pad: [u32; 2],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "rope_append_each",
    body: include_str!("rope_append_each.wgsl"),
    preludes: &[Prelude::Kv, Prelude::RopeAppend],
    constants: &[("WG", WG), ("MEMBERS", MEMBERS)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// The same for one session with a cache of `context` positions, of which `prefix` are shared.
fn plain(params: &Params, context: u32, prefix: u32) -> rope_append::Params {
    rope_append::Params {
        heads: params.heads,
        kv_heads: params.kv_heads,
        head_dim: params.head_dim,
        rotary_dim: params.rotary_dim,
        qkv_stride: params.qkv_stride,
        context,
        prefix,
        pad: 0,
    }
}

/// Dispatch for `members` sessions.
pub fn grid(params: &Params, kv: Kv, members: u32) -> [u32; 3] {
    rope_append::grid(&plain(params, 0, 0), kv, members)
}

/// As [`rope_append::cost`].
pub fn cost(params: &Params, kv: Kv, members: u32) -> Cost {
    rope_append::cost(&plain(params, 0, 0), kv, members)
}

/// (heads, kv_heads, head_dim, rotary_dim, first row) and by session (position, prefix).
type Case = ([u32; 5], &'static [(u32, u32)]);

/// Full, partial and no rotation, one session and as many as there can be.
const CASES: &[Case] = &[
    ([1, 1, 2, 2, 0], &[(0, 0)]),
    ([4, 2, 64, 64, 3], &[(5, 0), (9, 4), (1, 0), (0, 0), (7, 7), (30, 0), (2, 1), (3, 0)]),
    ([3, 3, 80, 20, 0], &[(1, 0), (8, 2)]),
    ([8, 2, 128, 0, 8], &[(7, 0), (2, 0), (6, 0)]),
];

fn trial(&([heads, kv_heads, head_dim, rotary_dim, first_row], members): &Case, kv: Kv, rng: &mut Rng) -> Trial {
    let rows = first_row + members.len() as u32;
    let qkv_stride = (heads + 2 * kv_heads) * head_dim + 4;
    let params = Params { heads, kv_heads, head_dim, rotary_dim, qkv_stride, first_row, pad: [0; 2] };
    let mut qkv = rng.values((rows * qkv_stride) as usize, 30.0);
    let half = (rotary_dim / 2) as usize;
    let rope: Vec<[f32; 2]> = (0..(rows as usize * half).max(1))
        .map(|_| {
            let (sin, cos) = rng.range(-3.0, 3.0).sin_cos();
            [cos, sin]
        })
        .collect();
    let qkv_words = trial::words(&qkv);
    let (mut caches, mut expected) = (Vec::new(), Vec::new());
    let mut places = vec![[0; 4]; first_row as usize];
    for (i, &(position, prefix)) in members.iter().enumerate() {
        let row = first_row as usize + i;
        let context = position + 3;
        places.push([position, context, prefix, 0]);
        let one = plain(&params, context, prefix);
        let elements = (kv_heads * (context - prefix) * head_dim) as usize;
        let words = (kv_heads * (context - prefix)) as usize * kv.row_words(head_dim) as usize;
        caches.extend((0..2).map(|_| vec![kv.poison(); words]));
        let (mut k, mut v) = (trial::poisoned(elements), trial::poisoned(elements));
        // The row of its position, behind others that are not read.
        let mut table = vec![[0.0; 2]; position as usize * half];
        table.extend_from_slice(&rope[row * half..(row + 1) * half]);
        let step = Step { n_tokens: 1, position, ..Step::default() };
        let of_row = row * qkv_stride as usize..(row + 1) * qkv_stride as usize;
        rope_append::reference(&one, &step, &mut qkv[of_row], &table, &mut k, &mut v);
        let allowed = vec![ROTATION * 60.0; elements];
        expected.extend([
            cached(5 + 2 * i as u32, kv, [kv_heads, head_dim], k, &allowed),
            cached(6 + 2 * i as u32, kv, [kv_heads, head_dim], v, &allowed),
        ]);
    }
    // The places of sessions that are not there hold somebody's cache.
    let bound = caches.len();
    caches.extend((bound..2 * MEMBERS as usize).map(|_| vec![trial::POISON; 4]));
    let mut storage = vec![places.as_flattened().to_vec(), qkv_words, trial::words(rope.as_flattened())];
    storage.extend(caches);
    expected.push(Expected::near(3, qkv, ROTATION));
    Trial {
        label: format!("{heads}/{kv_heads} heads of {head_dim}, {rotary_dim} rotated, sessions {members:?}"),
        params: bytemuck::bytes_of(&params).to_vec(),
        step: Step::default(),
        storage,
        grid: grid(&params, kv, members.len() as u32),
        expected,
    }
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let handled = CASES.iter().filter(|([_, _, head_dim, ..], _)| variant.kv.handles(*head_dim));
    handled.map(|case| trial(case, variant.kv, rng)).collect()
}
