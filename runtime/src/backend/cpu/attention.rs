//! Rotation, KV cache and attention on the CPU.

use std::sync::{Arc, Mutex};

use half::f16;
use memmap2::MmapMut;

use super::kernels::Kernels;
use super::pool::Pool;
use super::{Scratch, softcap, zero_pages};
use crate::backend::{AttentionShape, KvType};
use crate::error::Result;

/// Keys (or values) of one layer, (kv_heads, context, head_dim). Pages of their own: a cache is large and fills
/// slowly, and memory from the allocator may have to be cleared, and so become resident, at once.
struct Store {
    kv_type: KvType,
    pages: MmapMut,
}

impl Store {
    fn new(kv_type: KvType, n: Option<usize>) -> Result<Self> {
        let bytes = n.and_then(|n| n.checked_mul(kv_type.size()));
        Ok(Self { kv_type, pages: zero_pages(bytes, "the KV cache")? })
    }

    fn write(&mut self, kernels: &dyn Kernels, at: usize, values: &[f32]) {
        let range = at..at + values.len();
        match self.kv_type {
            KvType::F16 => {
                kernels.narrow_f16(values, &mut bytemuck::cast_slice_mut::<u8, f16>(&mut self.pages)[range]);
            }
            KvType::F32 => {
                bytemuck::cast_slice_mut::<u8, f32>(&mut self.pages)[range].copy_from_slice(values);
            }
        }
    }

    /// `len` elements from `at` on as f32, through `scratch` if they are stored as f16.
    fn read<'a>(&'a self, kernels: &dyn Kernels, at: usize, len: usize, scratch: &'a mut [f32]) -> &'a [f32] {
        match self.kv_type {
            KvType::F16 => {
                let scratch = &mut scratch[..len];
                kernels.expand_f16(&self.pages[2 * at..2 * (at + len)], scratch);
                scratch
            }
            KvType::F32 => &bytemuck::cast_slice::<u8, f32>(&self.pages)[at..at + len],
        }
    }
}

/// Keys and values of one layer.
struct Pair {
    keys: Store,
    values: Store,
}

impl Pair {
    fn new(kv_type: KvType, n: Option<usize>) -> Result<Self> {
        Ok(Self { keys: Store::new(kv_type, n)?, values: Store::new(kv_type, n)? })
    }
}

/// KV cache of one layer: leading positions may be shared with forks, the others are its own. Every store has room for
/// the whole context and the same layout; pages never written cost nothing.
pub(super) struct Cache {
    /// Positions before the end belong to the store, unless an earlier entry has them; ends ascend.
    shared: Vec<(Arc<Pair>, usize)>,
    own: Pair,
    kv_type: KvType,
    n: Option<usize>,
}

impl Cache {
    /// `n` elements of keys and as many of values.
    pub(super) fn new(kv_type: KvType, n: Option<usize>) -> Result<Self> {
        Ok(Self { shared: Vec::new(), own: Pair::new(kv_type, n)?, kv_type, n })
    }

    /// A cache that shares the first `positions`; both write what follows to memory of their own.
    pub(super) fn fork(&mut self, positions: usize) -> Result<Self> {
        let fork = Pair::new(self.kv_type, self.n)?;
        self.truncate(positions);
        if self.shared.last().map_or(0, |(_, end)| *end) < positions {
            let own = Pair::new(self.kv_type, self.n)?;
            self.shared.push((Arc::new(std::mem::replace(&mut self.own, own)), positions));
        }
        Ok(Self { shared: self.shared.clone(), own: fork, kv_type: self.kv_type, n: self.n })
    }

    /// Stops sharing positions from `positions` on, which are about to be written.
    pub(super) fn truncate(&mut self, positions: usize) {
        let mut before = 0;
        self.shared.retain_mut(|(_, end)| {
            *end = (*end).min(positions);
            let keep = *end > before;
            before = *end;
            keep
        });
    }

