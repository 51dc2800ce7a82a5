//! The weights of a model as the CPU computes with them.

use std::ops::Range;
use std::sync::OnceLock;

use memmap2::MmapMut;

use super::integer::rows::{self, Rows, Shape};
use super::integer::stored;
use super::kernels::Kernels;
use super::{fitting, matmul, mismatch, out_of_memory, zero_pages};
use crate::error::{Error, ErrorKind, Result};
use crate::quant::awq::StoredGemm;
use crate::tensor::{BlockMatrix, Bytes, DenseMatrix, Weight, WeightShape};

/// Weights by their ids.
#[derive(Default)]
pub(super) struct Weights {
    stored: Vec<Stored>,
    arena: Arena,
    /// Whether there is any packed matrix.
    packed: bool,
}

/// Bytes from which on a matrix is worth rounding to 8 bits.
pub(super) const LARGE: usize = 8 << 20;

/// A weight in memory.
enum Stored {
    /// As it was handed over; mapped where it was.
    Plain {
        weight: Weight,
        /// The same rounded to 8 bits, for the output layer.
        rounded: OnceLock<MmapMut>,
    },
    /// A packed matrix in blocks.
    Blocks(Shape, Place),
}

/// A matrix to multiply with.
#[derive(Clone, Copy)]
pub(super) enum Matrix<'a> {
    Plain(&'a Weight),
    Blocks(Rows<'a>),
}

impl Matrix<'_> {
    /// Rows and columns.
    pub(super) fn dims(&self) -> (usize, usize) {
        match self {
            Self::Plain(weight) => weight.dims(),
            Self::Blocks(rows) => (rows.shape().n, rows.shape().k),
        }
    }
}

impl Weights {
    /// A weight whose rows come later.
    pub(super) fn reserve(&mut self) -> usize {
        self.stored.push(Stored::Plain { weight: Weight::Vector(Vec::new()), rounded: OnceLock::new() });
        self.stored.len() - 1
    }

    /// Takes the next rows of a weight of shape `shape`, of which `partial` is there so far.
    pub(super) fn push(&mut self, shape: &WeightShape, partial: &mut Partial, rows: Weight) -> Result<()> {
        let Weight::W4(matrix) = &rows else { return partial.push(shape, rows) };
        let Some((blocks, bytes, filled)) = self.blocks(shape, partial, matrix.n)? else {
            return partial.push(shape, rows);
        };
        if rows.shape() != shape.with_rows(matrix.n) {
            return Err(mismatch("rows of this weight"));
        }
        rows::interleave(matrix, *filled, &blocks, bytes);
        *filled += matrix.n;
        Ok(())
    }

    /// As [`Self::push`], for inputs `inputs` of rows that are not read yet; they count with the last of their inputs.
    pub(super) fn push_stored(
        &mut self,
        shape: &WeightShape,
        partial: &mut Partial,
        stored: &StoredGemm,
        inputs: Range<usize>,
    ) -> Result<()> {
        let Some((blocks, bytes, filled)) = self.blocks(shape, partial, stored.n)? else {
            return Err(mismatch("a matrix in blocks"));
        };
        let last = inputs.end == stored.k;
        stored::lay_out(stored, inputs, *filled, &blocks, bytes)?;
        if last {
            *filled += stored.n;
        }
        Ok(())
    }

