//! Rotation, KV cache and attention on the CPU.
//!
//! Attention takes positions in splits of a fixed length, each with a softmax of its own, and merges their results in
//! order. So results do not depend on how many threads share the splits of a long context, on the budget, or on how a
//! prompt was cut.

use std::ops::Range;
use std::sync::Mutex;

use super::kernels::Kernels;
use super::pool::{Parts, Pool};
use super::vector::{self, Outer};
use super::{Scratch, softcap};
use crate::backend::AttentionShape;

use cache::LANES;
pub(super) use cache::{Cache, Layout};

mod cache;

/// Positions whose values are widened at a time.
const POSITIONS: usize = 64;
/// Positions of a split: enough that merging costs nothing beside them.
const SPLIT: usize = 512;
/// Tokens of a unit of work.
pub(super) const TOKENS: usize = 8;

/// Rows of queries of a unit.
fn rows(shape: &AttentionShape) -> usize {
    TOKENS * (shape.heads / shape.kv_heads) as usize
}

/// Elements of [`Scratch::weights`] that attention needs: widened keys or values with scales, queries, and sums of values of
/// a split and of all.
pub(super) fn scratch_rows(shape: &AttentionShape) -> usize {
    (2 * POSITIONS + 3 * rows(shape)) * shape.head_dim as usize
}

/// Elements of [`Scratch::sums`] that attention of at most `max_tokens` needs: the scores of a unit's queries, and what
/// their softmax is divided by.
pub(super) fn scratch_scores(shape: &AttentionShape, context: usize, max_tokens: usize) -> usize {
    let rows = rows(shape) / TOKENS * TOKENS.min(max_tokens);
    rows.saturating_mul(context.min(SPLIT) + 2 * LANES + 4)
}

/// Elements of the results of splits of at most `max_tokens`: (kv_heads, splits, rows of queries, head_dim + 2).
pub(super) fn partials_len(shape: &AttentionShape, context: usize, max_tokens: usize) -> Option<usize> {
    if context <= SPLIT {
        return Some(0);
    }
    let row = shape.head_dim as usize + 2;
    (shape.heads as usize * TOKENS.min(max_tokens)).checked_mul(context.div_ceil(SPLIT))?.checked_mul(row)
}

/// Splits of the positions that some token of a step sees.
fn splits_seen(position: usize, n_tokens: usize, window: usize) -> Range<usize> {
    (position + 1).saturating_sub(window) / SPLIT..(position + n_tokens).div_ceil(SPLIT)
}

/// Units of the attention of `n_tokens` from `position` on: KV heads of a few tokens, or, where tokens are few, splits of
/// KV heads.
pub(super) fn units(shape: &AttentionShape, position: usize, n_tokens: usize, window: usize) -> usize {
    let splits = if n_tokens <= TOKENS { splits_seen(position, n_tokens, window).len() } else { 1 };
    n_tokens.div_ceil(TOKENS) * shape.kv_heads as usize * splits
}

/// See [`crate::backend::Op::RopeAppend`]. `rope` is (context, rotary_dim / 2, 2).
#[allow(clippy::too_many_arguments, reason = "the operation's operands, each of another kind")]
pub(super) fn rope_append(
    pool: &mut Pool,
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
    let end = position + qkv.len() / width;
    let (rows, cache) = (Parts::new(qkv), cache.writer());
    // Keys of sixteen positions lie side by side.
    let (first, blocks) = (position / LANES, end.div_ceil(LANES) - position / LANES);
    let tasks = pool.tasks(blocks, LANES * width);
    pool.run(tasks, &|task, _| {
        let [from, to] = [task, task + 1].map(|task| LANES * (first + blocks * task / tasks));
        for at in from.max(position)..to.min(end) {
            // SAFETY: positions are dealt to tasks without overlap.
            let row = unsafe { rows.part((at - position) * width, width) };
            if let Some(rope) = rope {
                let angles = &rope[at * rotary..][..rotary];
                for head in row.chunks_exact_mut(dim).take(heads + kv_heads) {
                    let (first, second) = head[..rotary].split_at_mut(rotary / 2);
                    for ((a, b), angle) in first.iter_mut().zip(second).zip(angles.as_chunks::<2>().0) {
                        let [cos, sin] = *angle;
                        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                    }
                }
            }
            for h in 0..kv_heads {
                let (key, value) = (&row[(heads + h) * dim..][..dim], &row[(heads + kv_heads + h) * dim..][..dim]);
                // SAFETY: tasks have whole blocks of positions.
                unsafe { cache.write(kernels, h, at, (key, value)) };
            }
        }
    });
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

impl Inputs<'_> {
    /// Positions that token `t` sees.
    fn seen(&self, t: usize) -> Range<usize> {
        let end = self.position + t + 1;
        end.saturating_sub(self.window)..end
    }
}

