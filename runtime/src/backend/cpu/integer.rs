//! out[t, n] = sum_k x[t, k] * W[n, k] in integers: 4-bit codes times activations rounded to 16 bits.
//!
//! A weight is `s * q + b` with the code q and two numbers of its group (`b = -s * z` where the group has a zero point
//! z), so a group's part of a product is `s * sum(q x) + b * sum(x)`. Both sums are computed exactly on the rounded
//! activations, hence zero points cost one multiplication a group. Two things differ from the definition of a weight
//! in [`crate::tensor::W4Matrix`], which [`super::matmul`] computes with: the rounding of x, and that weights are not
//! rounded to half precision.
//!
//! Why not 8 bits, which take 5 instructions for 64 products instead of 8: even with a scale for every 4 columns they
//! move the logits of small models by more than 1 % of the largest one. 16 bits with a scale for a *span* of at most
//! [`MAX_SPAN`] columns are finer than the weights' own rounding to half precision.

use super::kernels::{Kernels, TILE};
use super::matmul::{Group, Output, TASKS_PER_THREAD, blocks, rows_of};
use super::pool::Pool;
use crate::backend::{Op, Program, RunnerConfig};
use crate::error::Result;
use crate::tensor::{W4Matrix, Weight};

/// Columns of a [`Block`].
pub(super) const BLOCK: usize = 64;
/// Codes of 4 bits in 16.
pub(super) const QUAD: usize = 4;
/// Most columns that share a scale: a lane of a kernel then sums at most 32 products of at most 15 * 32767, which stays
/// below 2^24 and is therefore exact in f32 too.
const MAX_SPAN: usize = 256;
/// Spans of a row are padded to a multiple of this with scales of 0.
pub(super) const OCTET: usize = 8;
/// Weight rows that meet a tile of tokens before the next one is loaded.
const ROWS: usize = 16;

/// Largest magnitude of a rounded activation.
const MAX_CODE: f32 = 32767.0;
/// Spans with nothing larger count as zeros, so that no scale is a subnormal number.
const TINY: f32 = 1e-30;

/// 64 columns of a row of activations in units of their span's scale: columns 0, 4, 8, ..., then 1, 5, 9, ... and so on,
/// the order in which shifts by 0, 4, 8 and 12 bring out the codes of a row's 16-bit words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(32))]
pub(super) struct Block(pub(super) [i16; BLOCK]);

impl Block {
    pub(super) const ZERO: Self = Self([0; BLOCK]);

    /// Where a column of a block is.
    const fn place(column: usize) -> usize {
        BLOCK / QUAD * (column % QUAD) + column / QUAD
    }
}

/// Whether products with this weight can be computed here.
pub(super) fn takes(weight: &Weight) -> Option<&W4Matrix> {
    match weight {
        Weight::W4(m) if m.k.is_multiple_of(BLOCK) && m.group_size.is_multiple_of(BLOCK) => Some(m),
        _ => None,
    }
}

/// Columns of `matrix` that share a scale of the activations: the largest part of a group that may.
fn span_of(matrix: &W4Matrix) -> usize {
    (1..=MAX_SPAN / BLOCK)
        .rev()
        .map(|n| n * BLOCK)
        .find(|span| matrix.group_size.is_multiple_of(*span))
        .unwrap_or(BLOCK)
}

/// Rows of rounded activations.
pub(super) struct Activations {
    rows: usize,
    k: usize,
    span: usize,
    /// (rows, k / 64)
    blocks: Vec<Block>,
    /// (rows, spans padded to octets)
    scales: Vec<f32>,
    /// The rounded activations of each span added up, in the same order.
    sums: Vec<f32>,
}

