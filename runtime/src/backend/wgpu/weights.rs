//! Weights on the device: packed matrices in tiles, dense rows padded to what the kernels load at once, both split into
//! parts that one binding can hold.

use std::ops::Range;

use awqua_shaders::{FLAG_OFFSET_IS_BIAS, FLAG_SUMS, FLAG_WIDE, Packed, w4};
use wgpu::BufferUsages;

use super::device::{Gpu, SLICE};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{BlockMatrix, DenseMatrix, DenseType, GgmlType, Levels, Offset, PackedMatrix, W4Matrix, Weight};

/// A kernel loads four words of a dense row at once; rows are padded with zeros to multiples of this many bytes.
const ROW_BYTES: usize = 16;

/// A weight the way kernels read it.
pub(super) enum GpuWeight {
    W4(GpuW4),
    Packed(GpuPacked),
    Dense(GpuDense),
    Vector { len: u32, buffer: wgpu::Buffer },
    Order { len: u32, buffer: wgpu::Buffer },
}

impl GpuWeight {
    /// Outputs and inputs, `None` for what is no matrix.
    pub(super) fn shape(&self) -> Option<(u32, u32)> {
        match self {
            Self::W4(m) => Some((m.n, m.k)),
            Self::Packed(m) => Some((m.n, m.k)),
            Self::Dense(m) => Some((m.n, m.k)),
            Self::Vector { .. } | Self::Order { .. } => None,
        }
    }
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

/// Copies `weight` to the device; also returns the bytes it takes there.
///
/// # Errors
/// [`ErrorKind::OutOfMemory`], [`ErrorKind::Unsupported`] for shapes beyond 32 bits, or a device error.
pub(super) fn upload(gpu: &Gpu, name: &str, weight: &Weight) -> Result<(GpuWeight, u64)> {
    match weight {
        Weight::W4(matrix) => upload_w4(gpu, name, matrix),
        Weight::Packed(matrix) => upload_packed(gpu, name, matrix),
        Weight::Blocks(matrix) => upload_blocks(gpu, name, matrix),
        Weight::Dense(matrix) => upload_dense(gpu, name, matrix),
        Weight::Vector(values) => {
            let (len, buffer) = upload_words(gpu, name, bytemuck::cast_slice(values))?;
            Ok((GpuWeight::Vector { len, buffer }, 4 * values.len() as u64))
        }
        Weight::Order(values) => {
            let (len, buffer) = upload_words(gpu, name, values)?;
            Ok((GpuWeight::Order { len, buffer }, 4 * values.len() as u64))
        }
    }
}

fn upload_words(gpu: &Gpu, name: &str, words: &[u32]) -> Result<(u32, wgpu::Buffer)> {
    let bytes: &[u8] = bytemuck::cast_slice(words);
    let buffer = weight_buffer(gpu, name, bytes.len())?;
    gpu.write(&buffer, 0, bytes)?;
    Ok((dimension(words.len())?, buffer))
}

fn upload_packed(gpu: &Gpu, name: &str, matrix: &PackedMatrix) -> Result<(GpuWeight, u64)> {
    let packed = match &matrix.levels {
        Levels::Codebook(..) => Packed::Codebook,
        _ => Packed::affine(matrix.bits).ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, format!("codes of {} bits", matrix.bits)).in_tensor(name)
        })?,
    };
    let (flags, table, numbers): (u32, &[u32], &[u32]) = match &matrix.levels {
        Levels::Affine(_, params) => (0, &[], params),
        Levels::AffineWide(_, params) => (FLAG_WIDE, &[], bytemuck::cast_slice(params)),
        Levels::Codebook(table, absmax) => (0, bytemuck::cast_slice(table.as_slice()), bytemuck::cast_slice(absmax)),
    };
    let flags = match &matrix.levels {
        Levels::Affine(Offset::Bias, _) | Levels::AffineWide(Offset::Bias, _) => flags | FLAG_OFFSET_IS_BIAS,
        _ => flags,
    };
    let (row_words, row_numbers) = (matrix.row_words(), numbers.len() / matrix.n);
    let mut parts = Vec::new();
    let mut total = 0;
    // A word behind the last row, a table in front of the numbers.
    for rows in split(gpu, name, matrix.n, 4 * (row_words + 1).max(row_numbers + table.len()))? {
        let codes = weight_buffer(gpu, name, 4 * packed.code_words(rows.len(), matrix.k))?;
        gpu.write(&codes, 0, bytemuck::cast_slice(&matrix.codes[rows.start * row_words..rows.end * row_words]))?;
        let group_params = weight_buffer(gpu, name, 4 * (table.len() + rows.len() * row_numbers))?;
        let numbers = &numbers[rows.start * row_numbers..rows.end * row_numbers];
        if !table.is_empty() {
            gpu.write(&group_params, 0, bytemuck::cast_slice(table))?;
        }
        gpu.write(&group_params, 4 * table.len() as u64, bytemuck::cast_slice(numbers))?;
        total += codes.size() + group_params.size();
        parts.push(PackedPart {
            first_row: dimension(rows.start)?,
            rows: dimension(rows.len())?,
            codes,
            group_params,
        });
    }
    let weight = GpuPacked {
        packed,
        n: dimension(matrix.n)?,
        k: dimension(matrix.k)?,
        row_words: dimension(row_words)?,
        group_size: dimension(matrix.group_size)?,
        groups: dimension(matrix.groups())?,
        flags,
        is_half: matrix.rounding == DenseType::F16 || matches!(matrix.levels, Levels::Affine(..)),
        parts,
    };
    Ok((GpuWeight::Packed(weight), total))
}

