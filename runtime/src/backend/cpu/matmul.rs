//! out[t, n] = sum_k x[t, k] * W[n, k]: weight rows are expanded to f32 in cache and multiplied with every token.

use std::ops::Range;
use std::sync::Mutex;

use super::Scratch;
use super::integer::rows::LANES;
use super::kernels::{Kernels, TILE};
use super::pool::{Parts, Pool, TASKS_PER_THREAD};
use super::vector::Outer;
use super::weights::Matrix;
use crate::error::Result;
use crate::tensor::{DenseType, Weight};

/// Columns expanded at a time: TILE rows of them are 32 KiB, so they stay in the first cache levels.
const K_TILE: usize = 2048;

/// Columns of a block of sixteen rows that are expanded at a time, into as much memory.
const K_BLOCK: usize = TILE * K_TILE / LANES;

/// Elements of [`Scratch::weights`] a matrix product needs. A group longer than a tile is expanded whole.
pub(super) fn scratch_weights() -> usize {
    TILE * K_TILE
}

/// Elements of [`Scratch::sums`] a matrix product of `max_tokens` tokens needs: the sums of a block, and those of the
/// columns expanded last.
pub(super) fn scratch_sums(max_tokens: usize) -> usize {
    2 * LANES * max_tokens.next_multiple_of(TILE)
}

/// Widens one row of a dense matrix to f32.
pub(super) fn widen(kernels: &dyn Kernels, dtype: DenseType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DenseType::F16 => kernels.expand_f16(bytes, out),
        DenseType::BF16 | DenseType::F32 => dtype.widen(bytes, out),
    }
}

/// Output rows written by tasks that own disjoint columns.
pub(super) struct Output<'a> {
    parts: Parts<'a, f32>,
    stride: usize,
}

impl<'a> Output<'a> {
    /// `out` starts at the first output column, rows are `stride` apart.
    pub(super) fn new(out: &'a mut [f32], stride: usize) -> Self {
        Self { parts: Parts::new(out), stride }
    }

    /// Writes (or adds to) columns of row `t` from `n` on: `values`, plus `bias` where there is one.
    ///
    /// # Safety
    /// No two threads may pass the same column of a row during one matrix product.
    pub(super) unsafe fn set_run(&self, t: usize, n: usize, values: &[f32], bias: Option<&[f32]>, accumulate: bool) {
        // SAFETY: the caller's promise: columns of a row are of one thread each.
        let out = unsafe { self.parts.part(t * self.stride + n, values.len()) };
        put(out, values, bias, accumulate);
    }

    /// Writes (or adds to) the columns `columns` of rows of the output: `values`, (blocks, rows, 16), plus `bias`, which
    /// begins with these columns, where there is one. `row` tells the row of the output for a row of `values`.
    ///
    /// # Safety
    /// That of [`Self::set_run`].
    pub(super) unsafe fn set_blocks(
        &self,
        row: impl Fn(usize) -> usize,
        columns: Range<usize>,
        values: &[[f32; LANES]],
        bias: Option<&[f32]>,
        accumulate: bool,
    ) {
        let rows = values.len() / columns.len().div_ceil(LANES).max(1);
        for i in 0..rows {
            // SAFETY: the caller's promise.
            let out = unsafe { self.parts.part(row(i) * self.stride + columns.start, columns.len()) };
            let mut values = values[i..].iter().step_by(rows);
            // Nearly all are whole, a vector or two.
            let (whole, rest) = out.as_chunks_mut::<LANES>();
            let (whole_bias, rest_bias) = bias.map(<[f32]>::as_chunks::<LANES>).unzip();
            for (block, (out, values)) in whole.iter_mut().zip(&mut values).enumerate() {
                put(out, values, whole_bias.map(|bias| &bias[block][..]), accumulate);
            }
            if let Some(values) = values.next() {
                put(rest, &values[..rest.len()], rest_bias, accumulate);
            }
        }
    }
}

/// Inlined for runs of a known length.
#[inline(always)]
fn put(out: &mut [f32], values: &[f32], bias: Option<&[f32]>, accumulate: bool) {
    match accumulate {
        true => out.iter_mut().zip(values).for_each(|(out, value)| *out += value),
        false => out.copy_from_slice(values),
    }
    if let Some(bias) = bias {
        out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
    }
}

/// Rows of a block of `weight`.
pub(super) fn block_rows(weight: &Matrix<'_>) -> usize {
    match weight {
        Matrix::Plain(_) => TILE,
        Matrix::Blocks(_) => LANES,
    }
}

/// Blocks of rows of a matrix: the pieces that [`matmul`] computes whole.
pub(super) fn blocks(weight: &Matrix<'_>) -> usize {
    weight.dims().0.div_ceil(block_rows(weight))
}