    /// The store of position `at`, and the end of the positions it has.
    fn at(&self, at: usize) -> (&Pair, usize) {
        match self.shared.iter().find(|(_, end)| at < *end) {
            Some((pair, end)) => (pair, *end),
            None => (&self.own, usize::MAX),
        }
    }

    /// Copies bytes of the first `positions` of every head to `out`, keys, then values.
    pub(super) fn save(&self, shape: &AttentionShape, context: usize, positions: usize, out: &mut [u8]) {
        let position_bytes = shape.head_dim as usize * self.kv_type.size();
        let (keys, values) = out.split_at_mut(out.len() / 2);
        for (out, pick) in [(keys, Pair::key_pages as fn(&Pair) -> &MmapMut), (values, Pair::value_pages)] {
            for (head, out) in out.chunks_exact_mut((positions * position_bytes).max(1)).enumerate() {
                let mut at = 0;
                while at < positions {
                    let (pair, end) = self.at(at);
                    let end = end.min(positions);
                    let from = (head * context + at) * position_bytes;
                    let len = (end - at) * position_bytes;
                    out[at * position_bytes..][..len].copy_from_slice(&pick(pair)[from..from + len]);
                    at = end;
                }
            }
        }
    }

    /// Takes back what [`Self::save`] gave.
    pub(super) fn load(&mut self, shape: &AttentionShape, context: usize, positions: usize, bytes: &[u8]) {
        self.truncate(0);
        let position_bytes = shape.head_dim as usize * self.kv_type.size();
        let (keys, values) = bytes.split_at(bytes.len() / 2);
        for (bytes, pages) in [(keys, &mut self.own.keys.pages), (values, &mut self.own.values.pages)] {
            for (head, bytes) in bytes.chunks_exact((positions * position_bytes).max(1)).enumerate() {
                pages[head * context * position_bytes..][..bytes.len()].copy_from_slice(bytes);
            }
        }
    }
}

impl Pair {
    fn key_pages(&self) -> &MmapMut {
        &self.keys.pages
    }

    fn value_pages(&self) -> &MmapMut {
        &self.values.pages
    }
}

/// Positions whose keys or values are widened at a time.
const POSITIONS: usize = 32;

/// Elements of [`Scratch::weights`] that attention needs.
pub(super) fn scratch_rows(shape: &AttentionShape) -> usize {
    POSITIONS * shape.head_dim as usize
}

/// Elements of [`Scratch::sums`] that attention needs: the scores of the query heads that share a KV head.
pub(super) fn scratch_scores(shape: &AttentionShape, context: usize) -> usize {
    (shape.heads / shape.kv_heads) as usize * context
}

