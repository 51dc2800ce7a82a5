//! Weights on the device: packed matrices in tiles, dense rows padded to what the kernels load at once, both split into
//! parts that one binding can hold.

use std::ops::Range;

use awqua_shaders::{FLAG_OFFSET_IS_BIAS, FLAG_SUMS, w4};
use wgpu::BufferUsages;

use super::device::{Gpu, SLICE};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{DenseMatrix, DenseType, Offset, W4Matrix, Weight, WeightShape};

/// A kernel loads four words of a dense row at once; rows are padded with zeros to multiples of this many bytes.
const ROW_BYTES: usize = 16;

/// A weight the way kernels read it.
pub(super) enum GpuWeight {
    W4(GpuW4),
    Dense(GpuDense),
    Vector {
        len: u32,
        buffer: wgpu::Buffer,
    },
    /// A matrix of experts behind the first one, which holds the rows of all.
    Expert {
        n: u32,
        first: u32,
    },
}

/// A packed matrix in the layout of [`w4`].
pub(super) struct GpuW4 {
    pub(super) n: u32,
    pub(super) k: u32,
    pub(super) group_size: u32,
    pub(super) groups: u32,
    pub(super) chunks: u32,
    /// What the offsets of its groups are, as flags of the kernels.
    pub(super) flags: u32,
    pub(super) parts: Vec<W4Part>,
}

/// Rows `first_row..first_row + rows` of a packed matrix.
pub(super) struct W4Part {
    pub(super) first_row: u32,
    pub(super) rows: u32,
    pub(super) qweight: wgpu::Buffer,
    pub(super) group_params: wgpu::Buffer,
}

/// A dense matrix: (n, k), rows of `row_words` words.
pub(super) struct GpuDense {
    pub(super) n: u32,
    pub(super) k: u32,
    pub(super) dtype: DenseType,
    pub(super) row_words: u32,
    pub(super) parts: Vec<DensePart>,
}

/// Rows `first_row..first_row + rows` of a dense matrix.
pub(super) struct DensePart {
    pub(super) first_row: u32,
    pub(super) rows: u32,
    pub(super) words: wgpu::Buffer,
}

/// Bytes that a weight takes on the device.
pub(super) fn bytes(shape: &WeightShape) -> u64 {
    let size = |bytes: usize| super::device::buffer_size(bytes as u64);
    match *shape {
        WeightShape::W4 { n, k, group_size, .. } => {
            let shape = w4::Shape { n, k, group_size };
            size(shape.words(n).saturating_mul(4)).saturating_add(size(shape.params(n).saturating_mul(4)))
        }
        WeightShape::Dense { n, k, dtype } => {
            size(n.saturating_mul((k.saturating_mul(dtype.size())).next_multiple_of(ROW_BYTES)))
        }
        WeightShape::Vector { len } => size(len.saturating_mul(4)),
    }
}

impl GpuWeight {
    /// Makes the buffers for a weight of `shape`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`], [`ErrorKind::Unsupported`] for shapes beyond 32 bits, or a device error.
    pub(super) fn reserve(gpu: &Gpu, name: &str, shape: &WeightShape) -> Result<Self> {
        let unit = if matches!(shape, WeightShape::W4 { .. }) { w4::TILE_N } else { 1 };
        Self::reserve_units(gpu, name, shape, unit)
    }

    /// As [`Self::reserve`], for `count` matrices of `shape`, each padded to [`expert_rows`] and whole in one part.
    ///
    /// # Errors
    /// As [`Self::reserve`].
    pub(super) fn reserve_experts(gpu: &Gpu, name: &str, shape: &WeightShape, count: usize) -> Result<Self> {
        let rows = expert_rows(shape);
        let all = rows.checked_mul(count).ok_or_else(|| Error::new(ErrorKind::Unsupported, "too many experts"))?;
        Self::reserve_units(gpu, name, &shape.with_rows(all), rows)
    }