/// See [`crate::backend::Op::Attention`]; computes the units `part`, each over keys and values that are brought once for all
/// query heads that share them. Where units are splits, `partials` keeps their results until the last one of a KV head.
pub(super) fn attention(
    pool: &mut Pool,
    scratch: &[Mutex<Scratch>],
    kernels: &dyn Kernels,
    inputs: &Inputs<'_>,
    partials: &mut [f32],
    part: Range<usize>,
    out: &mut [f32],
) {
    let shape = &inputs.shape;
    let (heads, kv_heads, dim) = (shape.heads as usize, shape.kv_heads as usize, shape.head_dim as usize);
    let width = heads / kv_heads * dim;
    let output = Parts::new(out);
    let splits = splits_seen(inputs.position, inputs.n_tokens, inputs.window);
    if inputs.n_tokens > TOKENS || splits.len() == 1 {
        pool.run(part.len(), &|task, worker| {
            let task = part.start + task;
            let first = task / kv_heads * TOKENS;
            let unit = Unit { kv_head: task % kv_heads, tokens: first..inputs.n_tokens.min(first + TOKENS) };
            let mut scratch = scratch[worker].lock().unwrap_or_else(|e| e.into_inner());
            let sums = unit.attend(kernels, inputs, &mut scratch);
            for (t, sums) in unit.tokens.clone().zip(sums.chunks_exact(width)) {
                // SAFETY: no other unit has this token and KV head.
                unsafe { output.part(t * heads * dim + unit.kv_head * width, width) }.copy_from_slice(sums);
            }
        });
        return;
    }
    let unit = |kv_head| Unit { kv_head, tokens: 0..inputs.n_tokens };
    let rows = inputs.n_tokens * heads / kv_heads;
    let split_len = rows * (dim + 2);
    let results = Parts::new(partials);
    pool.run(part.len(), &|task, worker| {
        let task = part.start + task;
        let mut scratch = scratch[worker].lock().unwrap_or_else(|e| e.into_inner());
        let mut work = Work::new(&mut scratch, rows, dim);
        let unit = unit(task / splits.len());
        unit.take_queries(inputs, work.queries);
        unit.split(kernels, inputs, splits.start + task % splits.len(), &mut work);
        // SAFETY: no other task has this number.
        let result = unsafe { results.part(task * split_len, split_len) };
        let (sums, stats) = result.split_at_mut(rows * dim);
        sums.copy_from_slice(work.sums);
        stats.copy_from_slice(work.stats.as_flattened());
    });
    // KV heads whose last split is done now.
    for kv_head in part.start / splits.len()..part.end / splits.len() {
        let of_head = &mut partials[kv_head * splits.len() * split_len..][..splits.len() * split_len];
        let (first, rest) = of_head.split_at_mut(split_len);
        let (sums, stats) = first.split_at_mut(rows * dim);
        for next in rest.chunks_exact(split_len) {
            let (more, more_stats) = next.split_at(rows * dim);
            merge((sums, stats.as_chunks_mut().0), (more, more_stats.as_chunks().0), dim);
        }
        divide(sums, stats.as_chunks().0, dim);
        for (t, sums) in sums.chunks_exact(width).enumerate() {
            out[t * heads * dim + kv_head * width..][..width].copy_from_slice(sums);
        }
    }
}

/// Largest score of a row, and the sum of the exponentials of the distances from it.
type Stats = [f32; 2];

/// Adds the results of a split to those of the splits before it, row by row.
fn merge((sums, stats): (&mut [f32], &mut [Stats]), (more, more_stats): (&[f32], &[Stats]), dim: usize) {
    let rows = sums.chunks_exact_mut(dim).zip(stats).zip(more.chunks_exact(dim).zip(more_stats));
    for ((sums, stats), (more, more_stats)) in rows {
        if more_stats[1] == 0.0 {
            continue;
        }
        if stats[1] == 0.0 {
            sums.copy_from_slice(more);
            *stats = *more_stats;
            continue;
        }
        let most = stats[0].max(more_stats[0]);
        let [before, now] = [stats[0], more_stats[0]].map(|of| vector::exp(of - most));
        sums.iter_mut().zip(more).for_each(|(sum, more)| *sum = *sum * before + more * now);
        *stats = [most, stats[1] * before + more_stats[1] * now];
    }
}

/// Makes weighted sums of values weighted means.
fn divide(sums: &mut [f32], stats: &[Stats], dim: usize) {
    for (sums, [_, total]) in sums.chunks_exact_mut(dim).zip(stats) {
        let factor = 1.0 / total;
        sums.iter_mut().for_each(|sum| *sum *= factor);
    }
}

/// Tokens and the KV head that they look at.
struct Unit {
    kv_head: usize,
    tokens: Range<usize>,
}