/// See [`crate::backend::Op::RopeAppend`]. `rope` is (context, rotary_dim / 2, 2).
#[allow(clippy::too_many_arguments, reason = "the operation's operands, each of another kind")]
pub(super) fn rope_append(
    qkv: &mut [f32],
    width: usize,
    cache: &mut Cache,
    rope: Option<&[f32]>,
    shape: &AttentionShape,
    context: usize,
    position: usize,
    kernels: &dyn Kernels,
) {
    let (heads, kv_heads) = (shape.heads as usize, shape.kv_heads as usize);
    let (dim, rotary) = (shape.head_dim as usize, shape.rotary_dim as usize);
    for (t, row) in qkv.chunks_exact_mut(width).enumerate() {
        if let Some(rope) = rope {
            let angles = &rope[(position + t) * rotary..][..rotary];
            for head in row.chunks_exact_mut(dim).take(heads + kv_heads) {
                let (first, second) = head[..rotary].split_at_mut(rotary / 2);
                for ((a, b), angle) in first.iter_mut().zip(second).zip(angles.as_chunks::<2>().0) {
                    let [cos, sin] = *angle;
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
        for h in 0..kv_heads {
            let at = (h * context + position + t) * dim;
            cache.own.keys.write(kernels, at, &row[(heads + h) * dim..][..dim]);
            cache.own.values.write(kernels, at, &row[(heads + kv_heads + h) * dim..][..dim]);
        }
    }
}

/// Operands of [`attention`].
pub(super) struct Inputs<'a> {
    pub(super) qkv: &'a [f32],
    pub(super) qkv_width: usize,
    pub(super) cache: &'a Cache,
    pub(super) shape: AttentionShape,
    pub(super) context: usize,
    pub(super) position: usize,
    pub(super) n_tokens: usize,
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
    pub(super) window: usize,
}

/// See [`crate::backend::Op::Attention`]; computes the tasks `part` of `n_tokens * kv_heads`. One task a token and KV head, so that keys and values are widened once for
/// all query heads that share them.
pub(super) fn attention(
    pool: &mut Pool,
    scratch: &[Mutex<Scratch>],
    kernels: &dyn Kernels,
    inputs: &Inputs<'_>,
    part: std::ops::Range<usize>,
    out: &mut [f32],
) {
    struct Output(*mut f32, usize);
    // SAFETY: each task writes only the columns of its own token and head group.
    unsafe impl Sync for Output {}
    impl Output {
        /// # Safety
        /// Concurrent calls must ask for disjoint ranges.
        #[allow(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
        unsafe fn range(&self, at: usize, len: usize) -> &mut [f32] {
            assert!(at + len <= self.1);
            // SAFETY: in bounds by the assertion, disjoint by the caller's promise.
            unsafe { std::slice::from_raw_parts_mut(self.0.add(at), len) }
        }
    }

    let shape = &inputs.shape;
    let (heads, kv_heads, dim) = (shape.heads as usize, shape.kv_heads as usize, shape.head_dim as usize);
    let group = heads / kv_heads;
    let output = Output(out.as_mut_ptr(), out.len());
    pool.run(part.len(), &|task, worker| {
        let task = part.start + task;
        // Late tokens see more keys: deal them first, so that the last tasks are short.
        let t = inputs.n_tokens - 1 - task / kv_heads;
        let kv_head = task % kv_heads;
        let mut scratch = scratch[worker].lock().unwrap_or_else(|e| e.into_inner());
        let Scratch { weights: rows, sums: scores } = &mut *scratch;
        let end = inputs.position + t + 1;
        let start = end.saturating_sub(inputs.window);
        let len = end - start;
        let base = kv_head * inputs.context;
        let q = &inputs.qkv[t * inputs.qkv_width + kv_head * group * dim..][..group * dim];
        // SAFETY: `task` is a bijection to (t, kv_head), so no other task has this range.
        let out = unsafe { output.range((t * heads + kv_head * group) * dim, group * dim) };

        let mut next = start;
        while next < end {
            let from = next;
            let (store, store_end) = inputs.cache.at(from);
            let n = (POSITIONS - (from - start) % POSITIONS).min(end.min(store_end) - from);
            next += n;
            let keys = store.keys.read(kernels, (base + from) * dim, n * dim, rows);
            for (q, scores) in q.chunks_exact(dim).zip(scores.chunks_exact_mut(len)) {
                for (key, score) in keys.chunks_exact(dim).zip(&mut scores[from - start..]) {
                    *score = softcap(kernels.dot(q, key) * inputs.scale, inputs.softcap);
                }
            }
        }
        for scores in scores.chunks_exact_mut(len).take(group) {
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut sum = 0.0;
            for score in scores.iter_mut() {
                *score = (*score - max).exp();
                sum += *score;
            }
            let factor = 1.0 / sum;
            scores.iter_mut().for_each(|score| *score *= factor);
        }
        out.fill(0.0);
        let mut next = start;
        while next < end {
            let from = next;
            let (store, store_end) = inputs.cache.at(from);
            let n = (POSITIONS - (from - start) % POSITIONS).min(end.min(store_end) - from);
            next += n;
            let values = store.values.read(kernels, (base + from) * dim, n * dim, rows);
            for (out, scores) in out.chunks_exact_mut(dim).zip(scores.chunks_exact(len)) {
                for (value, &score) in values.chunks_exact(dim).zip(&scores[from - start..]) {
                    kernels.axpy(score, value, out);
                }
            }
        }
    });
}