/// Multiplies `n_tokens` rows of `x` with the blocks `part` of `weight`. `out` starts at the first output column, rows
/// are `stride` apart.
#[allow(clippy::too_many_arguments, reason = "one product names its operands; a struct would only rename them")]
pub(super) fn matmul(
    pool: &mut Pool,
    scratch: &[Mutex<Scratch>],
    kernels: &dyn Kernels,
    weight: Matrix<'_>,
    part: std::ops::Range<usize>,
    x: &[f32],
    n_tokens: usize,
    bias: Option<&[f32]>,
    accumulate: bool,
    out: &mut [f32],
    stride: usize,
) -> Result<()> {
    let (n, k) = match weight {
        Matrix::Plain(Weight::Vector(_) | Weight::Order(_)) => return Err(super::mismatch("a matrix")),
        matrix => matrix.dims(),
    };
    if x.len() != n_tokens * k {
        return Err(super::mismatch(&format!("a matrix of {} input features, not {k}", x.len() / n_tokens.max(1))));
    }
    let height = block_rows(&weight);
    let part = part.start..part.end.min(blocks(&weight));
    let blocks = part.len();
    let tasks = blocks.min(pool.threads() * TASKS_PER_THREAD);
    let output = Output::new(out, stride);
    pool.run(tasks, &|task, worker| {
        let mut scratch = scratch[worker].lock().unwrap_or_else(|e| e.into_inner());
        let Scratch { weights, sums } = &mut *scratch;
        for block in part.start + blocks * task / tasks..part.start + blocks * (task + 1) / tasks {
            let first = block * height;
            let sums = block_sums(kernels, weight, block, x, n_tokens, k, weights, sums);
            let rows = height.min(n - first);
            let bias = bias.map(|bias| &bias[first..first + rows]);
            for (t, sums) in sums.chunks_exact(height).enumerate().take(n_tokens) {
                // SAFETY: blocks of weight rows are dealt to tasks without overlap.
                unsafe { output.set_run(t, first, &sums[..rows], bias, accumulate) };
            }
        }
    });
    Ok(())
}

/// Products of a block of weight rows with `n_tokens` rows of `x`: [`block_rows`] sums a row of x.
#[allow(clippy::too_many_arguments, reason = "operands, shape and scratch memory of one product")]
fn block_sums<'a>(
    kernels: &dyn Kernels,
    weight: Matrix<'_>,
    block: usize,
    x: &[f32],
    n_tokens: usize,
    k: usize,
    weights: &mut [f32],
    sums: &'a mut [f32],
) -> &'a [f32] {
    if let Matrix::Blocks(matrix) = weight {
        let (all, sums) = sums.split_at_mut(LANES * n_tokens);
        all.fill(0.0);
        for k0 in (0..k).step_by(K_BLOCK) {
            let len = K_BLOCK.min(k - k0);
            let (weights, sums) = (&mut weights[..LANES * len], &mut sums[..LANES * n_tokens]);
            matrix.expand_block(kernels, block, k0, weights);
            let extents = Outer { rows: n_tokens, depth: len, columns: LANES, add: false };
            kernels.outer((&x[k0..], k), (weights, LANES), (sums, LANES), extents);
            all.iter_mut().zip(sums).for_each(|(all, sum)| *all += *sum);
        }
        return all;
    }
    let first = block * TILE;
    let rows = TILE.min(weight.dims().0 - first);
    let sums = &mut sums[..TILE * n_tokens];
    sums.fill(0.0);
    for k0 in (0..k).step_by(K_TILE) {
        let len = K_TILE.min(k - k0);
        for r in 0..rows {
            expand(kernels, weight, first + r, k0, &mut weights[r * len..][..len]);
        }
        for (tile, sums) in sums.chunks_mut(TILE * TILE).enumerate() {
            let t0 = tile * TILE;
            let cols = TILE.min(n_tokens - t0);
            let mut acc = [[0.0; TILE]; TILE];
            kernels.dot_tile(weights, len, rows, &x[t0 * k + k0..], k, cols, len, &mut acc);
            for (c, sums) in sums.chunks_exact_mut(TILE).enumerate() {
                for (sum, acc) in sums.iter_mut().zip(&acc) {
                    *sum += acc[c];
                }
            }
        }
    }
    sums
}

/// Rows of activations that go through one expert.
pub(super) struct Group {
    /// The expert.
    pub(super) expert: usize,
    /// Its rows of the gathered inputs, and of the list of their outputs.
    pub(super) rows: std::ops::Range<usize>,
}