fn upload_blocks(gpu: &Gpu, name: &str, matrix: &BlockMatrix) -> Result<(GpuWeight, u64)> {
    let packed = match matrix.ggml_type {
        GgmlType::Q4K => Packed::Q4K,
        GgmlType::Q5K => Packed::Q5K,
        GgmlType::Q6K => Packed::Q6K,
        other => {
            let message = format!("blocks of type {}", other.name());
            return Err(Error::new(ErrorKind::Unsupported, message).in_tensor(name));
        }
    };
    let (row_bytes, row_words) = (matrix.row_bytes(), packed.row_words(matrix.k));
    // What the kernels bind in place of numbers of groups.
    let group_params = weight_buffer(gpu, name, 16)?;
    let mut parts = Vec::new();
    let mut total = group_params.size();
    for rows in split(gpu, name, matrix.n, 4 * (row_words + 1))? {
        let codes = weight_buffer(gpu, name, 4 * packed.code_words(rows.len(), matrix.k))?;
        let mut at = 0;
        for block in matrix.bytes[rows.start * row_bytes..rows.end * row_bytes]
            .chunks((SLICE / row_bytes).max(1) * row_bytes)
        {
            let words = packed.block_words(block);
            gpu.write(&codes, at, bytemuck::cast_slice(&words))?;
            at += 4 * words.len() as u64;
        }
        total += codes.size();
        parts.push(PackedPart {
            first_row: dimension(rows.start)?,
            rows: dimension(rows.len())?,
            codes,
            group_params: group_params.clone(),
        });
    }
    // The mapped blocks are on the device now.
    matrix.bytes.release();
    let k = dimension(matrix.k)?;
    let weight = GpuPacked {
        packed,
        n: dimension(matrix.n)?,
        k,
        row_words: dimension(row_words)?,
        group_size: k,
        groups: 1,
        flags: 0,
        // Sub-blocks of subnormal weights lose bits that hardly count.
        is_half: true,
        parts,
    };
    Ok((GpuWeight::Packed(weight), total))
}

