//! Twin of `attention.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
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
        /// Positions of the session.
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
        /// Positions that lie in the shared part of the cache.
        prefix: u32,
        /// Unused.
        pad: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "attention",
    body: include_str!("attention.wgsl"),
    preludes: &[Prelude::Step, Prelude::Kv, Prelude::Softcap, Prelude::Window, Prelude::Split],
    constants: &[("WG", WG), ("HEADS", HEADS), ("TILE", TILE), ("HEAD_DIM_MAX", HEAD_DIM_MAX)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
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

/// Single precision dot products and exponentials, relative to l times the largest value.
const TOLERANCE: f32 = 2e-5;

/// First and last position that the token at `position` sees.
pub fn visible(window: u32, position: u32) -> (u32, u32) {
    (if window == 0 { 0 } else { (position + 1).saturating_sub(window) }, position)
}

/// Partial results in f64. `k_cache` and `v_cache` are elements, (context, kv_heads, head_dim): both parts together.
pub fn reference(
    params: &Params,
    step: &Step,
    qkv: &[f32],
    k_cache: &[f32],
    v_cache: &[f32],
    partial_out: &mut [f32],
    partial_ml: &mut [[f32; 2]],
) {
    let dim = params.head_dim as usize;
    for token in 0..step.n_tokens {
        let (first, last) = visible(params.window, step.position + token);
        let first_split = first / params.split_len;
        for head in 0..params.heads {
            let kv_head = head / (params.heads / params.kv_heads);
            let q = &qkv[(token * params.qkv_stride) as usize + head as usize * dim..][..dim];
            for split in first_split..=last / params.split_len {
                let begin = first.max(split * params.split_len);
                let end = (last + 1).min((split + 1) * params.split_len);
                let row = |j: u32| (j * params.kv_heads + kv_head) as usize * dim;
                let scores: Vec<f64> = (begin..end)
                    .map(|j| {
                        let k = &k_cache[row(j)..row(j) + dim];
                        let dot: f64 = q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                        scale::softcap(dot * f64::from(params.scale), params.cap)
                    })
                    .collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                let at = ((token * params.heads + head) * params.splits_max + split - first_split) as usize;
                partial_ml[at] = [largest as f32, weights.iter().sum::<f64>() as f32];
                for d in 0..dim {
                    let value: f64 = (begin..end).zip(&weights).map(|(j, w)| w * f64::from(v_cache[row(j) + d])).sum();
                    partial_out[at * dim + d] = value as f32;
                }
            }
        }
    }
}

/// Keys and values of `positions` once for the heads of a workgroup, two products an element and query head.
pub fn cost(params: &Params, kv: Kv, positions: u32, rows: u32) -> Cost {
    let blocks = u64::from(params.kv_heads * (params.heads / params.kv_heads).div_ceil(HEADS));
    let row = u64::from(params.head_dim) * u64::from(positions) * u64::from(rows);
    Cost {
        bytes: trial::word_bytes(2 * kv.row_words(params.head_dim) * u64::from(positions) * u64::from(rows) * blocks),
        flops: 4 * row * u64::from(params.heads),
    }
}

/// A shape of attention.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Query heads.
    pub heads: u32,
    /// Key/value heads.
    pub kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Position of the first token.
    pub position: u32,
    /// Tokens of the step.
    pub tokens: u32,
    /// Window, 0 for none.
    pub window: u32,
    /// Positions of a split.
    pub split_len: u32,
    /// Bound of the scores, 0 for none.
    pub cap: f32,
    /// Positions in the shared part.
    pub prefix: u32,
}

/// One position, whole and ragged tiles and splits, groups of query heads that fit, fill and exceed a workgroup,
/// windows within and across splits, small, odd and the largest heads.
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
        case(1, 1, 2, 0, 1, 0, 64),
        case(4, 4, 64, 0, 5, 0, 512),
        case(8, 2, 128, 130, 1, 0, 32),
        case(7, 1, 80, 66, 3, 0, 64),
        case(6, 1, 256, 40, 1, 0, 32),
        case(4, 2, 96, 100, 2, 24, 32),
        case(2, 1, 32, 200, 2, 90, 64),
        Case { cap: 1.5, ..case(8, 4, 128, 90, 2, 60, 64) },
        // Shared parts: of whole splits, ending within a split and within a tile, beyond a window, up to the step.
        Case { prefix: 64, ..case(8, 2, 128, 130, 1, 0, 32) },
        Case { prefix: 50, ..case(7, 1, 80, 66, 3, 0, 64) },
        Case { prefix: 128, ..case(4, 2, 64, 200, 5, 0, 512) },
        Case { prefix: 32, ..case(4, 2, 96, 100, 2, 24, 32) },
        Case { prefix: 150, ..case(2, 1, 32, 200, 2, 90, 64) },
        Case { prefix: 40, ..case(6, 1, 256, 40, 1, 0, 32) },
    ]
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let handled = cases().into_iter().filter(|case| variant.kv.handles(case.head_dim));
    handled.map(|case| trial(case, 1, variant, rng)).collect()
}

