//! Blocks straight from AutoAWQ's `gemm` layout, without a matrix in between.

use std::ops::Range;

use half::f16;

use super::rows::{LANES, OCTET, Shape};
use crate::backend::INPUT_STEP;
use crate::backend::cpu::share::{processors, share_out};
use crate::error::Result;
use crate::quant::awq::{GEMM_ORDER, StoredGemm, transpose_nibbles};

/// Words of codes handled together: a cache line of the source.
const TILE: usize = 16;
/// Codes that are worth a thread.
const SHARE: usize = 2 << 20;

/// What is stored for some inputs.
pub(super) struct Pieces<'a> {
    inputs: Range<usize>,
    /// (inputs, n / 8) words.
    codes: &'a [u8],
    /// Groups that begin within the inputs.
    groups: Range<usize>,
    /// (groups, n) half precision.
    scales: &'a [u8],
    /// (groups, n / 8) words.
    zeros: &'a [u8],
    /// Words of a row of codes.
    words: usize,
}

/// Lays out inputs `inputs` of all rows of `stored` as rows from `first` on, a multiple of 8; `bytes` are as many as
/// `shape`, which is of the whole matrix, says.
///
/// # Errors
/// Those of reading the file.
pub(in crate::backend::cpu) fn lay_out(
    stored: &StoredGemm,
    inputs: Range<usize>,
    first: usize,
    shape: &Shape,
    bytes: &mut [u8],
) -> Result<()> {
    let [codes, scales, zeros] = stored.read(&inputs)?;
    let groups = stored.groups_from(&inputs);
    let words = stored.n / OCTET;
    let pieces = Pieces { inputs, codes: &codes, groups, scales: &scales, zeros: &zeros, words };
    let blocks = first / LANES..(first + stored.n).div_ceil(LANES);
    let bytes = &mut bytes[blocks.start * shape.block_bytes()..blocks.end * shape.block_bytes()];
    // The least that can be asked for is asked for where nothing may be shared.
    let worth = if pieces.inputs.len() > INPUT_STEP { stored.n * pieces.inputs.len() / SHARE } else { 1 };
    let threads = worth.clamp(1, processors());
    let share = blocks.len().div_ceil(threads);
    let shares = blocks.step_by(share).zip(bytes.chunks_mut(share * shape.block_bytes()));
    share_out(shares, threads, |(block, bytes)| pieces.lay_out(*block * LANES, first, shape, bytes));
    Ok(())
}

impl Pieces<'_> {
    /// Lays out the part of the rows from `first` on that falls into `bytes`, whole blocks from row `start` on.
    pub(super) fn lay_out(&self, start: usize, first: usize, shape: &Shape, bytes: &mut [u8]) {
        let (start, first) = (start / OCTET, first / OCTET);
        // Halves of blocks: eight rows, a word of the source.
        let halves = start.max(first)..(first + self.words).min(start + 2 * bytes.len() / shape.block_bytes());
        for half in halves.clone() {
            self.numbers(half - first, half - start, shape, bytes);
        }
        for tile in halves.clone().step_by(TILE) {
            let tile = tile..halves.end.min(tile + TILE);
            for octet in self.inputs.start / OCTET..self.inputs.end / OCTET {
                let mut block = [[0u32; TILE]; OCTET];
                for (i, block) in block.iter_mut().enumerate() {
                    let row = octet * OCTET + i - self.inputs.start;
                    let from = &self.codes[4 * (row * self.words + tile.start - first)..][..4 * tile.len()];
                    for (word, bytes) in block.iter_mut().zip(from.as_chunks().0) {
                        *word = u32::from_le_bytes(*bytes);
                    }
                }
                transpose_nibbles(&mut block);
                let (group, octet) = (octet * OCTET / shape.group_size, octet % (shape.group_size / OCTET));
                let within = group * shape.group_bytes() + shape.param_bytes() + octet * shape.octet_bytes();
                for (lane, half) in tile.clone().enumerate() {
                    let at = (half - start) / 2 * shape.block_bytes() + within + (half - start) % 2 * 4 * OCTET;
                    let to = bytes[at..][..4 * OCTET].as_chunks_mut::<4>().0;
                    for (words, row) in block.iter().zip(GEMM_ORDER) {
                        to[row] = words[lane].to_ne_bytes();
                    }
                }
            }
        }
    }

    /// Writes scales and zero points of eight rows, word `word` of the source, to a half of a block.
    fn numbers(&self, word: usize, half: usize, shape: &Shape, bytes: &mut [u8]) {
        for (i, group) in self.groups.clone().enumerate() {
            let at = half / 2 * shape.block_bytes() + group * shape.group_bytes() + half % 2 * 2 * OCTET;
            let scales = &self.scales[2 * OCTET * (i * self.words + word)..][..2 * OCTET];
            for (to, scale) in bytes[at..][..2 * OCTET].as_chunks_mut::<2>().0.iter_mut().zip(scales.as_chunks().0) {
                *to = u16::from_le_bytes(*scale).to_ne_bytes();
            }
            let zeros = u32::from_le_bytes(self.zeros.as_chunks().0[i * self.words + word]);
            let to = bytes[at + 2 * LANES..][..2 * OCTET].as_chunks_mut::<2>().0;
            for (t, row) in GEMM_ORDER.into_iter().enumerate() {
                to[row] = f16::from_f32((zeros >> (4 * t) & 15) as f32).to_bits().to_ne_bytes();
            }
        }
    }
}

#[cfg(test)]
impl<'a> Pieces<'a> {
    /// The inputs `inputs` of a matrix of `n` rows in memory.
    pub(super) fn of(
        tensors: &'a crate::quant::awq::GemmTensors,
        inputs: Range<usize>,
        n: usize,
        group_size: usize,
    ) -> Self {
        let words = n / OCTET;
        let groups = inputs.start.div_ceil(group_size)..inputs.end.div_ceil(group_size);
        Self {
            codes: bytemuck::cast_slice(&tensors.qweight[inputs.start * words..inputs.end * words]),
            scales: bytemuck::cast_slice(&tensors.scales[groups.start * n..groups.end * n]),
            zeros: bytemuck::cast_slice(&tensors.qzeros[groups.start * words..groups.end * words]),
            inputs,
            groups,
            words,
        }
    }
}
