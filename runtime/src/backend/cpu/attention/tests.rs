//! Attention against its definition, over caches of every type.

use half::f16;

use super::super::kernels::{self, Kernels};
use super::*;
use crate::backend::{KvType, Q8_GROUP};

struct Case {
    shape: AttentionShape,
    /// Positions before the step, tokens of the step, and what a token sees.
    position: usize,
    n_tokens: usize,
    window: usize,
    softcap: Option<f32>,
}

fn case(heads: u32, kv_heads: u32, head_dim: u32, position: usize, n_tokens: usize, window: usize) -> Case {
    let shape = AttentionShape { heads, kv_heads, head_dim, rotary_dim: 0 };
    Case { shape, position, n_tokens, window, softcap: None }
}

/// Within a split, on its edges and over several, with few tokens and many, heads of whole groups and parts of one.
fn cases() -> Vec<Case> {
    const ALL: usize = usize::MAX;
    vec![
        case(1, 1, 8, 0, 1, ALL),
        case(4, 2, 64, 37, 3, ALL),
        case(3, 1, 80, 511, 1, ALL),
        case(3, 3, 40, 505, 9, ALL),
        case(8, 2, 32, 1200, 1, ALL),
        case(2, 1, 64, 1530, 8, ALL),
        case(2, 1, 16, 1020, 30, 300),
        case(2, 1, 16, 1030, 4, 700),
        Case { softcap: Some(2.0), ..case(4, 1, 96, 700, 2, ALL) },
    ]
}

struct Random(u64);

impl Random {
    fn floats(&mut self, n: usize, scale: f32) -> Vec<f32> {
        let mut next = || {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale
        };
        (0..n).map(|_| next()).collect()
    }
}

/// A cache whose first positions are `qkv`, some of them shared with forks.
fn filled(kernels: &dyn Kernels, shape: &AttentionShape, kv_type: KvType, qkv: &mut [f32], forks: &[usize]) -> Cache {
    let width = width(shape);
    let layout = Layout::new(shape, qkv.len() / width, kv_type).unwrap();
    let mut cache = Cache::new(layout).unwrap();
    let mut from = 0;
    for &to in forks.iter().chain(&[qkv.len() / width]) {
        rope_append(
            &mut Pool::new(2),
            &mut qkv[from * width..to * width],
            width,
            &mut cache,
            None,
            shape,
            from,
            kernels,
        );
        cache = cache.fork(to).unwrap();
        from = to;
    }
    cache
}

fn width(shape: &AttentionShape) -> usize {
    ((shape.heads + 2 * shape.kv_heads) * shape.head_dim) as usize
}

/// Every unit, `at_once` of them at a time, on `threads`.
fn computed(kernels: &dyn Kernels, inputs: &Inputs<'_>, threads: usize, at_once: usize) -> Vec<f32> {
    let shape = &inputs.shape;
    let context = inputs.position + inputs.n_tokens;
    let scratch: Vec<_> = (0..threads)
        .map(|_| {
            let sums = vec![f32::NAN; scratch_scores(shape, context, inputs.n_tokens)];
            Mutex::new(Scratch { weights: vec![f32::NAN; scratch_rows(shape)], sums })
        })
        .collect();
    let mut partials = vec![f32::NAN; partials_len(shape, context, inputs.n_tokens).unwrap()];
    let mut pool = Pool::new(threads);
    let mut out = vec![f32::NAN; inputs.n_tokens * (shape.heads * shape.head_dim) as usize];
    let units = units(shape, inputs.position, inputs.n_tokens, inputs.window);
    for first in (0..units).step_by(at_once) {
        let part = first..units.min(first + at_once);
        attention(&mut pool, &scratch, kernels, inputs, &mut partials, part, &mut out);
    }
    out
}