    /// Makes the buffers; parts have a multiple of `unit` rows.
    fn reserve_units(gpu: &Gpu, name: &str, shape: &WeightShape, unit: usize) -> Result<Self> {
        match *shape {
            WeightShape::W4 { n, k, group_size, offset } => {
                let shape = w4::Shape { n, k, group_size };
                let unit_bytes = 4 * shape.words(unit).max(shape.params(unit));
                let parts = split(gpu, name, n.div_ceil(unit), unit_bytes)?
                    .into_iter()
                    .map(|units| {
                        let rows = units.start * unit..n.min(units.end * unit);
                        Ok(W4Part {
                            first_row: dimension(rows.start)?,
                            rows: dimension(rows.len())?,
                            qweight: weight_buffer(gpu, name, shape.words(rows.len()) * 4)?,
                            group_params: weight_buffer(gpu, name, shape.params(rows.len()) * 4)?,
                        })
                    })
                    .collect::<Result<_>>()?;
                Ok(Self::W4(GpuW4 {
                    n: dimension(n)?,
                    k: dimension(k)?,
                    group_size: dimension(group_size)?,
                    groups: dimension(shape.groups())?,
                    chunks: dimension(shape.chunks())?,
                    flags: match offset {
                        Offset::Bias => FLAG_OFFSET_IS_BIAS | FLAG_SUMS,
                        Offset::Zero => 0,
                    },
                    parts,
                }))
            }
            WeightShape::Dense { n, k, dtype } => {
                let padded = (k * dtype.size()).next_multiple_of(ROW_BYTES);
                let parts = split(gpu, name, n.div_ceil(unit), unit * padded)?
                    .into_iter()
                    .map(|units| {
                        let rows = units.start * unit..n.min(units.end * unit);
                        let words = weight_buffer(gpu, name, rows.len() * padded)?;
                        Ok(DensePart { first_row: dimension(rows.start)?, rows: dimension(rows.len())?, words })
                    })
                    .collect::<Result<_>>()?;
                Ok(Self::Dense(GpuDense {
                    n: dimension(n)?,
                    k: dimension(k)?,
                    dtype,
                    row_words: dimension(padded / 4)?,
                    parts,
                }))
            }
            WeightShape::Vector { len } => {
                Ok(Self::Vector { len: dimension(len)?, buffer: weight_buffer(gpu, name, 4 * len)? })
            }
        }
    }

    /// Rows of the whole weight.
    pub(super) fn rows(&self) -> usize {
        match self {
            Self::W4(m) => m.n as usize,
            Self::Dense(m) => m.n as usize,
            Self::Vector { len, .. } => *len as usize,
            Self::Expert { n, .. } => *n as usize,
        }
    }

    /// Hands `rows`, which begin at row `first`, to the driver. Does not wait for the device.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if they are of another form, or a device error.
    pub(super) fn fill(&mut self, gpu: &Gpu, first: usize, rows: &Weight) -> Result<()> {
        let other = || Error::new(ErrorKind::InvalidInput, format!("{:?} are rows of another weight", rows.shape()));
        match (self, rows) {
            (Self::W4(to), Weight::W4(rows)) if rows.k == to.k as usize && first.is_multiple_of(w4::TILE_N) => {
                to.fill(gpu, first, rows)
            }
            (Self::Dense(to), Weight::Dense(rows)) if rows.k == to.k as usize && rows.dtype == to.dtype => {
                to.fill(gpu, first, rows)
            }
            (Self::Vector { buffer, .. }, Weight::Vector(values)) => {
                gpu.write(buffer, first as u64 * 4, bytemuck::cast_slice(values))
            }
            _ => Err(other()),
        }
    }

    /// Gives its memory back at once, also where bind groups still name it.
    pub(super) fn destroy(&self) {
        match self {
            Self::W4(m) => m.parts.iter().for_each(|part| {
                part.qweight.destroy();
                part.group_params.destroy();
            }),
            Self::Dense(m) => m.parts.iter().for_each(|part| part.words.destroy()),
            Self::Vector { buffer, .. } => buffer.destroy(),
            Self::Expert { .. } => {}
        }
    }
}

impl GpuW4 {
    fn fill(&mut self, gpu: &Gpu, first: usize, rows: &W4Matrix) -> Result<()> {
        let shape = w4::Shape { n: rows.n, k: rows.k, group_size: rows.group_size };
        let (columns, groups) = (rows.k / 8, rows.groups());
        if rows.offset == Offset::Zero && !rows.group_params.iter().all(|params| is_code(*params)) {
            self.flags |= FLAG_SUMS;
        }
        for part in &self.parts {
            let (part_first, part_end) = (part.first_row as usize, (part.first_row + part.rows) as usize);
            let (from, to) = (first.max(part_first), (first + rows.n).min(part_end));
            // A bounded number of tiles at a time.
            let tile_bytes = 4 * shape.words(1).max(shape.params(1));
            for start in (from..to).step_by((SLICE / tile_bytes).max(1) * w4::TILE_N) {
                let end = to.min(start + (SLICE / tile_bytes).max(1) * w4::TILE_N);
                let (codes, params) = (
                    &rows.qweight[(start - first) * columns..(end - first) * columns],
                    &rows.group_params[(start - first) * groups..(end - first) * groups],
                );
                let (words, params) = shape.tile(codes, params);
                let before = start - part_first;
                gpu.write(&part.qweight, shape.words(before) as u64 * 4, bytemuck::cast_slice(&words))?;
                gpu.write(&part.group_params, shape.params(before) as u64 * 4, bytemuck::cast_slice(&params))?;
            }
        }
        Ok(())
    }
}