/// Random data for a case; rows of qkv have `pad` elements more than needed.
pub(crate) fn trial(case: Case, pad: u32, variant: Variant, rng: &mut Rng) -> Trial {
    let Case { heads, kv_heads, head_dim, position, tokens, window, split_len, cap, prefix } = case;
    let context = position + tokens + 3;
    let params = Params {
        heads,
        kv_heads,
        head_dim,
        qkv_stride: (heads + 2 * kv_heads) * head_dim + pad,
        context,
        scale: 1.0 / (head_dim as f32).sqrt(),
        window,
        splits_max: splits_max(window, split_len, context),
        split_len,
        cap,
        prefix,
        pad: 0,
    };
    let step = Step { n_tokens: tokens, position, ..Step::default() };
    let qkv = rng.values((tokens * params.qkv_stride) as usize, 3.0);
    // Words of the session's own part and of the shared one, and all values.
    let mut cache = || -> (Vec<u32>, Vec<u32>, Vec<f32>) {
        // Positions that no token sees hold NaN.
        let before = |position: u32| (position * kv_heads * head_dim) as usize;
        let mut values = trial::poisoned(before(context));
        for value in &mut values[before(visible(window, position).0)..before(position + tokens)] {
            *value = rng.range(-2.0, 2.0);
        }
        let (shared, own) = values.split_at(before(prefix));
        // Whole vectors; an empty part is bound, but not read.
        let packed = |values: &[f32]| {
            let (mut words, _) = variant.kv.pack(values, [kv_heads, head_dim]);
            words.resize(words.len().next_multiple_of(4).max(4), 0);
            words
        };
        (packed(own), packed(shared), variant.kv.pack(&values, [kv_heads, head_dim]).1)
    };
    let ((k_words, k_shared, k), (v_words, v_shared, v)) = (cache(), cache());
    let rows = (tokens * heads * params.splits_max) as usize;
    let mut out = trial::poisoned(rows * head_dim as usize);
    let mut ml = vec![[f32::from_bits(trial::POISON); 2]; rows];
    let (out_words, ml_words) = (trial::words(&out), trial::words(ml.as_flattened()));
    let storage = vec![trial::words(&qkv), k_words, v_words, out_words, ml_words, k_shared, v_shared];
    reference(&params, &step, &qkv, &k, &v, &mut out, &mut ml);
    let (out_tolerance, ml_tolerance) = tolerances(head_dim, &out, &ml);
    Trial {
        label: format!("{case:?}"),
        params: bytemuck::bytes_of(&params).to_vec(),
        step,
        storage,
        grid: grid(&params, position, tokens),
        expected: vec![
            Expected::close(5, out, out_tolerance),
            Expected::close(6, ml.as_flattened().to_vec(), ml_tolerance),
        ],
    }
}

/// Of the partial results `out` and `ml`.
pub(crate) fn tolerances(head_dim: u32, out: &[f32], ml: &[[f32; 2]]) -> (Vec<f32>, Vec<f32>) {
    let of_out = (0..out.len()).map(|i| TOLERANCE * 2.0 * ml[i / head_dim as usize][1]).collect();
    (of_out, ml.iter().flat_map(|&[m, l]| [TOLERANCE * (m.abs() + 1.0), TOLERANCE * l]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Splitting and reducing is the softmax over all visible positions.
    #[test]
    fn splits_add_up_to_plain_attention() {
        let mut rng = Rng::new(7);
        for window in [0, 5, 40] {
            let (position, head_dim, context, split_len) = (70, 4, 80, 16);
            let splits_max = splits_max(window, split_len, context);
            let params = Params {
                heads: 2,
                kv_heads: 1,
                head_dim,
                qkv_stride: 4 * head_dim,
                context,
                scale: 0.5,
                window,
                splits_max,
                split_len,
                cap: 0.0,
                prefix: 0,
                pad: 0,
            };
            let step = Step { n_tokens: 1, position, ..Step::default() };
            let qkv = rng.values(16, 2.0);
            let (k, v) =
                (rng.values((context * head_dim) as usize, 2.0), rng.values((context * head_dim) as usize, 2.0));
            let rows = (2 * splits_max) as usize;
            let (mut partial, mut ml, mut out) = (vec![0.0; rows * 4], vec![[0.0; 2]; rows], vec![0.0; 8]);
            reference(&params, &step, &qkv, &k, &v, &mut partial, &mut ml);
            let reduce = attention_reduce::Params {
                heads: 2,
                head_dim,
                out_stride: 8,
                window,
                splits_max,
                split_len,
                flags: 0,
                stage_quads: 0,
            };
            attention_reduce::reference(&reduce, &step, &partial, &ml, &mut out);

            let (first, last) = visible(window, position);
            for head in 0..2 {
                let score = |j: u32| -> f32 {
                    (0..4).map(|d| qkv[head * 4 + d] * k[(j * head_dim) as usize + d]).sum::<f32>() * 0.5
                };
                let total: f32 = (first..=last).map(|j| score(j).exp()).sum();
                for d in 0..4 {
                    let value: f32 = (first..=last).map(|j| score(j).exp() * v[(j * head_dim) as usize + d]).sum();
                    assert!((value / total - out[head * 4 + d]).abs() < 1e-4, "window {window}");
                }
            }
        }
    }

    #[test]
    fn every_position_has_room_for_its_splits() {
        for window in [0, 1, 7, 64, 100] {
            for split_len in [1, 8, 64, 500] {
                for position in 0..300 {
                    let (first, last) = visible(window, position);
                    let needed = last / split_len - first / split_len + 1;
                    assert!(needed <= splits(window, split_len, position, 1));
                    assert!(splits(window, split_len, position, 4) <= splits_max(window, split_len, 304));
                }
            }
        }
    }
}
