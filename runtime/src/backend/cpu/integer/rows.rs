//! Rows of a matrix of integer codes, laid out for processors: sixteen side by side.
//!
//! A *block* is [`LANES`] rows. Its groups follow each other, so that a product reads one ascending stream:
//!
//! - the group's scales, an f16 a row, and for 4-bit codes the offsets, an f16 a row;
//! - the codes of eight columns, an *octet*, of all sixteen rows; then of the next eight.
//!
//! The order of an octet's columns is such that a 32-bit lane of a vector always belongs to one row, hence no sum is ever
//! added up across a vector:
//!
//! - 4 bits: a 32-bit word a row, nibble t is column t. Masking out nibble t of both 16-bit halves gives columns t and
//!   t + 4 as a pair of 16-bit numbers.
//! - 8 bits: for t = 0..4 the signed bytes of columns t and t + 4 of every row.

use half::f16;

use crate::backend::cpu::kernels::Kernels;
use crate::tensor::{DenseType, Offset, W4Matrix, WeightShape};

/// Rows of a block.
pub(in crate::backend::cpu) const LANES: usize = 16;
/// Columns whose codes of one row are stored together.
pub(in crate::backend::cpu) const OCTET: usize = 8;
/// Columns of a group of 8-bit codes.
pub(in crate::backend::cpu) const BYTE_GROUP: usize = 32;
/// Most columns that share a scale of the activations.
pub(in crate::backend::cpu) const MAX_SPAN: usize = 256;

/// What codes stand for, with the scale s of their group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::backend::cpu) enum Codes {
    /// 4 bits and a group's second number, see [`W4Matrix`].
    Four(Offset),
    /// s * q with q from -127 to 127.
    Eight,
}

/// Size and form of a matrix in blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::backend::cpu) struct Shape {
    pub(in crate::backend::cpu) n: usize,
    /// A multiple of `group_size`.
    pub(in crate::backend::cpu) k: usize,
    /// A multiple of [`BYTE_GROUP`].
    pub(in crate::backend::cpu) group_size: usize,
    pub(in crate::backend::cpu) codes: Codes,
}

impl Shape {
    /// The blocks that a packed matrix of this shape is stored in, if its groups allow it.
    pub(in crate::backend::cpu) fn of_w4(n: usize, k: usize, group_size: usize, offset: Offset) -> Option<Self> {
        let fits = k > 0 && group_size > 0 && k.is_multiple_of(group_size) && group_size.is_multiple_of(BYTE_GROUP);
        // The definition's rounding to bfloat16, which products in integers leave out, is coarse enough to see: with
        // groups of 32 it moves logits of small models by 0.7 % of the largest one.
        let coarse = offset.rounding() == DenseType::BF16 && !group_size.is_multiple_of(2 * BYTE_GROUP);
        (fits && !coarse).then_some(Self { n, k, group_size, codes: Codes::Four(offset) })
    }

    /// The blocks that a weight is stored in, if it is.
    pub(in crate::backend::cpu) fn of(weight: &WeightShape) -> Option<Self> {
        match *weight {
            WeightShape::W4 { n, k, group_size, offset } => Self::of_w4(n, k, group_size, offset),
            _ => None,
        }
    }

    /// The blocks that a dense matrix can be rounded to.
    pub(in crate::backend::cpu) fn of_bytes(n: usize, k: usize) -> Option<Self> {
        let fits = k > 0 && k.is_multiple_of(BYTE_GROUP);
        fits.then_some(Self { n, k, group_size: BYTE_GROUP, codes: Codes::Eight })
    }

    /// Columns that share a scale of the activations: the largest part of a group that may.
    pub(in crate::backend::cpu) fn span(&self) -> usize {
        let parts = (1..=MAX_SPAN / BYTE_GROUP).rev().map(|n| n * BYTE_GROUP);
        parts.into_iter().find(|span| self.group_size.is_multiple_of(*span)).unwrap_or(BYTE_GROUP)
    }

    /// Whether anything is added to `s * q`.
    pub(in crate::backend::cpu) fn has_offsets(&self) -> bool {
        matches!(self.codes, Codes::Four(_))
    }

    pub(in crate::backend::cpu) fn groups(&self) -> usize {
        self.k / self.group_size
    }

    pub(in crate::backend::cpu) fn blocks(&self) -> usize {
        self.n.div_ceil(LANES)
    }

    /// Bytes of a group's numbers.
    pub(in crate::backend::cpu) fn param_bytes(&self) -> usize {
        match self.codes {
            Codes::Four(_) => 4 * LANES,
            Codes::Eight => 2 * LANES,
        }
    }

    /// Bytes of an octet's codes.
    pub(in crate::backend::cpu) fn octet_bytes(&self) -> usize {
        match self.codes {
            Codes::Four(_) => 4 * LANES,
            Codes::Eight => OCTET * LANES,
        }
    }

