//! out[t, n] = sum_k x[t, k] * W[n, k] in integers: codes times activations rounded to 16 bits.
//!
//! A weight is `s * q + b` with the code q and two numbers of its group (`b = -s * z` where the group has a zero point
//! z), so a group's part of a product is `s * sum(q x) + b * sum(x)`. Both sums are computed exactly on the rounded
//! activations, hence zero points cost one multiplication a group. Two things differ from the definition of a weight
//! in [`crate::tensor::W4Matrix`], which [`super::matmul`] computes with: the rounding of x, and that weights are not
//! rounded to half precision.
//!
//! Why not 8 bits: even with a scale for every 4 columns they move the logits of small models by more than 1 % of the
//! largest one. 16 bits with a scale for a *span* of at most [`rows::MAX_SPAN`] columns are finer than the weights' own
//! rounding to half precision, and with [`rows`]' layout a product reads the codes about as fast as memory brings them.

use std::ops::Range;
use std::sync::Mutex;

use super::Zeros;
use super::kernels::Kernels;
use super::matmul::Output;
use super::pool::{Pool, TASKS_PER_THREAD};
use crate::error::Result;
use rows::{Codes, LANES, MAX_SPAN, Rows};

mod activations;
#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(super) mod i8mm;
#[cfg(target_arch = "aarch64")]
pub(super) mod neon;
pub(super) mod portable;
pub(super) mod rows;
pub(super) mod stored;
#[cfg(test)]
mod tests;

pub(super) use super::matmul::Group;
pub(super) use activations::{Activations, Inputs, bytes, columns};

/// Columns of a [`Panel`]: its codes then take half of a first-level cache of 32 KiB.
const PANEL: usize = 512;
/// Blocks of a panel that planes meet, of fewer columns each: a panel in bytes has half the size. As many are read side by
/// side by [`Kernels::gemv`] where that helps; they are dealt to threads together.
const BLOCKS: usize = 4;
/// Bytes of activations that stay in the second-level cache while all panels meet them.
const TOKEN_BYTES: usize = 192 * 1024;
/// The same in planes: processors with tiles have caches of 2 MiB.
const PLANE_BYTES: usize = 768 * 1024;
/// Most tokens that meet a panel before the next one is brought out.
const MAX_TOKENS: usize = 256;
/// A multiple of the tokens of tiles of vectors, and of what any tile of planes has.
const TILES: (usize, usize) = (12, 16);
/// Most spans of a panel: of all blocks, in bytes.
const SPANS: usize = 2 * PANEL / rows::BYTE_GROUP;

/// Spans of a block of rows as pairs of 16-bit numbers, which many tokens can meet; or of several blocks as bytes, for
/// planes.
#[repr(C, align(64))]
pub(super) struct Panel {
    /// (columns / 2, 16, 2), columns in the order of the activations; or bytes, (blocks, columns / 4, 16, 4).
    pub(super) codes: [i16; PANEL * LANES],
    /// Columns of a span.
    pub(super) span: usize,
    /// Spans of a block.
    pub(super) spans: usize,
    /// One, or for planes at most [`BLOCKS`].
    pub(super) blocks: usize,
    /// Whether codes are bytes, for [`Inputs::planes`].
    pub(super) planes: bool,
    /// Whether `b` is anything but 0.
    pub(super) offsets: bool,
    /// Scales, (blocks, spans, 16).
    pub(super) s: [[f32; LANES]; SPANS],
    /// What is added to a weight, (blocks, spans, 16).
    pub(super) b: [[f32; LANES]; SPANS],
}

/// Memory of one worker.
pub(super) struct Worker {
    panel: Panel,
    /// Sums of the tokens that meet the panel, (blocks, tokens, 16).
    sums: [[f32; LANES]; BLOCKS * MAX_TOKENS],
    /// See [`Inputs::bytes`].
    bytes: Zeros<i8>,
}

