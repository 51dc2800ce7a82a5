//! Weights on the device: packed matrices in tiles, dense rows padded to what the kernels load at once, both split into
//! parts that one binding can hold.

use std::ops::Range;

use awqua_shaders::{FLAG_BF16, FLAG_OFFSET_IS_BIAS, FLAG_ROUND_PRODUCTS, FLAG_SUMS, FLAG_WIDE, Packed, w4};
use wgpu::BufferUsages;

use super::device::{Gpu, SLICE};
use super::loader::Loader;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{
    BlockMatrix, DenseMatrix, DenseType, GgmlType, Levels, LevelsForm, Offset, PackedMatrix, W4Matrix, Weight,
    WeightShape,
};

/// A kernel loads four words of a dense row at once; rows are padded with zeros to multiples of this many bytes.
const ROW_BYTES: usize = 16;

/// A weight the way kernels read it.
pub(super) enum GpuWeight {
    W4(GpuW4),
    Packed(GpuPacked),
    Dense(GpuDense),
    Vector {
        len: u32,
        buffer: wgpu::Buffer,
    },
    Order {
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

/// A packed matrix in the layout of [`Packed`], other than the 4-bit one.
pub(super) struct GpuPacked {
    pub(super) packed: Packed,
    pub(super) n: u32,
    pub(super) k: u32,
    pub(super) row_words: u32,
    pub(super) group_size: u32,
    pub(super) groups: u32,
    /// What its numbers are, as flags of the kernels.
    pub(super) flags: u32,
    /// Whether half precision holds its weights.
    pub(super) is_half: bool,
    pub(super) parts: Vec<PackedPart>,
}

/// Rows `first_row..first_row + rows` of a packed matrix.
pub(super) struct PackedPart {
    pub(super) first_row: u32,
    pub(super) rows: u32,
    pub(super) codes: wgpu::Buffer,
    /// The table of a codebook, then the numbers of the rows.
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
    if let Some(layout) = PackedLayout::of(shape) {
        let (codes, numbers) = (layout.packed.code_words(layout.n, layout.k), layout.number_words(layout.n));
        return size(codes.saturating_mul(4)).saturating_add(size(numbers.saturating_mul(4)));
    }
    match *shape {
        WeightShape::W4 { n, k, group_size, .. } => {
            let shape = w4::Shape { n, k, group_size };
            size(shape.words(n).saturating_mul(4)).saturating_add(size(shape.params(n).saturating_mul(4)))
        }
        WeightShape::Dense { n, k, dtype } => {
            size(n.saturating_mul((k.saturating_mul(dtype.size())).next_multiple_of(ROW_BYTES)))
        }
        WeightShape::Packed { .. } | WeightShape::Blocks { .. } => 0,
        WeightShape::Vector { len } | WeightShape::Order { len } => size(len.saturating_mul(4)),
    }
}

/// How a packed matrix or one of blocks lies on the device.
struct PackedLayout {
    packed: Packed,
    n: usize,
    k: usize,
    group_size: usize,
    /// Words in front of the numbers.
    table: usize,
    /// Words of the numbers of a row.
    row_numbers: usize,
    flags: u32,
    is_half: bool,
}

impl PackedLayout {
    /// `None` for forms that lie otherwise, and for widths without a kernel.
    fn of(shape: &WeightShape) -> Option<Self> {
        let flag = |condition: bool, flag: u32| if condition { flag } else { 0 };
        let affine = |offset: Offset, rounding: DenseType| {
            let bf16 = rounding == DenseType::BF16;
            flag(offset.is_bias(), FLAG_OFFSET_IS_BIAS)
                | flag(bf16, FLAG_BF16)
                | flag(bf16 && offset.rounds_products(), FLAG_ROUND_PRODUCTS)
        };
        match *shape {
            // Sums of codes can not be rounded as these weights are, and that would be seen in logits.
            WeightShape::W4 { n, k, group_size, offset: offset @ Offset::RoundedBiasBf16 } => {
                let flags = affine(offset, DenseType::BF16);
                let row_numbers = k / group_size;
                Some(Self { packed: Packed::Affine4, n, k, group_size, table: 0, row_numbers, flags, is_half: true })
            }
            WeightShape::Packed { n, k, bits, group_size, levels, rounding } => {
                let groups = k.div_ceil(group_size);
                let (packed, table, row_numbers, flags) = match levels {
                    LevelsForm::Affine(offset) => (Packed::affine(bits)?, 0, groups, affine(offset, rounding)),
                    LevelsForm::AffineWide(offset) => {
                        (Packed::affine(bits)?, 0, 2 * groups, affine(offset, rounding) | FLAG_WIDE)
                    }
                    LevelsForm::Codebook => {
                        (Packed::Codebook, 16, groups, flag(rounding == DenseType::BF16, FLAG_BF16))
                    }
                };
                let is_half = rounding == DenseType::F16 || matches!(levels, LevelsForm::Affine(_));
                Some(Self { packed, n, k, group_size, table, row_numbers, flags, is_half })
            }
            WeightShape::Blocks { n, k, ggml_type } => {
                let packed = match ggml_type {
                    GgmlType::Q4K => Packed::Q4K,
                    GgmlType::Q5K => Packed::Q5K,
                    GgmlType::Q6K => Packed::Q6K,
                    _ => return None,
                };
                // Subnormal weights of half precision lose bits that hardly count.
                Some(Self { packed, n, k, group_size: k, table: 0, row_numbers: 0, flags: 0, is_half: true })
            }
            _ => None,
        }
    }

    /// Words of the numbers of `rows` rows, the table included; something to bind where there are none.
    fn number_words(&self, rows: usize) -> usize {
        (self.table + rows * self.row_numbers).max(4)
    }
}

impl GpuWeight {
    /// Makes the buffers for a weight of `shape`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`], [`ErrorKind::Unsupported`] for shapes beyond 32 bits, or a device error.
    pub(super) fn reserve(gpu: &Gpu, name: &str, shape: &WeightShape) -> Result<Self> {
        if let Some(layout) = PackedLayout::of(shape) {
            return GpuPacked::reserve(gpu, name, &layout).map(Self::Packed);
        }
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
                    flags: if offset.is_bias() { FLAG_OFFSET_IS_BIAS | FLAG_SUMS } else { 0 },
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
            WeightShape::Packed { .. } | WeightShape::Blocks { .. } => {
                let message = format!("no kernel for {shape:?}");
                Err(Error::new(ErrorKind::Unsupported, message).in_tensor(name))
            }
            WeightShape::Vector { len } => {
                Ok(Self::Vector { len: dimension(len)?, buffer: weight_buffer(gpu, name, 4 * len)? })
            }
            WeightShape::Order { len } => {
                Ok(Self::Order { len: dimension(len)?, buffer: weight_buffer(gpu, name, 4 * len)? })
            }
        }
    }

    /// Rows of the whole weight.
    pub(super) fn rows(&self) -> usize {
        match self {
            Self::W4(m) => m.n as usize,
            Self::Packed(m) => m.n as usize,
            Self::Dense(m) => m.n as usize,
            Self::Vector { len, .. } | Self::Order { len, .. } => *len as usize,
            Self::Expert { n, .. } => *n as usize,
        }
    }

    /// Outputs and inputs, `None` for what is no matrix.
    pub(super) fn dims(&self) -> Option<(u32, u32)> {
        match self {
            Self::W4(m) => Some((m.n, m.k)),
            Self::Packed(m) => Some((m.n, m.k)),
            Self::Dense(m) => Some((m.n, m.k)),
            Self::Vector { .. } | Self::Order { .. } | Self::Expert { .. } => None,
        }
    }

    /// Hands `rows`, which begin at row `first`, to the driver. Does not wait for the device.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if they are of another form, or a device error.
    pub(super) fn fill(&mut self, gpu: &Gpu, loader: &mut Loader, first: usize, rows: &Weight) -> Result<()> {
        let other = || Error::new(ErrorKind::InvalidInput, format!("{:?} are rows of another weight", rows.shape()));
        match (self, rows) {
            (Self::W4(to), Weight::W4(rows)) if rows.k == to.k as usize && first.is_multiple_of(w4::TILE_N) => {
                to.fill(gpu, first, rows)
            }
            (Self::Dense(to), Weight::Dense(rows)) if rows.k == to.k as usize && rows.dtype == to.dtype => {
                to.fill(gpu, loader, first, rows)
            }
            (Self::Packed(to), rows) if to.takes(&rows.shape()) => match rows {
                Weight::Packed(rows) => to.fill(gpu, first, rows),
                Weight::W4(rows) => to.fill_words(gpu, first, rows.n, &rows.qweight, &[], &rows.group_params),
                Weight::Blocks(rows) => to.fill_blocks(gpu, first, rows),
                _ => Err(other()),
            },
            (Self::Vector { buffer, .. }, Weight::Vector(values)) => {
                gpu.write(buffer, first as u64 * 4, bytemuck::cast_slice(values))
            }
            (Self::Order { buffer, .. }, Weight::Order(values)) => {
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
            Self::Packed(m) => m.parts.iter().for_each(|part| {
                part.codes.destroy();
                part.group_params.destroy();
            }),
            Self::Dense(m) => m.parts.iter().for_each(|part| part.words.destroy()),
            Self::Vector { buffer, .. } | Self::Order { buffer, .. } => buffer.destroy(),
            Self::Expert { .. } => {}
        }
    }
}

impl GpuW4 {
    /// Whether offsets are zero points.
    pub(super) fn takes_zeros(&self) -> bool {
        self.flags & FLAG_OFFSET_IS_BIAS == 0
    }

    fn fill(&mut self, gpu: &Gpu, first: usize, rows: &W4Matrix) -> Result<()> {
        let shape = w4::Shape { n: rows.n, k: rows.k, group_size: rows.group_size };
        let (columns, groups) = (rows.k / 8, rows.groups());
        if !rows.offset.is_bias() && !rows.group_params.iter().all(|params| is_code(*params)) {
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

impl GpuPacked {
    fn reserve(gpu: &Gpu, name: &str, layout: &PackedLayout) -> Result<Self> {
        let PackedLayout { packed, n, k, .. } = *layout;
        let row_words = packed.row_words(k);
        // A word behind the last row, a table in front of the numbers.
        let row_bytes = 4 * (row_words + 1).max(layout.row_numbers + layout.table);
        let parts = split(gpu, name, n, row_bytes)?
            .into_iter()
            .map(|rows| {
                Ok(PackedPart {
                    first_row: dimension(rows.start)?,
                    rows: dimension(rows.len())?,
                    codes: weight_buffer(gpu, name, 4 * packed.code_words(rows.len(), k))?,
                    group_params: weight_buffer(gpu, name, 4 * layout.number_words(rows.len()))?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            packed,
            n: dimension(n)?,
            k: dimension(k)?,
            row_words: dimension(row_words)?,
            group_size: dimension(layout.group_size)?,
            groups: dimension(k.div_ceil(layout.group_size))?,
            flags: layout.flags,
            is_half: layout.is_half,
            parts,
        })
    }

    /// Whether rows of this form lie as those of the matrix.
    fn takes(&self, shape: &WeightShape) -> bool {
        PackedLayout::of(shape).is_some_and(|layout| {
            (layout.packed, layout.k, layout.group_size, layout.flags)
                == (self.packed, self.k as usize, self.group_size as usize, self.flags)
        })
    }

    fn fill(&self, gpu: &Gpu, first: usize, rows: &PackedMatrix) -> Result<()> {
        let (table, numbers): (&[u32], &[u32]) = match &rows.levels {
            Levels::Affine(_, params) => (&[], params),
            Levels::AffineWide(_, params) => (&[], bytemuck::cast_slice(params)),
            Levels::Codebook(table, absmax) => (bytemuck::cast_slice(table.as_slice()), bytemuck::cast_slice(absmax)),
        };
        self.fill_words(gpu, first, rows.n, &rows.codes, table, numbers)
    }

    /// Writes `n` rows of codes and numbers, and the table in front of the numbers of their parts.
    fn fill_words(
        &self,
        gpu: &Gpu,
        first: usize,
        n: usize,
        codes: &[u32],
        table: &[u32],
        numbers: &[u32],
    ) -> Result<()> {
        let (row_words, row_numbers) = (codes.len() / n, numbers.len() / n);
        for (part, range, before) in self.pieces(first, n) {
            let codes = &codes[range.start * row_words..range.end * row_words];
            gpu.write(&part.codes, (4 * before * row_words) as u64, bytemuck::cast_slice(codes))?;
            if !table.is_empty() {
                gpu.write(&part.group_params, 0, bytemuck::cast_slice(table))?;
            }
            let numbers = &numbers[range.start * row_numbers..range.end * row_numbers];
            let at = 4 * (table.len() + before * row_numbers) as u64;
            gpu.write(&part.group_params, at, bytemuck::cast_slice(numbers))?;
        }
        Ok(())
    }

    fn fill_blocks(&self, gpu: &Gpu, first: usize, rows: &BlockMatrix) -> Result<()> {
        let (row_bytes, row_words) = (rows.row_bytes(), self.packed.row_words(rows.k));
        for (part, range, before) in self.pieces(first, rows.n) {
            let mut at = 4 * (before * row_words) as u64;
            let bytes = &rows.bytes[range.start * row_bytes..range.end * row_bytes];
            // A bounded number of rows at a time.
            for rows in bytes.chunks((SLICE / row_bytes).max(1) * row_bytes) {
                let words = self.packed.block_words(rows);
                gpu.write(&part.codes, at, bytemuck::cast_slice(&words))?;
                at += 4 * words.len() as u64;
            }
        }
        // The blocks are on the device now.
        rows.bytes.release();
        Ok(())
    }

    /// The parts that `n` rows from row `first` on belong to: the range of these rows, and how many rows of the part come
    /// before.
    fn pieces(&self, first: usize, n: usize) -> impl Iterator<Item = (&PackedPart, Range<usize>, usize)> {
        self.parts.iter().filter_map(move |part| {
            let (part_first, part_end) = (part.first_row as usize, (part.first_row + part.rows) as usize);
            let (from, to) = (first.max(part_first), (first + n).min(part_end));
            (from < to).then(|| (part, from - first..to - first, from - part_first))
        })
    }
}

impl GpuDense {
    fn fill(&self, gpu: &Gpu, loader: &mut Loader, first: usize, rows: &DenseMatrix) -> Result<()> {
        let row_bytes = rows.row_bytes();
        let padded = row_bytes.next_multiple_of(ROW_BYTES);
        for part in &self.parts {
            let (part_first, part_end) = (part.first_row as usize, (part.first_row + part.rows) as usize);
            let (from, to) = (first.max(part_first), (first + rows.n).min(part_end));
            if from < to {
                let data = &rows.bytes[(from - first) * row_bytes..(to - first) * row_bytes];
                let offset = ((from - part_first) * padded) as u64;
                match row_bytes == padded {
                    true => loader.write(gpu, &part.words, offset, data)?,
                    false => write(gpu, &part.words, offset, data, row_bytes, padded)?,
                }
            }
        }
        Ok(())
    }
}

/// Rows from one expert's matrix of `shape` to the next.
pub(super) fn expert_rows(shape: &WeightShape) -> usize {
    match *shape {
        WeightShape::W4 { n, .. } => n.next_multiple_of(w4::TILE_N),
        _ => shape.rows(),
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