/// Keys and values as the cache holds them, (kv_heads, positions, head_dim) each.
fn held(shape: &AttentionShape, kv_type: KvType, cache: &Cache, positions: usize) -> [Vec<f32>; 2] {
    let dim = shape.head_dim as usize;
    let head_bytes = kv_type.row_bytes(shape.head_dim) as usize * positions;
    let mut bytes = vec![7; 2 * shape.kv_heads as usize * head_bytes];
    cache.save(positions, &mut bytes);
    let mut again = Cache::new(Layout::new(shape, positions, kv_type).unwrap()).unwrap();
    again.load(positions, &bytes);
    let mut saved = vec![9; bytes.len()];
    again.save(positions, &mut saved);
    assert!(saved == bytes);
    let head = |bytes: &[u8]| -> Vec<f32> {
        match kv_type {
            KvType::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            KvType::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            KvType::Q8 => {
                let (codes, scales) = bytes.split_at(positions * dim);
                let row = kv_type.scale_bytes(shape.head_dim) as usize;
                let scale = |position: usize, group: usize| {
                    let at = position * row + 2 * group;
                    f16::from_le_bytes([scales[at], scales[at + 1]]).to_f32()
                };
                let value = |i: usize| f32::from(codes[i] as i8) * scale(i / dim, i % dim / Q8_GROUP);
                (0..codes.len()).map(value).collect()
            }
        }
    };
    let (keys, values) = bytes.split_at(bytes.len() / 2);
    [keys, values].map(|part| part.chunks(head_bytes).flat_map(head).collect())
}

#[test]
fn attention_matches_its_definition_and_no_schedule_changes_it() {
    let mut random = Random(5);
    for kernels in kernels::all() {
        for (case, kv_type) in cases().iter().flat_map(|c| [KvType::F16, KvType::F32, KvType::Q8].map(|kv| (c, kv))) {
            let Case { shape, position, n_tokens, window, softcap: cap } = *case;
            let (width, dim, positions) = (width(&shape), shape.head_dim as usize, position + n_tokens);
            let mut qkv = random.floats(positions * width, 2.0);
            let forks = [position / 3, position / 2 + 1].map(|at| at.min(position));
            let cache = filled(&*kernels, &shape, kv_type, &mut qkv, &forks);
            let [keys, values] = held(&shape, kv_type, &cache, positions);
            let inputs = |first: usize, n_tokens: usize| Inputs {
                qkv: &qkv[(position + first) * width..],
                qkv_width: width,
                cache: &cache,
                shape,
                position: position + first,
                n_tokens,
                scale: 0.3,
                softcap: cap,
                window,
            };
            let found = computed(&*kernels, &inputs(0, n_tokens), 1, usize::MAX);
            for (t, head) in (0..n_tokens).flat_map(|t| (0..shape.heads as usize).map(move |h| (t, h))) {
                let seen = (position + t + 1).saturating_sub(window)..position + t + 1;
                let query = &qkv[(position + t) * width + head * dim..][..dim];
                let line = head / (shape.heads / shape.kv_heads) as usize * positions;
                let row = |of: &[f32], j: usize| of[(line + j) * dim..][..dim].to_vec();
                let score = |j: usize| {
                    let dot: f64 = query.iter().zip(row(&keys, j)).map(|(a, b)| f64::from(*a) * f64::from(b)).sum();
                    cap.map_or(0.3 * dot, |cap| f64::from(cap) * (0.3 * dot / f64::from(cap)).tanh())
                };
                let scores: Vec<f64> = seen.clone().map(score).collect();
                let most = scores.iter().fold(f64::MIN, |a, b| a.max(*b));
                let total: f64 = scores.iter().map(|s| (s - most).exp()).sum();
                for i in 0..dim {
                    let weighted = seen
                        .clone()
                        .zip(&scores)
                        .map(|(j, s)| (s - most).exp() / total * f64::from(values[(line + j) * dim + i]));
                    let (expected, found) = (weighted.sum::<f64>(), found[(t * shape.heads as usize + head) * dim + i]);
                    assert!(
                        (f64::from(found) - expected).abs() < 2e-5,
                        "{} {kv_type:?} {shape:?} at {position} + {t}: {found} for {expected}",
                        kernels.name()
                    );
                }
            }
            for (threads, at_once) in [(1, 1), (3, 2), (2, usize::MAX)] {
                assert_eq!(computed(&*kernels, &inputs(0, n_tokens), threads, at_once), found);
            }
            let cut = n_tokens / 3;
            let mut pieces = if cut > 0 { computed(&*kernels, &inputs(0, cut), 2, 5) } else { Vec::new() };
            pieces.extend(computed(&*kernels, &inputs(cut, n_tokens - cut), 2, 5));
            assert_eq!(pieces, found, "{kv_type:?} {shape:?} at {position}");
        }
    }
}
