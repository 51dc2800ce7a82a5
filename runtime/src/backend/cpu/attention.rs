//! Rotation, KV cache and attention on the CPU.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use half::f16;
use memmap2::MmapMut;

use super::kernels::Kernels;
use super::pool::{Parts, Pool};
use super::vector::Outer;
use super::{Scratch, softcap, zero_pages};
use crate::backend::{AttentionShape, KvType};
use crate::error::Result;

/// Positions whose keys are stored side by side.
const LANES: usize = 16;

/// Where a layer's keys and values are.
///
/// Values are (kv_heads, positions, head_dim). Keys are (kv_heads, positions / 16, head_dim, 16), so that sixteen scores
/// are sums of the lanes of one vector. Positions are those of the context, rounded up to a multiple of 16.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    kv_heads: usize,
    positions: usize,
    dim: usize,
}

impl Layout {
    pub(super) fn new(shape: &AttentionShape, context: usize) -> Option<Self> {
        let positions = context.checked_next_multiple_of(LANES)?;
        Some(Self { kv_heads: shape.kv_heads as usize, positions, dim: shape.head_dim as usize })
    }

    /// Elements of all keys, or of all values.
    pub(super) fn len(&self) -> Option<usize> {
        self.kv_heads.checked_mul(self.dim)?.checked_mul(self.positions)
    }

    /// The first element of a position's values.
    fn value(&self, head: usize, position: usize) -> usize {
        (head * self.positions + position) * self.dim
    }

    /// The first element of a position's key; the others are [`LANES`] apart.
    fn key(&self, head: usize, position: usize) -> usize {
        (head * self.positions + position / LANES * LANES) * self.dim + position % LANES
    }
}

