//! Twin of `attention_coop.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 128;
/// Tokens of a workgroup.
pub const TILE: u32 = 64;
/// Positions at once.
pub const SPAN: u32 = 32;
/// Most elements of a head.
pub const HEAD_DIM_MAX: u32 = 128;

params! {
    /// Uniform at binding 0.
    Params {
        /// Query heads.
        heads: u32,
        /// Key/value heads; divides `heads`.
        kv_heads: u32,
        /// Elements of a head; a multiple of 16, at most [`HEAD_DIM_MAX`].
        head_dim: u32,
        /// Elements of a row of qkv.
        qkv_stride: u32,
        /// Elements of a row of out.
        out_stride: u32,
        /// Positions of the cache; those that make the last [`SPAN`] whole may be read.
        context: u32,
        /// Factor on the dot products.
        scale: f32,
        /// Positions a token sees, itself included; 0 for all.
        window: u32,
        /// Bound of the scores; 0 for none.
        cap: f32,
        /// Unused.
        pad: [u32; 3],
    }
}

/// The kernel; the cache is in half precision or 8 bits.
pub static KERNEL: Kernel = Kernel {
    name: "attention_coop",
    body: include_str!("attention_coop.wgsl"),
    preludes: &[Prelude::Step, Prelude::Coop, Prelude::Kv, Prelude::KvCoop, Prelude::Softcap, Prelude::Window],
    constants: &[("WG", WG), ("TILE", TILE), ("SPAN", SPAN), ("HEAD_DIM_MAX", HEAD_DIM_MAX)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Whether the kernel takes heads of this size in a cache of this type.
pub fn handles(head_dim: u32, kv: Kv) -> bool {
    kv != Kv::F32 && head_dim.is_multiple_of(16) && head_dim <= HEAD_DIM_MAX
}

/// Dispatch for `rows` tokens.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    [params.heads, 1, rows.div_ceil(TILE)]
}

/// Queries and weights rounded to half precision, relative to the largest value.
const TOLERANCE: f32 = 4e-3;

/// Keys and values once per tile and head; four operations an element of head and position.
pub fn cost(params: &Params, kv: Kv, positions: u32, rows: u32) -> Cost {
    let lines = u64::from(positions) * u64::from(params.heads);
    Cost {
        bytes: trial::word_bytes(2 * kv.row_words(params.head_dim) * lines * u64::from(rows.div_ceil(TILE))),
        flops: 4 * u64::from(params.head_dim) * lines * u64::from(rows),
    }
}

/// One tile and several, ragged ones, windows, grouped heads, every number of accumulators that differs.
pub fn cases() -> Vec<attention::Case> {
    let case = |heads, kv_heads, head_dim, position, tokens, window| attention::Case {
        heads,
        kv_heads,
        head_dim,
        position,
        tokens,
        window,
        split_len: u32::MAX,
        cap: 0.0,
        prefix: 0,
    };
    vec![
        case(1, 1, 16, 0, 1, 0),
        case(4, 2, 64, 0, 130, 0),
        case(2, 1, 128, 70, 64, 0),
        case(3, 1, 80, 33, 40, 0),
        case(2, 2, 96, 100, 90, 24),
        attention::Case { cap: 1.5, ..case(2, 1, 64, 10, 70, 0) },
    ]
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    cases().into_iter().map(|case| trial(case, variant.kv, rng)).collect()
}

fn trial(case: attention::Case, kv: Kv, rng: &mut Rng) -> Trial {
    let attention::Case { heads, kv_heads, head_dim, position, tokens, window, cap, .. } = case;
    let context = position + tokens + 3;
    let dim = head_dim as usize;
    let columns = heads as usize * dim;
    let params = Params {
        heads,
        kv_heads,
        head_dim,
        qkv_stride: (heads + 2 * kv_heads) * head_dim + 1,
        out_stride: columns as u32 + 2,
        context,
        scale: 1.0 / (head_dim as f32).sqrt(),
        window,
        cap,
        pad: [0; 3],
    };
    let step = Step { n_tokens: tokens, position, ..Step::default() };
    let qkv = rng.values((tokens * params.qkv_stride) as usize, 3.0);
    // Positions that no token sees hold numbers that would show. Keys grow, so that the bounds of the scores rise.
    let beyond = ((context.next_multiple_of(SPAN) - context) * kv_heads) as usize * kv.row_words(head_dim) as usize;
    let mut cache = || {
        let mut values = vec![1000.0; (kv_heads * context * head_dim) as usize];
        for at in attention::visible(window, position).0..position + tokens {
            let row = (kv_heads * head_dim) as usize;
            let at_position = rng.values(row, 1.0 + 3.0 * at as f32 / context as f32);
            values[at as usize * row..][..row].copy_from_slice(&at_position);
        }
        let (mut words, left) = kv.pack(&values, [kv_heads, head_dim]);
        // Halves of 1000.0, or scales of 500.0 and codes.
        let word = if kv == Kv::Q8 { 0x5fd0_5fd0 } else { 0x63d0_63d0 };
        words.resize(words.len() + beyond, word);
        (words, left)
    };
    let ((k_words, k), (v_words, v)) = (cache(), cache());
    let mut out = trial::poisoned((tokens * params.out_stride) as usize);
    let storage = vec![trial::words(&qkv), k_words, v_words, trial::words(&out)];
    for token in 0..tokens as usize {
        let (first, last) = attention::visible(window, position + token as u32);
        for head in 0..heads as usize {
            let kv_head = head / (heads / kv_heads) as usize;
            let q = &qkv[token * params.qkv_stride as usize + head * dim..][..dim];
            let row = |at: u32| (at as usize * kv_heads as usize + kv_head) * dim;
            let score = |at: u32| -> f64 {
                let dot: f64 = q.iter().zip(&k[row(at)..]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                scale::softcap(dot * f64::from(params.scale), params.cap)
            };
            let largest = (first..=last).map(score).fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = (first..=last).map(|at| (score(at) - largest).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for d in 0..dim {
                let value: f64 = (first..=last).zip(&weights).map(|(at, w)| w * f64::from(v[row(at) + d])).sum();
                out[token * params.out_stride as usize + head * dim + d] = (value / sum) as f32;
            }
        }
    }
    Trial {
        label: format!("{case:?}"),
        params: bytemuck::bytes_of(&params).to_vec(),
        step,
        storage,
        grid: grid(&params, tokens),
        expected: vec![Expected::near(5, out, TOLERANCE)],
    }
}