/// Blocks and padded spans of the largest inputs of a program's products.
fn capacity(program: &Program, config: &RunnerConfig) -> (u64, u64) {
    if config.exact {
        return (0, 0);
    }
    let inputs = program.ops.iter().filter_map(|op| {
        let (x, rows) = match op {
            Op::Linear { x, .. } => (x, x),
            // An input goes through several experts.
            Op::Experts { x, out, .. } => (x, &out.buffer),
            _ => return None,
        };
        let (x, rows) = (program.buffers.get(x.0 as usize)?, program.buffers.get(rows.0 as usize)?);
        Some((u64::from(rows.rows(config)), u64::from(x.width).div_ceil(BLOCK as u64)))
    });
    inputs.fold((0, 0), |(most_blocks, most_spans), (rows, blocks)| {
        let spans = rows.saturating_mul(blocks.next_multiple_of(OCTET as u64));
        (most_blocks.max(rows.saturating_mul(blocks)), most_spans.max(spans))
    })
}

/// Bytes of the [`Activations`] of a session.
pub(super) fn bytes(program: &Program, config: &RunnerConfig) -> u64 {
    let (blocks, spans) = capacity(program, config);
    blocks.saturating_mul(size_of::<Block>() as u64).saturating_add(spans.saturating_mul(8))
}

impl Activations {
    /// Memory for the inputs of every product of `program`.
    pub(super) fn new(program: &Program, config: &RunnerConfig) -> Result<Self> {
        let what = "rounded activations";
        super::fitting(usize::try_from(bytes(program, config)).ok(), what)?;
        let (blocks, spans) = capacity(program, config);
        let (blocks, spans) = (blocks as usize, spans as usize);
        let mut all = Vec::new();
        all.try_reserve_exact(blocks).map_err(|_| super::out_of_memory(what, blocks * size_of::<Block>()))?;
        all.resize(blocks, Block::ZERO);
        let (scales, sums) = (super::zeros(Some(spans), what)?, super::zeros(Some(spans), what)?);
        Ok(Self { rows: 0, k: 0, span: BLOCK, blocks: all, scales, sums })
    }

    /// Rounds the rows of `x`, (rows, K), for products with matrices of the shape of `matrix`.
    pub(super) fn round(&mut self, pool: &mut Pool, kernels: &dyn Kernels, matrix: &W4Matrix, x: &[f32]) -> Result<()> {
        let (k, span) = (matrix.k, span_of(matrix));
        let rows = x.len() / k;
        let (blocks, spans) = (k / BLOCK, (k / span).next_multiple_of(OCTET));
        if x.len() != rows * k || rows * blocks > self.blocks.len() || rows * spans > self.scales.len() {
            return Err(super::mismatch(&format!("rows of {k} input features")));
        }
        (self.rows, self.k, self.span) = (rows, k, span);
        let to = Disjoint {
            blocks: self.blocks.as_mut_ptr(),
            scales: self.scales.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
        };
        let tasks = rows.min(pool.threads() * TASKS_PER_THREAD);
        pool.run(tasks, &|task, _| {
            let to = &to;
            for row in rows * task / tasks..rows * (task + 1) / tasks {
                // SAFETY: rows lie inside the allocations by the check above, and are dealt to tasks without overlap.
                let (blocks, scales, sums) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(to.blocks.add(row * blocks), blocks),
                        std::slice::from_raw_parts_mut(to.scales.add(row * spans), spans),
                        std::slice::from_raw_parts_mut(to.sums.add(row * spans), spans),
                    )
                };
                let used = k / span;
                scales[used..].fill(0.0);
                sums[used..].fill(0.0);
                let x = x[row * k..][..k].chunks_exact(span);
                let parts = x.zip(blocks.chunks_exact_mut(span / BLOCK)).zip(scales.iter_mut().zip(sums));
                for ((x, blocks), (scale, sum)) in parts {
                    (*scale, *sum) = kernels.round_span(x, blocks);
                }
            }
        });
        Ok(())
    }

    /// The rows from `first` on, at most [`TILE`].
    fn tile(&self, first: usize, cols: usize) -> Tile<'_> {
        let (blocks, spans) = (self.k / BLOCK, (self.k / self.span).next_multiple_of(OCTET));
        Tile {
            cols,
            span: self.span,
            blocks: &self.blocks[first * blocks..][..cols * blocks],
            scales: &self.scales[first * spans..][..cols * spans],
            sums: &self.sums[first * spans..][..cols * spans],
        }
    }
}