/// Keys (or values) of one layer. Pages of their own: a cache is large and fills slowly, and memory from the allocator may
/// have to be cleared, and so become resident, at once.
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

    /// Writes `values` [`LANES`] elements apart.
    fn scatter(&mut self, at: usize, values: &[f32]) {
        match self.kv_type {
            KvType::F16 => {
                let to = &mut bytemuck::cast_slice_mut::<u8, f16>(&mut self.pages)[at..];
                to.iter_mut().step_by(LANES).zip(values).for_each(|(to, value)| *to = f16::from_f32(*value));
            }
            KvType::F32 => {
                let to = &mut bytemuck::cast_slice_mut::<u8, f32>(&mut self.pages)[at..];
                to.iter_mut().step_by(LANES).zip(values).for_each(|(to, value)| *to = *value);
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
    layout: Layout,
}

impl Cache {
    pub(super) fn new(kv_type: KvType, layout: Layout) -> Result<Self> {
        Ok(Self { shared: Vec::new(), own: Pair::new(kv_type, layout.len())?, kv_type, layout })
    }

    /// A cache that shares the first `positions`; both write what follows to memory of their own.
    pub(super) fn fork(&mut self, positions: usize) -> Result<Self> {
        let fork = Pair::new(self.kv_type, self.layout.len())?;
        self.truncate(positions);
        if self.shared.last().map_or(0, |(_, end)| *end) < positions {
            let own = Pair::new(self.kv_type, self.layout.len())?;
            self.shared.push((Arc::new(std::mem::replace(&mut self.own, own)), positions));
        }
        Ok(Self { shared: self.shared.clone(), own: fork, kv_type: self.kv_type, layout: self.layout })
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

    /// Copies bytes of the first `positions` of every head to `out`, keys, then values, (kv_heads, positions, head_dim).
    pub(super) fn save(&self, positions: usize, out: &mut [u8]) {
        let size = self.kv_type.size();
        let row = self.layout.dim * size;
        let (keys, values) = out.split_at_mut(out.len() / 2);
        for (rows, is_key) in [(keys, true), (values, false)] {
            for (i, row) in rows.chunks_exact_mut(row).enumerate() {
                let (head, position) = (i / positions, i % positions);
                let (pair, _) = self.at(position);
                match is_key {
                    true => {
                        let from = pair.keys.pages[self.layout.key(head, position) * size..].chunks(LANES * size);
                        row.chunks_exact_mut(size).zip(from).for_each(|(to, from)| to.copy_from_slice(&from[..size]));
                    }
                    false => {
                        let from = self.layout.value(head, position) * size;
                        row.copy_from_slice(&pair.values.pages[from..from + row.len()]);
                    }
                }
            }
        }
    }

    /// Takes back what [`Self::save`] gave.
    pub(super) fn load(&mut self, positions: usize, bytes: &[u8]) {
        self.truncate(0);
        let size = self.kv_type.size();
        let row = self.layout.dim * size;
        let (keys, values) = bytes.split_at(bytes.len() / 2);
        for (rows, is_key) in [(keys, true), (values, false)] {
            for (i, row) in rows.chunks_exact(row).enumerate() {
                let (head, position) = (i / positions, i % positions);
                match is_key {
                    true => {
                        let at = self.layout.key(head, position) * size;
                        let to = self.own.keys.pages[at..].chunks_mut(LANES * size);
                        row.chunks_exact(size).zip(to).for_each(|(from, to)| to[..size].copy_from_slice(from));
                    }
                    false => {
                        let to = self.layout.value(head, position) * size;
                        self.own.values.pages[to..to + row.len()].copy_from_slice(row);
                    }
                }
            }
        }
    }
}

/// Positions whose values are widened at a time.
const POSITIONS: usize = 64;
/// Tokens of a unit of work.
pub(super) const TOKENS: usize = 8;

/// Rows of queries of a unit.
fn rows(shape: &AttentionShape) -> usize {
    TOKENS * (shape.heads / shape.kv_heads) as usize
}

/// Elements of [`Scratch::weights`] that attention needs: widened keys or values, queries, and sums of values.
pub(super) fn scratch_rows(shape: &AttentionShape) -> usize {
    (POSITIONS + 2 * rows(shape)) * shape.head_dim as usize
}

/// Elements of [`Scratch::sums`] that attention of at most `max_tokens` needs: the scores of a unit's queries.
pub(super) fn scratch_scores(shape: &AttentionShape, context: usize, max_tokens: usize) -> usize {
    let rows = rows(shape) / TOKENS * TOKENS.min(max_tokens);
    rows.saturating_mul(context.saturating_add(2 * LANES))
}

/// Units of the attention of `n_tokens`.
pub(super) fn units(shape: &AttentionShape, n_tokens: usize) -> usize {
    n_tokens.div_ceil(TOKENS) * shape.kv_heads as usize
}

/// See [`crate::backend::Op::RopeAppend`]. `rope` is (context, rotary_dim / 2, 2).
#[allow(clippy::too_many_arguments, reason = "the operation's operands, each of another kind")]
pub(super) fn rope_append(
    qkv: &mut [f32],
    width: usize,
    cache: &mut Cache,
    rope: Option<&[f32]>,
    shape: &AttentionShape,
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
            let (key, value) = (cache.layout.key(h, position + t), cache.layout.value(h, position + t));
            cache.own.keys.scatter(key, &row[(heads + h) * dim..][..dim]);
            cache.own.values.write(kernels, value, &row[(heads + kv_heads + h) * dim..][..dim]);
        }
    }
}

/// Operands of [`attention`].
pub(super) struct Inputs<'a> {
    pub(super) qkv: &'a [f32],
    pub(super) qkv_width: usize,
    pub(super) cache: &'a Cache,
    pub(super) shape: AttentionShape,
    pub(super) position: usize,
    pub(super) n_tokens: usize,
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
    pub(super) window: usize,
}

/// See [`crate::backend::Op::Attention`]; computes the units `part`: each a few tokens and a KV head, so that keys and
/// values are brought once for all query heads that share them.
pub(super) fn attention(
    pool: &mut Pool,
    scratch: &[Mutex<Scratch>],
    kernels: &dyn Kernels,
    inputs: &Inputs<'_>,
    part: Range<usize>,
    out: &mut [f32],
) {
    let shape = &inputs.shape;
    let (heads, kv_heads, dim) = (shape.heads as usize, shape.kv_heads as usize, shape.head_dim as usize);
    let width = heads / kv_heads * dim;
    let output = Parts::new(out);
    pool.run(part.len(), &|task, worker| {
        let task = part.start + task;
        // Late tokens see more keys: deal them first, so that the last tasks are short.
        let last = inputs.n_tokens - task / kv_heads * TOKENS;
        let unit = Unit { kv_head: task % kv_heads, tokens: last.saturating_sub(TOKENS)..last };
        let mut scratch = scratch[worker].lock().unwrap_or_else(|e| e.into_inner());
        let sums = unit.attend(kernels, inputs, &mut scratch);
        for (t, sums) in unit.tokens.clone().zip(sums.chunks_exact(width)) {
            // SAFETY: no other unit has this token and KV head.
            unsafe { output.part(t * heads * dim + unit.kv_head * width, width) }.copy_from_slice(sums);
        }
    });
}

/// Tokens and the KV head that they look at.
struct Unit {
    kv_head: usize,
    tokens: Range<usize>,
}