impl GpuDense {
    fn fill(&self, gpu: &Gpu, first: usize, rows: &DenseMatrix) -> Result<()> {
        let row_bytes = rows.row_bytes();
        let padded = row_bytes.next_multiple_of(ROW_BYTES);
        for part in &self.parts {
            let (part_first, part_end) = (part.first_row as usize, (part.first_row + part.rows) as usize);
            let (from, to) = (first.max(part_first), (first + rows.n).min(part_end));
            if from < to {
                let data = &rows.bytes[(from - first) * row_bytes..(to - first) * row_bytes];
                write(gpu, &part.words, ((from - part_first) * padded) as u64, data, row_bytes, padded)?;
            }
        }
        Ok(())
    }
}

/// Rows from one expert's matrix of `shape` to the next.
pub(super) fn expert_rows(shape: &WeightShape) -> usize {
    match *shape {
        WeightShape::W4 { n, .. } => n.next_multiple_of(w4::TILE_N),
        WeightShape::Dense { n, .. } => n,
        WeightShape::Vector { len } => len,
    }
}

/// Whether the zero point of a group is one of the codes.
fn is_code(params: u32) -> bool {
    let zero = half::f16::from_bits((params >> 16) as u16).to_f32();
    (0.0..=15.0).contains(&zero) && zero.fract() == 0.0
}

fn dimension(value: usize) -> Result<u32> {
    u32::try_from(value)
        .map_err(|_| Error::new(ErrorKind::Unsupported, format!("dimension {value} does not fit 32 bits")))
}

/// Rows of the parts, each at most what one binding and one buffer can hold.
fn split(gpu: &Gpu, name: &str, n: usize, row_bytes: usize) -> Result<Vec<Range<usize>>> {
    let limit = gpu.limits.max_storage_buffer_binding_size.min(gpu.limits.max_buffer_size);
    // Kernels index a part with 32 bits of words, and buffers are rounded up to 16 bytes.
    let limit = usize::try_from(limit).unwrap_or(usize::MAX).min(1 << 33) / 16 * 16;
    let rows = limit / row_bytes.max(1);
    if rows == 0 {
        let message = format!("a row of {row_bytes} bytes exceeds the {limit} bytes that a kernel can see at once");
        return Err(Error::new(ErrorKind::Unsupported, message).in_tensor(name));
    }
    // Equal parts, so that no dispatch is left with a handful of rows.
    let count = n.div_ceil(rows).max(1);
    let each = n.div_ceil(count).max(1);
    Ok((0..n).step_by(each).map(|start| start..(start + each).min(n)).collect())
}

fn weight_buffer(gpu: &Gpu, name: &str, bytes: usize) -> Result<wgpu::Buffer> {
    gpu.buffer(name, bytes as u64, BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC)
        .map_err(|e| e.in_tensor(name))
}

/// Writes rows of `row_bytes` each at multiples of `padded` bytes from byte `offset` on, a bounded slice at a time.
pub(super) fn write(
    gpu: &Gpu,
    buffer: &wgpu::Buffer,
    offset: u64,
    data: &[u8],
    row_bytes: usize,
    padded: usize,
) -> Result<()> {
    if row_bytes == padded {
        return gpu.write(buffer, offset, data);
    }
    let mut scratch = Vec::new();
    let mut at = offset;
    let rows = (SLICE / padded).max(1);
    for block in data.chunks(rows * row_bytes) {
        scratch.clear();
        for row in block.chunks(row_bytes) {
            let end = scratch.len() + padded;
            scratch.extend_from_slice(row);
            scratch.resize(end, 0);
        }
        gpu.write(buffer, at, &scratch)?;
        at += scratch.len() as u64;
    }
    Ok(())
}