/// What the tasks of [`Activations::round`] write.
struct Disjoint {
    blocks: *mut Block,
    scales: *mut f32,
    sums: *mut f32,
}

// SAFETY: every task makes references to rows of its own only.
unsafe impl Sync for Disjoint {}

/// At most [`TILE`] rows of rounded activations.
pub(super) struct Tile<'a> {
    pub(super) cols: usize,
    /// Columns that share a scale.
    pub(super) span: usize,
    /// (cols, k / 64)
    pub(super) blocks: &'a [Block],
    /// (cols, spans padded to octets)
    pub(super) scales: &'a [f32],
    /// (cols, spans padded to octets)
    pub(super) sums: &'a [f32],
}

/// At most [`TILE`] rows of a matrix of codes.
pub(super) struct Codes<'a> {
    pub(super) rows: usize,
    /// Columns, a multiple of 64.
    pub(super) k: usize,
    /// (rows, k / 8), see [`W4Matrix::qweight`]
    pub(super) words: &'a [u32],
    /// (rows, groups), see [`W4Matrix::group_params`]
    pub(super) params: &'a [u32],
    /// Whether the second number of a group is a bias; else it is a zero point.
    pub(super) bias: bool,
}

impl<'a> Codes<'a> {
    fn of(matrix: &'a W4Matrix, first: usize, rows: usize) -> Self {
        let (words, groups) = (matrix.k / 8, matrix.groups());
        Self {
            rows,
            k: matrix.k,
            words: &matrix.qweight[first * words..][..rows * words],
            params: &matrix.group_params[first * groups..][..rows * groups],
            bias: matrix.offset.is_bias(),
        }
    }
}

/// Lengths of a product's operands that agree.
pub(super) struct Extents {
    /// Blocks of a row.
    pub(super) blocks: usize,
    /// Spans of a row without padding.
    pub(super) spans: usize,
    /// Spans of a row with padding.
    pub(super) padded: usize,
    /// Spans of a group.
    pub(super) per_group: usize,
}

impl Extents {
    /// # Panics
    /// If the operands are not of one K, or are shorter than they say.
    pub(super) fn check(w: &Codes<'_>, x: &Tile<'_>) -> Self {
        assert!((1..=TILE).contains(&w.rows) && (1..=TILE).contains(&x.cols));
        assert!(w.k.is_multiple_of(x.span) && x.span.is_multiple_of(BLOCK) && (BLOCK..=MAX_SPAN).contains(&x.span));
        let (blocks, spans) = (w.k / BLOCK, w.k / x.span);
        let padded = spans.next_multiple_of(OCTET);
        let groups = w.params.len() / w.rows;
        assert!(groups > 0 && spans.is_multiple_of(groups) && w.params.len() == w.rows * groups);
        assert!(w.words.len() == w.rows * w.k / 8 && x.blocks.len() == x.cols * blocks);
        assert!(x.scales.len() == x.cols * padded && x.sums.len() == x.cols * padded);
        Self { blocks, spans, padded, per_group: spans / groups }
    }
}