impl Unit {
    /// The sums of values, (tokens, query heads of the KV head, head_dim).
    fn attend<'a>(&self, kernels: &dyn Kernels, inputs: &Inputs<'_>, scratch: &'a mut Scratch) -> &'a [f32] {
        let shape = &inputs.shape;
        let (group, dim) = ((shape.heads / shape.kv_heads) as usize, shape.head_dim as usize);
        let rows = self.tokens.len() * group;
        let (widened, rest) = scratch.weights.split_at_mut(POSITIONS * dim);
        let (queries, rest) = rest.split_at_mut(rows * dim);
        let sums = &mut rest[..rows * dim];
        for (t, queries) in self.tokens.clone().zip(queries.chunks_exact_mut(group * dim)) {
            let from = &inputs.qkv[t * inputs.qkv_width + self.kv_head * group * dim..][..group * dim];
            queries.iter_mut().zip(from).for_each(|(to, from)| *to = from * inputs.scale);
        }
        // Positions that each token sees.
        let seen = |t: usize| {
            let end = inputs.position + t + 1;
            end.saturating_sub(inputs.window)..end
        };
        let (first, end) = (seen(self.tokens.start).start / LANES * LANES, seen(self.tokens.end - 1).end);
        let stride = (end - first).next_multiple_of(LANES);
        let scores = &mut scratch.sums[..rows * stride];
        for block in (first..end).step_by(LANES) {
            self.scores(kernels, inputs, block, end, queries, widened, &mut scores[block - first..], stride);
        }
        for (t, scores) in self.tokens.clone().zip(scores.chunks_exact_mut(group * stride)) {
            let seen = seen(t);
            for scores in scores.chunks_exact_mut(stride) {
                let scores = &mut scores[seen.start - first..seen.end - first];
                if inputs.softcap.is_some() {
                    scores.iter_mut().for_each(|score| *score = softcap(*score, inputs.softcap));
                }
                kernels.softmax(scores);
            }
        }
        sums.fill(0.0);
        let mut next = first;
        while next < end {
            let from = next;
            let (store, store_end) = inputs.cache.at(from);
            next = (from / POSITIONS * POSITIONS + POSITIONS).min(end).min(store_end);
            let at = inputs.cache.layout.value(self.kv_head, from);
            let values = store.values.read(kernels, at, (next - from) * dim, widened);
            let part = |t: usize| seen(t).start.clamp(from, next)..seen(t).end.clamp(from, next);
            // Tokens that see the same of these positions are computed together.
            let mut t = self.tokens.start;
            while t < self.tokens.end {
                let part_of_t = part(t);
                let alike = (t..self.tokens.end).take_while(|&t| part(t) == part_of_t).count();
                let row = (t - self.tokens.start) * group;
                t += alike;
                if part_of_t.is_empty() {
                    continue;
                }
                kernels.outer(
                    (&scores[row * stride + part_of_t.start - first..], stride),
                    (&values[(part_of_t.start - from) * dim..], dim),
                    (&mut sums[row * dim..], dim),
                    Outer { rows: alike * group, depth: part_of_t.len(), columns: dim, add: true },
                );
            }
        }
        sums
    }

    /// Scores of the block of positions from `block` on, those from `end` on being anything; rows are `stride` apart.
    #[allow(clippy::too_many_arguments, reason = "operands, extents and scratch memory of one product")]
    fn scores(
        &self,
        kernels: &dyn Kernels,
        inputs: &Inputs<'_>,
        block: usize,
        end: usize,
        queries: &[f32],
        widened: &mut [f32],
        scores: &mut [f32],
        stride: usize,
    ) {
        let dim = inputs.shape.head_dim as usize;
        let at = inputs.cache.layout.key(self.kv_head, block);
        let extents = Outer { rows: queries.len() / dim, depth: dim, columns: LANES, add: false };
        let stop = end.min(block + LANES);
        let mut next = block;
        while next < stop {
            let (store, store_end) = inputs.cache.at(next);
            let keys = store.keys.read(kernels, at, dim * LANES, widened);
            if next == block && store_end >= stop {
                kernels.outer((queries, dim), (keys, LANES), (scores, stride), extents);
                return;
            }
            // A fork ends inside the block.
            let lanes = next - block..store_end.min(stop) - block;
            next = block + lanes.end;
            for (row, query) in queries.chunks_exact(dim).enumerate() {
                let mut all = [0.0; LANES];
                kernels.outer((query, dim), (keys, LANES), (&mut all, LANES), Outer { rows: 1, ..extents });
                scores[row * stride..][lanes.clone()].copy_from_slice(&all[lanes.clone()]);
            }
        }
    }
}
