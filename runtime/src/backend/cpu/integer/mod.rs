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

use super::kernels::Kernels;
use super::matmul::{Output, TASKS_PER_THREAD};
use super::pool::Pool;
use crate::error::Result;
use rows::{LANES, MAX_SPAN, Rows};

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
pub(super) use activations::{Activations, Inputs, bytes};

/// Columns of a [`Panel`]: its codes then take half of a first-level cache of 32 KiB.
const PANEL: usize = 512;
/// Blocks of a panel that planes meet, of fewer columns each: a panel in bytes has half the size.
const BLOCKS: usize = 4;
/// Bytes of activations that stay in the second-level cache while all panels meet them.
const TOKEN_BYTES: usize = 192 * 1024;
/// The same in planes: processors with tiles have caches of 2 MiB.
const PLANE_BYTES: usize = 768 * 1024;
/// Blocks that [`Kernels::gemv`] reads side by side where that helps.
const STREAMS: usize = 4;
/// Most tokens that meet a panel before the next one is brought out.
const MAX_TOKENS: usize = 240;
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
}

impl Worker {
    pub(super) fn new() -> Box<Self> {
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
        Box::new(Self { panel, sums: [[0.0; LANES]; BLOCKS * MAX_TOKENS] })
    }

    /// The products of `blocks`, at most [`together`], with all rows of `x`: (blocks, rows, 16).
    fn products(
        &mut self,
        kernels: &dyn Kernels,
        matrix: &Rows<'_>,
        blocks: Range<usize>,
        x: &Inputs<'_>,
    ) -> &[[f32; LANES]] {
        let Self { panel, sums } = self;
        let sums = &mut sums[..blocks.len() * (x.codes.len() / x.k)];
        sums.fill([0.0; LANES]);
        let columns = if x.planes { 2 * PANEL / BLOCKS } else { PANEL };
        let (spans, most) = (x.k / x.span, columns / x.span);
        (panel.span, panel.blocks, panel.planes) = (x.span, blocks.len(), x.planes);
        panel.offsets = matrix.shape().has_offsets();
        for first in (0..spans).step_by(most) {
            panel.spans = most.min(spans - first);
            kernels.unpack(matrix, blocks.start, first, panel);
            kernels.gemm(panel, first, x, sums);
        }
        sums
    }
}

/// Most blocks that meet activations at once, and most rows of them.
fn together(x: &Inputs<'_>) -> (usize, usize) {
    match x.planes {
        // A multiple of what any tile has.
        true => (BLOCKS, (PLANE_BYTES / (2 * x.k)).clamp(MAX_TOKENS / 10, MAX_TOKENS).next_multiple_of(16)),
        false => (1, (TOKEN_BYTES / (2 * x.k)).clamp(MAX_TOKENS / 10, MAX_TOKENS)),
    }
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
    let tasks = part.len().min(pool.threads() * TASKS_PER_THREAD);
    let output = Output::new(out, stride);
    let write = |t: usize, block: usize, sums: &[f32; LANES]| {
        let to = order.map_or(t, |order| order[t]);
        let first = block * LANES;
        let n = LANES.min(shape.n - first);
        let bias = bias.map(|bias| &bias[first..first + n]);
        // SAFETY: blocks are dealt to tasks without overlap.
        unsafe { output.set_run(to, first, &sums[..n], bias, accumulate) };
    };
    pool.run(tasks, &|task, worker| {
        let blocks = part.start + part.len() * task / tasks..part.start + part.len() * (task + 1) / tasks;
        for group in groups {
            let matrix = &matrices[group.expert];
            if group.rows.len() == 1 && !x.planes {
                let x = x.rows(group.rows.clone());
                let mut sums = [[0.0; LANES]; STREAMS];
                for first in blocks.clone().step_by(STREAMS) {
                    let sums = &mut sums[..STREAMS.min(blocks.end - first)];
                    kernels.gemv(matrix, first, &x, sums);
                    (first..).zip(&*sums).for_each(|(block, sums)| write(group.rows.start, block, sums));
                }
                continue;
            }
            let mut worker = workers[worker].lock().unwrap_or_else(|e| e.into_inner());
            let (most_blocks, most_tokens) = together(x);
            for first in group.rows.clone().step_by(most_tokens) {
                let tokens = first..group.rows.end.min(first + most_tokens);
                for block in blocks.clone().step_by(most_blocks) {
                    let blocks = block..blocks.end.min(block + most_blocks);
                    let sums = worker.products(kernels, matrix, blocks.clone(), &x.rows(tokens.clone()));
                    for (i, t) in tokens.clone().enumerate() {
                        for (block, sums) in blocks.clone().zip(sums.iter().skip(i).step_by(tokens.len())) {
                            write(t, block, sums);
                        }
                    }
                }
            }
        }
    });
    Ok(())
}