/// Scratch memory of a unit; rows are tokens and query heads of the KV head.
struct Work<'a> {
    widened: &'a mut [f32],
    /// (rows, head_dim), scaled.
    queries: &'a mut [f32],
    /// (rows, head_dim): sums of values of the last split.
    sums: &'a mut [f32],
    /// By row.
    stats: &'a mut [Stats],
    /// The same of all splits so far.
    all_sums: &'a mut [f32],
    all_stats: &'a mut [Stats],
    /// (rows, positions of the split)
    scores: &'a mut [f32],
}

impl<'a> Work<'a> {
    fn new(scratch: &'a mut Scratch, rows: usize, dim: usize) -> Self {
        let (widened, rest) = scratch.weights.split_at_mut(2 * POSITIONS * dim);
        let (queries, rest) = rest.split_at_mut(rows * dim);
        let (sums, rest) = rest.split_at_mut(rows * dim);
        let (stats, scores) = scratch.sums.split_at_mut(4 * rows);
        let (stats, all_stats) = stats.as_chunks_mut().0.split_at_mut(rows);
        Self { widened, queries, sums, stats, all_sums: &mut rest[..rows * dim], all_stats, scores }
    }
}

impl Unit {
    /// The weighted means of values, (tokens, query heads of the KV head, head_dim).
    fn attend<'a>(&self, kernels: &dyn Kernels, inputs: &Inputs<'_>, scratch: &'a mut Scratch) -> &'a [f32] {
        let shape = &inputs.shape;
        let (group, dim) = ((shape.heads / shape.kv_heads) as usize, shape.head_dim as usize);
        let mut work = Work::new(scratch, self.tokens.len() * group, dim);
        self.take_queries(inputs, work.queries);
        work.all_stats.fill([0.0; 2]);
        for split in splits_seen(inputs.position + self.tokens.start, self.tokens.len(), inputs.window) {
            self.split(kernels, inputs, split, &mut work);
            merge((work.all_sums, work.all_stats), (work.sums, work.stats), dim);
        }
        divide(work.all_sums, work.all_stats, dim);
        work.all_sums
    }

    fn take_queries(&self, inputs: &Inputs<'_>, queries: &mut [f32]) {
        let width = queries.len() / self.tokens.len();
        for (t, queries) in self.tokens.clone().zip(queries.chunks_exact_mut(width)) {
            let from = &inputs.qkv[t * inputs.qkv_width + self.kv_head * width..][..width];
            queries.iter_mut().zip(from).for_each(|(to, from)| *to = from * inputs.scale);
        }
    }

    /// Sums of values over the positions of a split, each times the exponential of its score's distance from the largest
    /// one of the split.
    fn split(&self, kernels: &dyn Kernels, inputs: &Inputs<'_>, split: usize, work: &mut Work<'_>) {
        let shape = &inputs.shape;
        let (group, dim) = ((shape.heads / shape.kv_heads) as usize, shape.head_dim as usize);
        // Positions of the split that some token sees, and those that each one sees.
        let begin = (inputs.seen(self.tokens.start).start / LANES * LANES).max(split * SPLIT);
        let end = inputs.seen(self.tokens.end - 1).end.min((split + 1) * SPLIT);
        let seen = |t: usize| {
            let seen = inputs.seen(t);
            seen.start.clamp(begin, end)..seen.end.clamp(begin, end)
        };
        let stride = (end - begin).next_multiple_of(LANES);
        let scores = &mut work.scores[..work.stats.len() * stride];
        for block in (begin..end).step_by(LANES) {
            self.scores(kernels, inputs, block, end, work.queries, work.widened, &mut scores[block - begin..], stride);
        }
        let rows = scores.chunks_exact_mut(group * stride).zip(work.stats.chunks_exact_mut(group));
        for (t, (scores, stats)) in self.tokens.clone().zip(rows) {
            let seen = seen(t);
            for (scores, stats) in scores.chunks_exact_mut(stride).zip(stats) {
                let scores = &mut scores[seen.start - begin..seen.end - begin];
                if inputs.softcap.is_some() {
                    scores.iter_mut().for_each(|score| *score = softcap(*score, inputs.softcap));
                }
                let (most, sum) = kernels.exponentials(scores);
                *stats = [most, sum];
            }
        }
        work.sums.fill(0.0);
        let mut next = begin;
        while next < end {
            let from = next;
            let positions = from..(from / POSITIONS * POSITIONS + POSITIONS).min(end);
            let (values, n) = inputs.cache.values(kernels, self.kv_head, positions, work.widened);
            next += n;
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
                    (&scores[row * stride + part_of_t.start - begin..], stride),
                    (&values[(part_of_t.start - from) * dim..], dim),
                    (&mut work.sums[row * dim..], dim),
                    Outer { rows: alike * group, depth: part_of_t.len(), columns: dim, add: true },
                );
            }
        }
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
        let extents = Outer { rows: queries.len() / dim, depth: dim, columns: LANES, add: false };
        let stop = end.min(block + LANES);
        let mut next = block;
        while next < stop {
            let (keys, store_end) = inputs.cache.keys(kernels, self.kv_head, next, widened);
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

#[cfg(test)]
mod tests;