    pub(in crate::backend::cpu) fn group_bytes(&self) -> usize {
        self.param_bytes() + self.group_size / OCTET * self.octet_bytes()
    }

    pub(in crate::backend::cpu) fn block_bytes(&self) -> usize {
        self.groups() * self.group_bytes()
    }

    /// Bytes of the whole matrix, or `None` if they can't be counted.
    pub(in crate::backend::cpu) fn bytes(&self) -> Option<usize> {
        self.block_bytes().checked_mul(self.blocks())
    }
}

/// A matrix in blocks.
#[derive(Clone, Copy)]
pub(in crate::backend::cpu) struct Rows<'a> {
    shape: Shape,
    bytes: &'a [u8],
}

impl<'a> Rows<'a> {
    /// # Panics
    /// If `bytes` are not as many as the shape says.
    pub(in crate::backend::cpu) fn new(shape: Shape, bytes: &'a [u8]) -> Self {
        assert!(shape.bytes() == Some(bytes.len()));
        Self { shape, bytes }
    }

    pub(in crate::backend::cpu) fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The groups of a block.
    pub(super) fn block(&self, block: usize) -> &'a [u8] {
        let bytes = self.shape.block_bytes();
        &self.bytes[block * bytes..][..bytes]
    }

    /// A row's part of a group.
    fn group(&self, row: usize, group: usize) -> Group<'a> {
        let (shape, lane) = (&self.shape, row % LANES);
        let bytes = &self.block(row / LANES)[group * shape.group_bytes()..][..shape.group_bytes()];
        let number = |at: usize| u16::from_ne_bytes([bytes[2 * at], bytes[2 * at + 1]]);
        let (scale, offset) = match shape.codes {
            Codes::Four(_) => (number(lane), number(LANES + lane)),
            Codes::Eight => (number(lane), 0),
        };
        Group { scale, offset, lane, codes: &bytes[shape.param_bytes()..] }
    }

    /// The weights of row `row` from column `first` on, a multiple of 8, as many as `out` has, a multiple of 8 too: those
    /// of the definition, rounded as it rounds.
    pub(in crate::backend::cpu) fn expand(&self, kernels: &dyn Kernels, row: usize, first: usize, out: &mut [f32]) {
        let (mut column, mut left) = (first, out);
        while !left.is_empty() {
            let in_group = column % self.shape.group_size;
            let n = (self.shape.group_size - in_group).min(MAX_SPAN).min(left.len());
            let (out, rest) = left.split_at_mut(n);
            let group = self.group(row, column / self.shape.group_size);
            let octets = in_group / OCTET..(in_group + n) / OCTET;
            match self.shape.codes {
                Codes::Four(offset) => {
                    let mut words = [0; MAX_SPAN / OCTET];
                    words.iter_mut().zip(octets).for_each(|(word, octet)| *word = group.word(octet));
                    let params = u32::from(group.scale) | u32::from(group.offset) << 16;
                    kernels.expand_w4(&words[..n / OCTET], &[params], n, offset, out);
                }
                Codes::Eight => {
                    let scale = f16::from_bits(group.scale).to_f32();
                    for (octet, out) in octets.zip(out.as_chunks_mut::<OCTET>().0) {
                        *out = std::array::from_fn(|t| scale * f32::from(group.byte(octet, t)));
                    }
                }
            }
            (column, left) = (column + n, rest);
        }
    }

    /// The weights of a block of 4-bit codes from column `first` on, a multiple of 8, (columns, 16) as many as `out` has,
    /// a multiple of 8 too: those of the definition, rounded as it rounds.
    pub(in crate::backend::cpu) fn expand_block(
        &self,
        kernels: &dyn Kernels,
        block: usize,
        first: usize,
        out: &mut [f32],
    ) {
        let Codes::Four(offset) = self.shape.codes else { return out.fill(f32::NAN) };
        let (mut column, mut left) = (first, out);
        while !left.is_empty() {
            let in_group = column % self.shape.group_size;
            let n = (self.shape.group_size - in_group).min(left.len() / LANES);
            let (out, rest) = left.split_at_mut(n * LANES);
            let bytes = &self.block(block)[column / self.shape.group_size * self.shape.group_bytes()..];
            let (params, codes) = bytes[..self.shape.group_bytes()].split_at(self.shape.param_bytes());
            let codes = &codes[in_group / OCTET * self.shape.octet_bytes()..][..n / OCTET * self.shape.octet_bytes()];
            kernels.expand_columns(offset, params, codes, out);
            (column, left) = (column + n, rest);
        }
    }

    /// The codes of row `row` from column `first` on, all of one group, for plain code; returns s and b of `s * q + b`.
    pub(super) fn codes(&self, row: usize, first: usize, out: &mut [i16]) -> (f32, f32) {
        let numbers = self.group(row, first / self.shape.group_size);
        for (i, out) in out.as_chunks_mut::<OCTET>().0.iter_mut().enumerate() {
            let octet = first % self.shape.group_size / OCTET + i;
            *out = match self.shape.codes {
                Codes::Four(_) => std::array::from_fn(|t| (numbers.word(octet) >> (4 * t) & 15) as i16),
                Codes::Eight => std::array::from_fn(|t| i16::from(numbers.byte(octet, t))),
            };
        }
        let (s, o) = (f16::from_bits(numbers.scale).to_f32(), f16::from_bits(numbers.offset).to_f32());
        match self.shape.codes {
            Codes::Four(offset) if offset.is_bias() => (s, o),
            Codes::Four(_) => (s, -(s * o)),
            Codes::Eight => (s, 0.0),
        }
    }
}