/// Multiplies rows of `x` with the blocks of weight rows `part` of their matrix, an entry of `experts`, all of which
/// [`takes`] accepts and [`Activations::round`] knew; row i goes to row `order[i]` of `out`, or to row i. `out` starts at
/// the first output column, rows are `stride` apart.
#[allow(clippy::too_many_arguments, reason = "one product names its operands; a struct would only rename them")]
pub(super) fn matmul(
    pool: &mut Pool,
    kernels: &dyn Kernels,
    x: &Activations,
    experts: &[Weight],
    groups: &[Group],
    order: Option<&[usize]>,
    part: std::ops::Range<usize>,
    bias: Option<&[f32]>,
    accumulate: bool,
    out: &mut [f32],
    stride: usize,
) -> Result<()> {
    let Some(n) = experts.first().map(rows_of) else { return Ok(()) };
    let fits = |weight: &Weight| takes(weight).is_some_and(|m| m.n == n && m.k == x.k && span_of(m) == x.span);
    if !experts.iter().all(fits) || groups.iter().any(|group| group.rows.end > x.rows) {
        return Err(super::mismatch("4-bit matrices of one shape and an input for them"));
    }
    let part = part.start..part.end.min(blocks(n));
    let tasks = part.len().min(pool.threads() * TASKS_PER_THREAD);
    let output = Output::new(out, stride);
    pool.run(tasks, &|task, _| {
        let first = (part.start + part.len() * task / tasks) * TILE;
        let end = ((part.start + part.len() * (task + 1) / tasks) * TILE).min(n);
        for group in groups {
            let Some(matrix) = takes(&experts[group.expert]) else { continue };
            for rows in (first..end).step_by(ROWS) {
                for t in group.rows.clone().step_by(TILE) {
                    let tile = x.tile(t, TILE.min(group.rows.end - t));
                    for row in (rows..end.min(rows + ROWS)).step_by(TILE) {
                        let codes = Codes::of(matrix, row, TILE.min(end - row));
                        let mut sums = [[0.0; TILE]; TILE];
                        kernels.dot_codes(&codes, &tile, &mut sums);
                        for (r, sums) in sums.iter().enumerate().take(codes.rows) {
                            let bias = bias.map_or(0.0, |b| b[row + r]);
                            for (c, sum) in sums.iter().enumerate().take(tile.cols) {
                                let to = order.map_or(t + c, |order| order[t + c]);
                                // SAFETY: blocks of weight rows are dealt to tasks without overlap.
                                unsafe { output.set(to, row + r, sum + bias, accumulate) };
                            }
                        }
                    }
                }
            }
        }
    });
    Ok(())
}

/// [`Kernels::round_span`] in plain Rust. Inlined, so that it becomes what its caller's instruction set allows.
#[inline(always)]
pub(super) fn round_span(x: &[f32], blocks: &mut [Block]) -> (f32, f32) {
    // The largest magnitude by its bits, so that NaN wins and reaches the result.
    let largest = f32::from_bits(x.iter().fold(0, |most, v| most.max(v.to_bits() & !(1 << 31))));
    if largest < TINY {
        blocks.fill(Block::ZERO);
        return (0.0, 0.0);
    }
    let scale = largest / MAX_CODE;
    let inverse = 1.0 / scale;
    let mut sum = 0i32;
    for (x, block) in x.as_chunks::<BLOCK>().0.iter().zip(blocks) {
        let codes = x.map(|v| (v * inverse).round_ties_even() as i16);
        sum += codes.iter().map(|&code| i32::from(code)).sum::<i32>();
        for (column, code) in codes.into_iter().enumerate() {
            block.0[Block::place(column)] = code;
        }
    }
    (scale, scale * sum as f32)
}

/// [`Kernels::dot_codes`] in plain Rust.
pub(super) fn dot_codes(w: &Codes<'_>, x: &Tile<'_>, acc: &mut [[f32; TILE]; TILE]) {
    let extents = Extents::check(w, x);
    let words_of_block = BLOCK / 8;
    for (r, acc) in acc.iter_mut().enumerate().take(w.rows) {
        let words = &w.words[r * w.k / 8..][..w.k / 8];
        let params = &w.params[r * extents.spans / extents.per_group..];
        for (c, acc) in acc.iter_mut().enumerate().take(x.cols) {
            let blocks = &x.blocks[c * extents.blocks..][..extents.blocks];
            let parts = words.chunks_exact(x.span / 8).zip(blocks.chunks_exact(x.span / BLOCK)).enumerate();
            for (span, (words, blocks)) in parts {
                let words = words.chunks_exact(words_of_block);
                let sum: i32 = words.zip(blocks).map(|(words, block)| dot_block(words, block)).sum();
                let params = params[span / extents.per_group];
                let [s, o] = [params as u16, (params >> 16) as u16].map(|bits| half::f16::from_bits(bits).to_f32());
                let b = if w.bias { o } else { -(s * o) };
                let at = c * extents.padded + span;
                *acc += s * x.scales[at] * sum as f32 + b * x.sums[at];
            }
        }
    }
}