impl Worker {
    /// For products with rows of at most `columns` activations.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`].
    pub(super) fn new(columns: usize) -> Result<Box<Self>> {
        let bytes = Zeros::new(columns.checked_mul(2), "a row of activations")?;
        let panel = Panel {
            span: MAX_SPAN,
            spans: 0,
            blocks: 1,
            planes: false,
            offsets: false,
            codes: [0; PANEL * LANES],
            s: [[0.0; LANES]; SPANS],
            b: [[0.0; LANES]; SPANS],
        };
        Ok(Box::new(Self { panel, sums: [[0.0; LANES]; BLOCKS * MAX_TOKENS], bytes }))
    }

    /// A row of activations in the form that products of one row take.
    pub(super) fn row<'a>(&'a mut self, kernels: &dyn Kernels, codes: Codes, x: Inputs<'a>) -> Inputs<'a> {
        if !kernels.takes_bytes(codes) {
            return x;
        }
        let bytes = &mut self.bytes[..2 * x.k];
        kernels.split_row(x.codes, bytes);
        Inputs { bytes, ..x }
    }

    /// The products of `blocks`, at most [`BLOCKS`], with all rows of `x`: (blocks, rows, 16).
    fn products(
        &mut self,
        kernels: &dyn Kernels,
        matrix: &Rows<'_>,
        blocks: Range<usize>,
        x: &Inputs<'_>,
    ) -> &[[f32; LANES]] {
        let Self { panel, sums, .. } = self;
        let rows = x.codes.len() / x.k;
        let sums = &mut sums[..blocks.len() * rows];
        sums.fill([0.0; LANES]);
        let (together, columns) = if x.planes { (blocks.len(), 2 * PANEL / BLOCKS) } else { (1, PANEL) };
        let (spans, most) = (x.k / x.span, columns / x.span);
        (panel.span, panel.blocks, panel.planes) = (x.span, together, x.planes);
        panel.offsets = matrix.shape().has_offsets();
        for (block, sums) in blocks.step_by(together).zip(sums.chunks_exact_mut(together * rows)) {
            for first in (0..spans).step_by(most) {
                panel.spans = most.min(spans - first);
                kernels.unpack(matrix, block, first, panel);
                kernels.gemm(panel, first, x, sums);
            }
        }
        sums
    }
}

/// The pieces that `rows` rows of activations meet weights in: their number, as small as caches let it be, and the rows of
/// each but the last.
fn pieces(x: &Inputs<'_>, rows: usize) -> (usize, usize) {
    let (bytes, tile) = if x.planes { (PLANE_BYTES, TILES.1) } else { (TOKEN_BYTES, TILES.0) };
    let most = (bytes / (2 * x.k)).clamp(2 * tile, MAX_TOKENS) / tile * tile;
    let len = rows.div_ceil(rows.div_ceil(most).max(1)).next_multiple_of(tile).max(tile);
    (rows.div_ceil(len), len)
}

/// Where a product goes.
pub(super) struct Target<'a> {
    /// From the first output column on.
    pub(super) out: &'a mut [f32],
    /// Elements from a row to the next.
    pub(super) stride: usize,
    /// (N)
    pub(super) bias: Option<&'a [f32]>,
    /// Whether to add to what is there.
    pub(super) accumulate: bool,
    /// The row of the output for a row of activations; `None` for the same.
    pub(super) order: Option<&'a [usize]>,
}