/// Multiplies gathered rows of `x`, (rows, K), with the blocks `part` of their expert's matrix, an entry of `experts`;
/// row i goes to row `order[i]` of `out`, which starts at the first output column, rows `stride` apart.
#[allow(clippy::too_many_arguments, reason = "one product names its operands; a struct would only rename them")]
pub(super) fn experts(
    pool: &mut Pool,
    scratch: &[Mutex<Scratch>],
    kernels: &dyn Kernels,
    experts: &[Matrix<'_>],
    groups: &[Group],
    order: &[usize],
    part: std::ops::Range<usize>,
    x: &[f32],
    out: &mut [f32],
    stride: usize,
) -> Result<()> {
    let Some(first) = experts.first() else { return Ok(()) };
    let (n, k) = first.dims();
    if experts.iter().any(|weight| weight.dims() != (n, k)) || x.len() != order.len() * k {
        return Err(super::mismatch("experts of the same shape"));
    }
    let height = block_rows(first);
    if experts.iter().any(|weight| block_rows(weight) != height) {
        return Err(super::mismatch("experts in one form"));
    }
    let part = part.start..part.end.min(blocks(first));
    let tasks = part.len().min(pool.threads() * TASKS_PER_THREAD);
    let output = Output::new(out, stride);
    pool.run(tasks, &|task, worker| {
        let mut scratch = scratch[worker].lock().unwrap_or_else(|e| e.into_inner());
        let Scratch { weights, sums } = &mut *scratch;
        let blocks = part.len();
        for block in part.start + blocks * task / tasks..part.start + blocks * (task + 1) / tasks {
            let first = block * height;
            for group in groups {
                let rows = &x[group.rows.start * k..group.rows.end * k];
                let sums = block_sums(kernels, experts[group.expert], block, rows, group.rows.len(), k, weights, sums);
                for (&row, sums) in order[group.rows.clone()].iter().zip(sums.chunks_exact(height)) {
                    // SAFETY: blocks of weight rows are dealt to tasks without overlap.
                    unsafe { output.set_run(row, first, &sums[..height.min(n - first)], None, false) };
                }
            }
        }
    });
    Ok(())
}

/// Expands `out.len()` columns of row `n` from column `k0` on, a multiple of [`K_TILE`].
///
/// The forms with a fast expansion of their own are [`Kernels`]' business; the others expand themselves.
pub(super) fn expand(kernels: &dyn Kernels, matrix: Matrix<'_>, n: usize, k0: usize, out: &mut [f32]) {
    let weight = match matrix {
        Matrix::Plain(weight) => weight,
        Matrix::Blocks(rows) => return rows.expand(kernels, n, k0, out),
    };
    match weight {
        Weight::W4(m) => {
            let words = &m.qweight[n * m.k / 8..][..m.k / 8];
            let params = &m.group_params[n * m.groups()..][..m.groups()];
            if m.group_size >= m.k {
                // One group: any cut at a whole word is a smaller group with the same parameters.
                kernels.expand_w4(&words[k0 / 8..][..out.len() / 8], params, out.len(), m.offset, out);
                return;
            }
            let (mut at, end) = (k0, k0 + out.len());
            // Tiles need not start or end at a group boundary (K_TILE is not a multiple of every group size).
            while at < end {
                let group = at / m.group_size;
                let aligned = at.is_multiple_of(m.group_size);
                let stop = if aligned && end - at >= m.group_size {
                    at + (end - at) / m.group_size * m.group_size
                } else {
                    end.min((group + 1) * m.group_size)
                };
                let size = if stop - at < m.group_size || !aligned { stop - at } else { m.group_size };
                kernels.expand_w4(
                    &words[at / 8..stop / 8],
                    &params[group..],
                    size,
                    m.offset,
                    &mut out[at - k0..stop - k0],
                );
                at = stop;
            }
        }
        Weight::Dense(m) => {
            let size = m.dtype.size();
            let row = &m.bytes[n * m.row_bytes()..][..m.row_bytes()];
            widen(kernels, m.dtype, &row[k0 * size..][..out.len() * size], out);
        }
        Weight::Packed(m) => m.expand(n, k0, out),
        Weight::Blocks(m) => m.expand(n, k0, out),
        Weight::Vector(_) | Weight::Order(_) => out.fill(0.0),
    }
}

#[cfg(test)]
mod tests {
    use super::super::integer::rows::{self, Rows, Shape};
    use super::*;
    use crate::tensor::{Bytes, DenseMatrix, Offset, W4Matrix};

    fn random(seed: &mut u64) -> u32 {
        *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (*seed >> 32) as u32
    }

    /// Weight and its rows as f64.
    fn w4(n: usize, k: usize, group_size: usize, seed: &mut u64) -> (Weight, Vec<f64>) {
        let qweight: Vec<u32> = (0..n * k / 8).map(|_| random(seed)).collect();
        let group_params: Vec<u32> = (0..n * k / group_size)
            .map(|_| {
                let s = half::f16::from_f32(0.01 + random(seed) as f32 / 4e11);
                u32::from(s.to_bits()) | u32::from(half::f16::from_f32((random(seed) % 16) as f32).to_bits()) << 16
            })
            .collect();
        let rows = (0..n * k)
            .map(|i| {
                let table = Offset::Zero.weights(group_params[i / group_size]);
                f64::from(table[(qweight[i / 8] >> (4 * (i % 8))) as usize & 15])
            })
            .collect();
        (Weight::W4(W4Matrix { n, k, group_size, qweight, group_params, offset: Offset::Zero }), rows)
    }

    fn dense(n: usize, k: usize, dtype: DenseType, seed: &mut u64) -> (Weight, Vec<f64>) {
        let mut bytes = Vec::new();
        let mut rows = Vec::new();
        for _ in 0..n * k {
            let v = random(seed) as f32 / u32::MAX as f32 - 0.5;
            match dtype {
                DenseType::F16 => {
                    bytes.extend(half::f16::from_f32(v).to_le_bytes());
                    rows.push(half::f16::from_f32(v).to_f64());
                }
                DenseType::BF16 => {
                    bytes.extend(half::bf16::from_f32(v).to_le_bytes());
                    rows.push(half::bf16::from_f32(v).to_f64());
                }
                DenseType::F32 => {
                    bytes.extend(v.to_le_bytes());
                    rows.push(f64::from(v));
                }
            }
        }
        (Weight::Dense(DenseMatrix::new(n, k, dtype, Bytes::owned(bytes)).unwrap()), rows)
    }

    fn in_blocks(weight: &Weight) -> Option<(Shape, Vec<u8>)> {
        let shape = Shape::of(&weight.shape())?;
        let Weight::W4(matrix) = weight else { return None };
        let mut bytes = vec![0; shape.bytes()?];
        rows::interleave(matrix, 0, &shape, &mut bytes);
        Some((shape, bytes))
    }

    #[test]
    fn products_match_f64() {
        let mut seed = 3;
        let mut cases: Vec<(usize, usize, (Weight, Vec<f64>))> = Vec::new();
        for (n, k, g) in
            [(1, 32, 32), (5, 64, 32), (130, 576, 64), (7, 2304, 96), (9, 4160, 64), (6, 2560, 2560), (3, 344, 344)]
        {
            cases.push((n, k, w4(n, k, g, &mut seed)));
        }
        for dtype in [DenseType::F16, DenseType::BF16, DenseType::F32] {
            cases.push((33, 301, dense(33, 301, dtype, &mut seed)));
            cases.push((2, 2500, dense(2, 2500, dtype, &mut seed)));
        }
        let blocks: Vec<_> = cases.iter().map(|(.., (weight, _))| in_blocks(weight)).collect();
        let mut all = Vec::new();
        for ((n, k, (weight, rows)), blocks) in cases.iter().zip(&blocks) {
            all.push((*n, *k, Matrix::Plain(weight), rows));
            if let Some((shape, bytes)) = blocks {
                all.push((*n, *k, Matrix::Blocks(Rows::new(*shape, bytes)), rows));
            }
        }
        for kernels in super::super::kernels::all() {
            for threads in [1, 3] {
                let mut pool = Pool::new(threads);
                for (n, k, matrix, rows) in &all {
                    for n_tokens in [1, 2, 5, 9] {
                        let scratch: Vec<_> = (0..threads)
                            .map(|_| {
                                let (weights, sums) = (scratch_weights(), scratch_sums(n_tokens));
                                Mutex::new(Scratch { weights: vec![f32::NAN; weights], sums: vec![f32::NAN; sums] })
                            })
                            .collect();
                        let x: Vec<f32> =
                            (0..n_tokens * k).map(|_| random(&mut seed) as f32 / u32::MAX as f32 - 0.5).collect();
                        let bias: Vec<f32> = (0..*n).map(|i| i as f32).collect();
                        let stride = n + 3;
                        for accumulate in [false, true] {
                            let mut out = vec![if accumulate { 1.0 } else { f32::NAN }; n_tokens * stride];
                            matmul(
                                &mut pool,
                                &scratch,
                                &*kernels,
                                *matrix,
                                0..usize::MAX,
                                &x,
                                n_tokens,
                                Some(&bias),
                                accumulate,
                                &mut out,
                                stride,
                            )
                            .unwrap();
                            for t in 0..n_tokens {
                                for r in 0..*n {
                                    let exact: f64 = (0..*k).map(|i| f64::from(x[t * k + i]) * rows[r * k + i]).sum();
                                    let expected = exact + r as f64 + if accumulate { 1.0 } else { 0.0 };
                                    let found = f64::from(out[t * stride + r]);
                                    assert!(
                                        (found - expected).abs() < 2e-5 * (1.0 + expected.abs()),
                                        "{} {n}x{k} token {t} row {r}: {found} != {expected}",
                                        kernels.name()
                                    );
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}