/// A row's part of a group.
struct Group<'a> {
    scale: u16,
    offset: u16,
    lane: usize,
    codes: &'a [u8],
}

impl Group<'_> {
    fn word(&self, octet: usize) -> u32 {
        u32::from_ne_bytes(self.codes.as_chunks().0[octet * LANES + self.lane])
    }

    fn byte(&self, octet: usize, column: usize) -> i8 {
        self.codes[OCTET * LANES * octet + byte_place(column, self.lane)] as i8
    }
}

/// Where in an octet of 8-bit codes the one of a column and lane is.
fn byte_place(column: usize, lane: usize) -> usize {
    2 * LANES * (column % 4) + 2 * lane + column / 4
}

/// Lays out the rows of `matrix` as those from `first` on; `bytes` are as many as `shape`, which is of the whole matrix,
/// says.
pub(in crate::backend::cpu) fn interleave(matrix: &W4Matrix, first: usize, shape: &Shape, bytes: &mut [u8]) {
    let (words, groups) = (matrix.k / OCTET, matrix.groups());
    let blocks = first / LANES..(first + matrix.n).div_ceil(LANES);
    for (block, bytes) in blocks.clone().zip(bytes.chunks_exact_mut(shape.block_bytes()).skip(blocks.start)) {
        let rows = first.max(block * LANES)..(first + matrix.n).min((block + 1) * LANES);
        for (group, bytes) in bytes.chunks_exact_mut(shape.group_bytes()).enumerate() {
            let (params, codes) = bytes.split_at_mut(shape.param_bytes());
            for to in rows.clone() {
                let (row, lane) = (to - first, to % LANES);
                let both = matrix.group_params[row * groups + group];
                params[2 * lane..][..2].copy_from_slice(&(both as u16).to_ne_bytes());
                params[2 * (LANES + lane)..][..2].copy_from_slice(&((both >> 16) as u16).to_ne_bytes());
                let first = row * words + group * (shape.group_size / OCTET);
                let words = &matrix.qweight[first..][..shape.group_size / OCTET];
                for (codes, word) in codes.chunks_exact_mut(shape.octet_bytes()).zip(words) {
                    codes[4 * lane..][..4].copy_from_slice(&word.to_ne_bytes());
                }
            }
        }
    }
}

/// Rounds the blocks from `first` on of a matrix to 8 bits, as many as `bytes` takes; `read` writes a row's weights.
pub(in crate::backend::cpu) fn round(
    kernels: &dyn Kernels,
    shape: &Shape,
    first: usize,
    bytes: &mut [u8],
    mut read: impl FnMut(usize, &mut [f32]),
) {
    // Rows that the last block does not have stay zeros.
    let mut rows = vec![0.0f32; LANES * shape.k];
    for (block, bytes) in (first..).zip(bytes.chunks_exact_mut(shape.block_bytes())) {
        let present = block * LANES..shape.n.min((block + 1) * LANES);
        rows[present.len() * shape.k..].fill(0.0);
        for (n, row) in present.zip(rows.chunks_exact_mut(shape.k)) {
            read(n, row);
        }
        for (group, bytes) in bytes.chunks_exact_mut(shape.group_bytes()).enumerate() {
            kernels.round_group(&rows[group * BYTE_GROUP..], shape.k, bytes);
        }
    }
}

/// See [`Kernels::round_group`].
pub(in crate::backend::cpu) fn round_group(values: &[f32], stride: usize, bytes: &mut [u8]) {
    let (params, codes) = bytes.split_at_mut(2 * LANES);
    for (lane, params) in params.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        let values = &values[lane * stride..][..BYTE_GROUP];
        let largest = values.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        let scale = f16::from_f32(largest / 127.0);
        let inverse = match scale.to_f32() {
            0.0 => 0.0,
            scale => 1.0 / scale,
        };
        *params = scale.to_bits().to_ne_bytes();
        for (values, codes) in values.as_chunks::<OCTET>().0.iter().zip(codes.chunks_exact_mut(OCTET * LANES)) {
            for (column, value) in values.iter().enumerate() {
                // Adding and taking away 1.5 * 2^23 rounds to an integer, everywhere without a call.
                let code = (value * inverse).clamp(-127.0, 127.0) + 12_582_912.0 - 12_582_912.0;
                codes[byte_place(column, lane)] = code as i8 as u8;
            }
        }
    }
}