/// sum_k q[k] * x[k] of 64 columns.
fn dot_block(words: &[u32], block: &Block) -> i32 {
    let mut sum = 0;
    for (i, word) in words.iter().enumerate() {
        for t in 0..8 {
            sum += (word >> (4 * t) & 15) as i32 * i32::from(block.0[Block::place(8 * i + t)]);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::backend::cpu::kernels;
    use crate::tensor::Offset;

    fn random(seed: &mut u64) -> u32 {
        *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (*seed >> 32) as u32
    }

    fn matrix(n: usize, k: usize, group_size: usize, offset: Offset, seed: &mut u64) -> W4Matrix {
        let qweight = (0..n * k / 8).map(|_| random(seed)).collect();
        let group_params = (0..n * k / group_size)
            .map(|_| {
                let s = f16::from_f32(0.01 + random(seed) as f32 / 4e11);
                let o = match offset.is_bias() {
                    true => f16::from_f32(-0.08 * random(seed) as f32 / u32::MAX as f32),
                    false => f16::from_f32((random(seed) % 16) as f32),
                };
                u32::from(s.to_bits()) | u32::from(o.to_bits()) << 16
            })
            .collect();
        W4Matrix { n, k, group_size, qweight, group_params, offset }
    }

    /// Rows of activations as different as those of models: some large, some small, an outlier.
    fn inputs(rows: usize, k: usize, seed: &mut u64) -> Vec<f32> {
        let mut x: Vec<f32> = (0..rows * k).map(|_| random(seed) as f32 / u32::MAX as f32 - 0.5).collect();
        for x in x.chunks_exact_mut(k) {
            x[k / 3] = 80.0;
            x[k / 2..k / 2 + 16].fill(0.0);
        }
        x
    }

    fn activations(rows: usize, k: usize) -> Activations {
        let spans = rows * (k / BLOCK).next_multiple_of(OCTET);
        Activations {
            rows: 0,
            k: 0,
            span: BLOCK,
            blocks: vec![Block([99; BLOCK]); rows * k / BLOCK],
            scales: vec![f32::NAN; spans],
            sums: vec![f32::NAN; spans],
        }
    }

    const SHAPES: [(usize, usize, usize); 9] = [
        (1, 64, 64),
        (5, 128, 128),
        (3, 1024, 512),
        (130, 576, 64),
        (7, 896, 128),
        (18, 4864, 128),
        (6, 1536, 1536),
        (2, 2240, 2240),
        (9, 768, 384),
    ];

    #[test]
    fn rounding_keeps_what_it_promises() {
        let mut seed = 11;
        for span in [64, 128, 192, 256] {
            for magnitude in [1e-20, 1.0, 3e30] {
                let mut x = inputs(1, span, &mut seed);
                x.iter_mut().for_each(|v| *v *= magnitude);
                let mut blocks = vec![Block::ZERO; span / BLOCK];
                let (scale, sum) = round_span(&x, &mut blocks);
                let mut total = 0i64;
                for (i, &v) in x.iter().enumerate() {
                    let code = blocks[i / BLOCK].0[Block::place(i % BLOCK)];
                    total += i64::from(code);
                    assert!((scale * f32::from(code) - v).abs() <= 0.502 * scale, "{v} became {code} times {scale}");
                }
                assert_eq!(sum, scale * total as f32);
                for kernels in kernels::all() {
                    let mut found = vec![Block([1; BLOCK]); span / BLOCK];
                    let numbers = kernels.round_span(&x, &mut found);
                    assert_eq!((numbers, found), ((scale, sum), blocks.clone()), "{}", kernels.name());
                }
            }
        }
    }

    #[test]
    fn rounding_of_zeros_and_of_what_is_no_number() {
        for kernels in kernels::all() {
            let mut blocks = [Block([5; BLOCK])];
            assert_eq!(kernels.round_span(&[0.0; 64], &mut blocks), (0.0, 0.0));
            assert_eq!(blocks, [Block::ZERO]);
            assert_eq!(kernels.round_span(&[1e-40; 64], &mut blocks), (0.0, 0.0));
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = [1.0; 64];
                x[37] = bad;
                assert!(!kernels.round_span(&x, &mut blocks).0.is_finite(), "{}", kernels.name());
            }
        }
    }

    /// With scales of 1 and without offsets a product is its integer sum, which every kernel must compute exactly, the
    /// largest possible ones included.
    #[test]
    fn integer_sums_are_exact() {
        let mut seed = 5;
        for kernels in kernels::all() {
            for span in [64, 128, 192, 256] {
                for extreme in [false, true] {
                    let word = |seed: &mut u64| if extreme { u32::MAX } else { random(seed) };
                    let words: Vec<u32> = (0..TILE * span / 8).map(|_| word(&mut seed)).collect();
                    let blocks: Vec<Block> = (0..TILE * span / BLOCK)
                        .map(|i| {
                            Block(std::array::from_fn(|_| match extreme {
                                true => [32767, -32767][i % 2],
                                false => (random(&mut seed) % 8191) as i16 - 4095,
                            }))
                        })
                        .collect();
                    let one = u32::from(f16::ONE.to_bits());
                    for rows in 1..=TILE {
                        for cols in 1..=TILE {
                            let params = vec![one; rows];
                            let words = &words[..rows * span / 8];
                            let codes = Codes { rows, k: span, words, params: &params, bias: true };
                            let mut scales = vec![0.0; cols * OCTET];
                            scales.iter_mut().step_by(OCTET).for_each(|scale| *scale = 1.0);
                            let tile = Tile {
                                cols,
                                span,
                                blocks: &blocks[..cols * span / BLOCK],
                                scales: &scales,
                                sums: &vec![0.0; cols * OCTET],
                            };
                            let mut found = [[0.0; TILE]; TILE];
                            kernels.dot_codes(&codes, &tile, &mut found);
                            for r in 0..rows {
                                for c in 0..cols {
                                    let product = |i: usize| {
                                        let q = words[(r * span + i) / 8] >> (4 * (i % 8)) & 15;
                                        let code = blocks[(c * span + i) / BLOCK].0[Block::place(i % BLOCK)];
                                        i64::from(q) * i64::from(code)
                                    };
                                    let expected: i64 = (0..span).map(product).sum();
                                    assert_eq!(f64::from(found[r][c]), expected as f64, "{} {span}", kernels.name());
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    /// What the rounded activations stand for, times the unrounded weights.
    fn expected(x: &Activations, row: usize, matrix: &W4Matrix, n: usize) -> f64 {
        let (blocks, padded) = (x.k / BLOCK, (x.k / x.span).next_multiple_of(OCTET));
        (0..x.k)
            .map(|i| {
                let params = matrix.group_params[n * matrix.groups() + i / matrix.group_size];
                let s = f16::from_bits(params as u16).to_f64();
                let o = f16::from_bits((params >> 16) as u16).to_f64();
                let q = f64::from(matrix.qweight[(n * x.k + i) / 8] >> (4 * (i % 8)) & 15);
                let w = if matrix.offset.is_bias() { s * q + o } else { s * (q - o) };
                let code = f64::from(x.blocks[row * blocks + i / BLOCK].0[Block::place(i % BLOCK)]);
                w * f64::from(x.scales[row * padded + i / x.span]) * code
            })
            .sum()
    }

    #[test]
    fn products_match_f64_whatever_is_computed_together() {
        let mut seed = 3;
        for kernels in kernels::all() {
            for (n, k, group_size) in SHAPES {
                for offset in [Offset::Zero, Offset::RoundedBias] {
                    let matrix = matrix(n, k, group_size, offset, &mut seed);
                    let x = inputs(9, k, &mut seed);
                    let bias: Vec<f32> = (0..n).map(|i| i as f32).collect();
                    let weight = [Weight::W4(matrix)];
                    let matrix = takes(&weight[0]).unwrap();
                    let stride = n + 3;
                    let mut alone: Vec<f32> = Vec::new();
                    for (threads, tokens) in [(1, 1), (3, 1), (1, 2), (2, 3), (1, 5), (3, 9)] {
                        let mut pool = Pool::new(threads);
                        let mut rounded = activations(tokens, k);
                        for first in (0..9 - tokens + 1).step_by(tokens) {
                            rounded.round(&mut pool, &*kernels, matrix, &x[first * k..][..tokens * k]).unwrap();
                            let mut out = vec![1.0; tokens * stride];
                            // In two pieces, as a deadline may part it.
                            for part in [0..blocks(n) / 2, blocks(n) / 2..usize::MAX] {
                                let groups = [Group { expert: 0, rows: 0..tokens }];
                                matmul(
                                    &mut pool,
                                    &*kernels,
                                    &rounded,
                                    &weight,
                                    &groups,
                                    None,
                                    part,
                                    Some(&bias),
                                    true,
                                    &mut out,
                                    stride,
                                )
                                .unwrap();
                            }
                            for t in 0..tokens {
                                let found = &out[t * stride..][..n];
                                if threads == 1 && tokens == 1 {
                                    for r in 0..n {
                                        let expected = expected(&rounded, t, matrix, r) + r as f64 + 1.0;
                                        assert!(
                                            (f64::from(found[r]) - expected).abs() < 2e-5 * (1.0 + expected.abs()),
                                            "{} {n}x{k} g{group_size} row {r}: {} != {expected}",
                                            kernels.name(),
                                            found[r]
                                        );
                                    }
                                    alone.extend_from_slice(found);
                                }
                                assert_eq!(found, &alone[(first + t) * n..][..n], "{} {tokens} tokens", kernels.name());
                                assert!(out[t * stride + n..(t + 1) * stride].iter().all(|&v| v == 1.0));
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn experts_take_the_rows_that_are_theirs() {
        let mut seed = 21;
        let (n, k) = (10, 128);
        let experts: Vec<Weight> = (0..3).map(|_| Weight::W4(matrix(n, k, 64, Offset::Zero, &mut seed))).collect();
        let x = inputs(7, k, &mut seed);
        let groups = [(2, 0..1), (0, 1..6), (1, 6..7)].map(|(expert, rows)| Group { expert, rows });
        let order = [3, 0, 6, 5, 1, 2, 4];
        let mut pool = Pool::new(2);
        for kernels in kernels::all() {
            let mut rounded = activations(7, k);
            rounded.round(&mut pool, &*kernels, takes(&experts[0]).unwrap(), &x).unwrap();
            let mut out = vec![f32::NAN; 7 * n];
            matmul(&mut pool, &*kernels, &rounded, &experts, &groups, Some(&order), 0..9, None, false, &mut out, n)
                .unwrap();
            for group in &groups {
                for row in group.rows.clone() {
                    for r in 0..n {
                        let expected = expected(&rounded, row, takes(&experts[group.expert]).unwrap(), r);
                        let found = f64::from(out[order[row] * n + r]);
                        assert!((found - expected).abs() < 2e-5 * (1.0 + expected.abs()), "{found} {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn other_matrices_are_left_to_the_exact_path() {
        let mut seed = 2;
        for (k, group_size) in [(96, 96), (128, 32), (72, 8)] {
            assert!(takes(&Weight::W4(matrix(2, k, group_size, Offset::Zero, &mut seed))).is_none());
        }
        assert!(takes(&Weight::Vector(vec![0.0; 64])).is_none());
    }
}