    /// The blocks of a weight and how many of its rows they hold, before `more` are added; `None` for a weight that is
    /// stored in another form.
    #[allow(clippy::type_complexity, reason = "what a struct would only name")]
    fn blocks<'a>(
        &'a mut self,
        shape: &WeightShape,
        partial: &'a mut Partial,
        more: usize,
    ) -> Result<Option<(Shape, &'a mut [u8], &'a mut usize)>> {
        let Some(blocks) = Shape::of(shape) else { return Ok(None) };
        if let Partial::Nothing = partial {
            *partial = Partial::Blocks { shape: blocks, place: self.arena.take(blocks.bytes())?, rows: 0 };
        }
        match partial {
            Partial::Blocks { shape, place, rows } if *rows + more <= shape.n => {
                Ok(Some((*shape, self.arena.bytes_mut(place), rows)))
            }
            _ => Err(mismatch("no more rows of this weight")),
        }
    }

    /// Keeps a whole weight in the form that is multiplied with.
    pub(super) fn set(&mut self, id: usize, weight: Partial, shape: &WeightShape) -> Result<()> {
        self.stored[id] = match weight {
            Partial::Blocks { shape, place, .. } => {
                self.packed = true;
                Stored::Blocks(shape, place)
            }
            weight => Stored::Plain { weight: weight.finish(shape)?, rounded: OnceLock::new() },
        };
        Ok(())
    }

    /// A matrix in the form and precision it came in.
    pub(super) fn matrix(&self, id: usize) -> Matrix<'_> {
        match &self.stored[id] {
            Stored::Plain { weight, .. } => Matrix::Plain(weight),
            Stored::Blocks(shape, place) => Matrix::Blocks(Rows::new(*shape, self.arena.bytes(place))),
        }
    }

    /// What is no packed matrix.
    pub(super) fn plain(&self, id: usize) -> Option<&Weight> {
        match &self.stored[id] {
            Stored::Plain { weight, .. } => Some(weight),
            Stored::Blocks(..) => None,
        }
    }

    /// The blocks that [`Self::rounded`] gives: of a large matrix beside packed ones. A small one is read from a cache
    /// anyway; and who keeps all matrices in half precision has memory for it, and wants it.
    pub(super) fn rounded_shape(&self, id: usize) -> Option<Shape> {
        match &self.stored[id] {
            Stored::Plain { weight: Weight::Dense(m), .. } if self.packed && m.bytes.len() >= LARGE => {
                Shape::of_bytes(m.n, m.k)
            }
            _ => None,
        }
    }

    /// A dense matrix rounded to 8 bits, once that was done.
    pub(super) fn rounded(&self, id: usize) -> Option<Rows<'_>> {
        match &self.stored[id] {
            Stored::Plain { rounded, .. } => Some(Rows::new(self.rounded_shape(id)?, rounded.get()?)),
            Stored::Blocks(..) => None,
        }
    }

    /// Rounds the blocks from `first` on of a matrix that [`Self::rounded_shape`] is for, as many as `bytes` takes.
    /// Afterwards their pages of a mapped file are given back, so that the two forms are never resident together.
    pub(super) fn round(&self, id: usize, first: usize, bytes: &mut [u8], kernels: &dyn Kernels) {
        let (Some(shape), Stored::Plain { weight: weight @ Weight::Dense(dense), .. }) =
            (self.rounded_shape(id), &self.stored[id])
        else {
            return;
        };
        let blocks = bytes.len() / shape.block_bytes();
        rows::round(kernels, &shape, first, bytes, |row, out| {
            matmul::expand(kernels, Matrix::Plain(weight), row, 0, out);
        });
        let rows = first * rows::LANES..shape.n.min((first + blocks) * rows::LANES);
        let row_bytes = dense.row_bytes();
        if let Some(read) = dense.bytes.slice(rows.start * row_bytes..rows.end * row_bytes) {
            read.release();
        }
    }

    /// Keeps what [`Self::round`] made of all blocks.
    pub(super) fn keep_rounded(&self, id: usize, pages: MmapMut) {
        if let Stored::Plain { rounded, .. } = &self.stored[id] {
            // Whoever was faster has made the same.
            let _ = rounded.set(pages);
        }
    }
}

/// Memory for matrices, in pieces large enough for huge pages: tables of pages of 4 KiB cost a quarter of the bandwidth
/// of a stream.
#[derive(Default)]
struct Arena {
    chunks: Vec<MmapMut>,
    /// Bytes of the last chunk that are taken.
    taken: usize,
}

/// Where in an [`Arena`] a matrix is.
pub(super) struct Place {
    chunk: usize,
    range: Range<usize>,
}

/// Bytes of a chunk, unless a matrix needs more; pages not yet taken cost nothing.
const CHUNK: usize = 64 << 20;
/// Matrices start at cache lines.
const LINE: usize = 64;

impl Arena {
    fn take(&mut self, bytes: Option<usize>) -> Result<Place> {
        let bytes = fitting(bytes, "a weight")?;
        let start = self.taken.next_multiple_of(LINE);
        if self.chunks.last().is_none_or(|chunk| chunk.len().saturating_sub(start) < bytes) {
            self.chunks.push(huge_pages(Some(bytes.max(CHUNK)), "weights")?);
            self.taken = 0;
        }
        let start = self.taken.next_multiple_of(LINE);
        self.taken = start + bytes;
        Ok(Place { chunk: self.chunks.len() - 1, range: start..start + bytes })
    }

