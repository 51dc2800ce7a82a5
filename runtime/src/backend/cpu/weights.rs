//! The weights of a model as the CPU computes with them.

use std::sync::{Mutex, OnceLock};

use memmap2::MmapMut;

use super::integer::rows::{self, Rows, Shape};
use super::kernels::Kernels;
use super::pool::Pool;
use super::{fitting, matmul, mismatch, out_of_memory, zero_pages};
use crate::error::{Error, ErrorKind, Result};
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

/// Blocks that are rounded at a time.
const PART: usize = 64;

/// A weight in memory.
enum Stored {
    /// As it was handed over; mapped where it was.
    Plain {
        weight: Weight,
        /// The same rounded to 8 bits, once that was asked for.
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

    /// Keeps a whole weight in the form that is multiplied with.
    pub(super) fn set(&mut self, id: usize, weight: Weight) -> Result<()> {
        let Weight::W4(matrix) = &weight else {
            self.stored[id] = Stored::Plain { weight, rounded: OnceLock::new() };
            return Ok(());
        };
        let Some(shape) = Shape::of_w4(matrix.n, matrix.k, matrix.group_size, matrix.offset) else {
            self.stored[id] = Stored::Plain { weight, rounded: OnceLock::new() };
            return Ok(());
        };
        self.packed = true;
        let (place, bytes) = self.arena.take(shape.bytes())?;
        rows::interleave(matrix, &shape, bytes);
        self.stored[id] = Stored::Blocks(shape, place);
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

    /// A dense matrix rounded to 8 bits, which is done when it is first asked for; afterwards the pages of a mapped
    /// file are given back.
    pub(super) fn rounded(&self, id: usize, pool: &mut Pool, kernels: &dyn Kernels) -> Result<Rows<'_>> {
        let (Some(shape), Stored::Plain { weight: weight @ Weight::Dense(dense), rounded }) =
            (self.rounded_shape(id), &self.stored[id])
        else {
            return Err(mismatch("a dense matrix"));
        };
        if rounded.get().is_none() {
            let mut pages = huge_pages(shape.bytes(), "a matrix in 8 bits")?;
            let parts: Vec<_> = pages.chunks_mut(PART * shape.block_bytes()).map(Mutex::new).collect();
            pool.run(parts.len(), &|task, _| {
                let mut bytes = parts[task].lock().unwrap_or_else(|e| e.into_inner());
                rows::round(&shape, task * PART, &mut bytes, |row, out| {
                    matmul::expand(kernels, Matrix::Plain(weight), row, 0, out);
                });
                // Part by part, so that the two forms are never resident together.
                let rows = task * PART * rows::LANES..shape.n.min((task + 1) * PART * rows::LANES);
                let row_bytes = dense.row_bytes();
                if let Some(read) = dense.bytes.slice(rows.start * row_bytes..rows.end * row_bytes) {
                    read.release();
                }
            });
            drop(parts);
            // Another session may have been faster.
            let _ = rounded.set(pages);
        }
        let pages = rounded.get().ok_or_else(|| mismatch("a matrix in 8 bits"))?;
        Ok(Rows::new(shape, pages))
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
struct Place {
    chunk: usize,
    range: std::ops::Range<usize>,
}

/// Bytes of a chunk, unless a matrix needs more; pages not yet taken cost nothing.
const CHUNK: usize = 64 << 20;
/// Matrices start at cache lines.
const LINE: usize = 64;

impl Arena {
    fn take(&mut self, bytes: Option<usize>) -> Result<(Place, &mut [u8])> {
        let bytes = fitting(bytes, "a weight")?;
        let start = self.taken.next_multiple_of(LINE);
        if self.chunks.last().is_none_or(|chunk| chunk.len().saturating_sub(start) < bytes) {
            self.chunks.push(huge_pages(Some(bytes.max(CHUNK)), "weights")?);
            self.taken = 0;
        }
        let start = self.taken.next_multiple_of(LINE);
        self.taken = start + bytes;
        let place = Place { chunk: self.chunks.len() - 1, range: start..start + bytes };
        let range = place.range.clone();
        let chunk = self.chunks.last_mut().ok_or_else(|| out_of_memory("a weight", bytes))?;
        Ok((place, &mut chunk[range]))
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
    /// Rows of a dense matrix or of blocks, copied.
    Bytes(usize, Vec<u8>),
}

impl Partial {
    pub(super) fn rows(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Whole(weight) => weight.shape().rows(),
            Self::Bytes(rows, _) => *rows,
        }
    }

    pub(super) fn push(&mut self, shape: &WeightShape, rows: Weight) -> Result<()> {
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
            (Self::Bytes(..), _) => return Err(mismatch("a matrix of bytes")),
        }
        Ok(())
    }

    pub(super) fn finish(&mut self, shape: &WeightShape) -> Result<Weight> {
        match (std::mem::replace(self, Self::Nothing), *shape) {
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