fn upload_w4(gpu: &Gpu, name: &str, matrix: &W4Matrix) -> Result<(GpuWeight, u64)> {
    let shape = w4::Shape { n: matrix.n, k: matrix.k, group_size: matrix.group_size };
    let (columns, groups) = (matrix.k / 8, matrix.groups());
    let tile_bytes = 4 * shape.words(1).max(shape.params(1));
    let mut parts = Vec::new();
    let mut total = 0;
    for tiles in split(gpu, name, matrix.n.div_ceil(w4::TILE_N), tile_bytes)? {
        let rows = tiles.start * w4::TILE_N..matrix.n.min(tiles.end * w4::TILE_N);
        let qweight = weight_buffer(gpu, name, shape.words(rows.len()) * 4)?;
        let group_params = weight_buffer(gpu, name, shape.params(rows.len()) * 4)?;
        // A bounded number of tiles at a time.
        let (mut codes_at, mut params_at) = (0, 0);
        for first in rows.clone().step_by((SLICE / tile_bytes).max(1) * w4::TILE_N) {
            let last = rows.end.min(first + (SLICE / tile_bytes).max(1) * w4::TILE_N);
            let codes = &matrix.qweight[first * columns..last * columns];
            let (words, params) = shape.tile(codes, &matrix.group_params[first * groups..last * groups]);
            gpu.write(&qweight, codes_at, bytemuck::cast_slice(&words))?;
            gpu.write(&group_params, params_at, bytemuck::cast_slice(&params))?;
            codes_at += words.len() as u64 * 4;
            params_at += params.len() as u64 * 4;
        }
        total += qweight.size() + group_params.size();
        parts.push(W4Part { first_row: dimension(rows.start)?, rows: dimension(rows.len())?, qweight, group_params });
    }
    let flags = match matrix.offset {
        Offset::Bias => FLAG_OFFSET_IS_BIAS | FLAG_SUMS,
        Offset::Zero if matrix.group_params.iter().all(|params| is_code(*params)) => 0,
        Offset::Zero => FLAG_SUMS,
    };
    let weight = GpuW4 {
        n: dimension(matrix.n)?,
        k: dimension(matrix.k)?,
        group_size: dimension(matrix.group_size)?,
        groups: dimension(groups)?,
        chunks: dimension(shape.chunks())?,
        flags,
        parts,
    };
    Ok((GpuWeight::W4(weight), total))
}

/// Whether the zero point of a group is one of the codes.
fn is_code(params: u32) -> bool {
    let zero = half::f16::from_bits((params >> 16) as u16).to_f32();
    (0.0..=15.0).contains(&zero) && zero.fract() == 0.0
}

fn upload_dense(gpu: &Gpu, name: &str, matrix: &DenseMatrix) -> Result<(GpuWeight, u64)> {
    let row_bytes = matrix.row_bytes();
    let padded = row_bytes.next_multiple_of(ROW_BYTES);
    let mut parts = Vec::new();
    let mut total = 0;
    for rows in split(gpu, name, matrix.n, padded)? {
        let words = weight_buffer(gpu, name, rows.len() * padded)?;
        write(gpu, &words, &matrix.bytes[rows.start * row_bytes..rows.end * row_bytes], row_bytes, padded)?;
        total += words.size();
        parts.push(DensePart { first_row: dimension(rows.start)?, rows: dimension(rows.len())?, words });
    }
    let weight = GpuDense {
        n: dimension(matrix.n)?,
        k: dimension(matrix.k)?,
        dtype: matrix.dtype,
        row_words: dimension(padded / 4)?,
        parts,
    };
    Ok((GpuWeight::Dense(weight), total))
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

/// Writes rows of `row_bytes` each at multiples of `padded` bytes, a bounded slice at a time.
fn write(gpu: &Gpu, buffer: &wgpu::Buffer, data: &[u8], row_bytes: usize, padded: usize) -> Result<()> {
    if row_bytes == padded {
        return gpu.write(buffer, 0, data);
    }
    let mut scratch = Vec::new();
    let mut at = 0;
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