    fn bytes_mut(&mut self, place: &Place) -> &mut [u8] {
        &mut self.chunks[place.chunk][place.range.clone()]
    }

    fn bytes(&self, place: &Place) -> &[u8] {
        &self.chunks[place.chunk][place.range.clone()]
    }
}

/// Zeros in huge pages where the system has them.
pub(super) fn huge_pages(bytes: Option<usize>, what: &str) -> Result<MmapMut> {
    let pages = zero_pages(bytes, what)?;
    #[cfg(target_os = "linux")]
    let _ = pages.advise(memmap2::Advice::HugePage);
    Ok(pages)
}

/// Rows of a weight so far.
pub(super) enum Partial {
    Nothing,
    Whole(Weight),
    /// Rows of a dense matrix or of GGUF's blocks, copied.
    Bytes(usize, Vec<u8>),
    /// So many rows of a matrix in blocks.
    Blocks {
        shape: Shape,
        place: Place,
        rows: usize,
    },
}

impl Partial {
    pub(super) fn rows(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Whole(weight) => weight.shape().rows(),
            Self::Bytes(rows, _) | Self::Blocks { rows, .. } => *rows,
        }
    }

    fn push(&mut self, shape: &WeightShape, rows: Weight) -> Result<()> {
        let count = rows.shape().rows();
        if rows.shape() != shape.with_rows(count) || self.rows() + count > shape.rows() {
            let message = format!("{:?} does not continue {} rows of {shape:?}", rows.shape(), self.rows());
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let bytes = usize::try_from(shape.bytes(shape.rows())).ok();
        match (&mut *self, rows) {
            (Self::Nothing, rows) if count == shape.rows() => *self = Self::Whole(rows),
            (
                Self::Nothing,
                Weight::Dense(DenseMatrix { bytes: rows, .. }) | Weight::Blocks(BlockMatrix { bytes: rows, .. }),
            ) => {
                let mut all = Vec::new();
                let bytes = fitting(bytes, "a weight")?;
                all.try_reserve_exact(bytes).map_err(|_| out_of_memory("a weight", bytes))?;
                all.extend_from_slice(&rows);
                *self = Self::Bytes(count, all);
            }
            (Self::Nothing, mut rows) => {
                let bytes = fitting(bytes, "a weight")?;
                let more = shape.rows() - count;
                let reserved = match &mut rows {
                    Weight::W4(m) => m
                        .qweight
                        .try_reserve_exact(more * (m.k / 8))
                        .and_then(|()| m.group_params.try_reserve_exact(more * (m.k / m.group_size))),
                    Weight::Packed(m) => m.reserve(more),
                    Weight::Vector(v) => v.try_reserve_exact(more),
                    Weight::Order(v) => v.try_reserve_exact(more),
                    Weight::Dense(_) | Weight::Blocks(_) => Ok(()),
                };
                reserved.map_err(|_| out_of_memory("a weight", bytes))?;
                *self = Self::Whole(rows);
            }
            (Self::Whole(all), rows) => all.append(rows)?,
            (
                Self::Bytes(n, all),
                Weight::Dense(DenseMatrix { bytes: rows, .. }) | Weight::Blocks(BlockMatrix { bytes: rows, .. }),
            ) => {
                all.extend_from_slice(&rows);
                *n += count;
            }
            (Self::Bytes(..) | Self::Blocks { .. }, _) => return Err(mismatch("a matrix of bytes")),
        }
        Ok(())
    }

    fn finish(self, shape: &WeightShape) -> Result<Weight> {
        match (self, *shape) {
            (Self::Whole(weight), _) => Ok(weight),
            (Self::Bytes(_, bytes), WeightShape::Dense { n, k, dtype }) => {
                DenseMatrix::new(n, k, dtype, Bytes::owned(bytes)).map(Weight::Dense)
            }
            (Self::Bytes(_, bytes), WeightShape::Blocks { n, k, ggml_type }) => {
                BlockMatrix::new(n, k, ggml_type, Bytes::owned(bytes)).map(Weight::Blocks)
            }
            _ => Err(mismatch("a whole weight")),
        }
    }
}