/// Multiplies rows of `x` with the blocks `part` of their matrix, an entry of `matrices`, all of one shape.
#[allow(clippy::too_many_arguments, reason = "one product names its operands; a struct would only rename them")]
pub(super) fn matmul(
    pool: &mut Pool,
    workers: &[Mutex<Box<Worker>>],
    kernels: &dyn Kernels,
    x: &Inputs<'_>,
    matrices: &[Rows<'_>],
    groups: &[Group],
    part: Range<usize>,
    target: Target<'_>,
) -> Result<()> {
    let Some(shape) = matrices.first().map(|rows| *rows.shape()) else { return Ok(()) };
    let rows = x.codes.len() / x.k.max(1);
    let fits = |m: &Rows<'_>| (m.shape().n, m.shape().k, m.shape().span()) == (shape.n, x.k, x.span);
    if !matrices.iter().all(fits) || groups.iter().any(|group| group.rows.end > rows) {
        return Err(super::mismatch("matrices of one shape and an input for them"));
    }
    let Target { out, stride, bias, accumulate, order } = target;
    let part = part.start..part.end.min(shape.blocks());
    let output = Output::new(out, stride);
    let compute = |worker: usize, matrix: &Rows<'_>, tokens: Range<usize>, blocks: Range<usize>| {
        let x = x.rows(tokens.clone());
        let columns = blocks.start * LANES..shape.n.min(blocks.end * LANES);
        let write = |sums: &[[f32; LANES]]| {
            let row = |i: usize| order.map_or(tokens.start + i, |order| order[tokens.start + i]);
            // SAFETY: no two items have the same rows and blocks.
            unsafe {
                output.set_blocks(row, columns.clone(), sums, bias.map(|bias| &bias[columns.clone()]), accumulate)
            };
        };
        let mut worker = workers[worker].lock().unwrap_or_else(|e| e.into_inner());
        write(worker.products(kernels, matrix, blocks, &x));
    };
    // A row meets few blocks at a time, which are read side by side.
    let compute_row = |worker: usize, matrix: &Rows<'_>, token: usize, blocks: Range<usize>| {
        let mut worker = workers[worker].lock().unwrap_or_else(|e| e.into_inner());
        let x = worker.row(kernels, matrix.shape().codes, x.rows(token..token + 1));
        let row = order.map_or(token, |order| order[token]);
        let rounds = blocks.len().div_ceil(BLOCKS);
        let apart = if kernels.reads_apart() { rounds } else { 1 };
        for round in 0..rounds {
            let first = blocks.start + if apart == 1 { BLOCKS * round } else { round };
            let mut sums = [[0.0; LANES]; BLOCKS];
            let together = (first..blocks.end).step_by(apart).take(BLOCKS);
            let sums = &mut sums[..together.len()];
            kernels.gemv(matrix, first, apart, &x, sums);
            for (block, sums) in together.zip(sums) {
                let columns = block * LANES..shape.n.min((block + 1) * LANES);
                let bias = bias.map(|bias| &bias[columns.clone()]);
                // SAFETY: no two items have the same rows and blocks.
                unsafe { output.set_blocks(|_| row, columns, std::slice::from_ref(sums), bias, accumulate) };
            }
        }
    };
    // An item is a piece of a group's rows and a few blocks, rows by rows, so that a task reads weights in their order. Where
    // a deadline leaves few blocks, each thread shall have some.
    let together = (part.len() / pool.threads()).clamp(1, BLOCKS);
    let columns = part.len().div_ceil(together);
    let rows_of = |group: &Group| pieces(x, group.rows.len());
    let items = groups.iter().map(|group| rows_of(group).0 * columns).sum::<usize>();
    let tasks = match pool.threads() {
        1 => items.min(1),
        threads => items.min(threads * TASKS_PER_THREAD),
    };
    pool.run(tasks, &|task, worker| {
        let of_task = items * task / tasks..items * (task + 1) / tasks;
        let mut before = 0;
        for group in groups {
            let (n, len) = rows_of(group);
            let of_group = before..before + n * columns;
            before = of_group.end;
            let items = of_task.start.max(of_group.start)..of_task.end.min(of_group.end);
            if items.is_empty() {
                continue;
            }
            if group.rows.len() == 1 && !x.planes {
                let [first, end] = [items.start, items.end].map(|item| part.start + (item - of_group.start) * together);
                compute_row(worker, &matrices[group.expert], group.rows.start, first..end.min(part.end));
                continue;
            }
            for item in items {
                let (piece, column) = ((item - of_group.start) / columns, (item - of_group.start) % columns);
                let first = group.rows.start + piece * len;
                let block = part.start + column * together;
                let tokens = first..group.rows.end.min(first + len);
                compute(worker, &matrices[group.expert], tokens, block..part.end.min(block + together));
            }
        }
    });
    Ok(())
}
