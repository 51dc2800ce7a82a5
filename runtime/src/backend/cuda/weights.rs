//! Weights on the device: packed matrices in the tiles of the kernels, made there from rows as they arrive; dense
//! matrices in half precision rows; vectors.

use std::ops::Range;
use std::sync::Arc;

use awqua_shaders::cuda::{self, CHUNK, RowsArgs, STAGE, TILE, W4Args};

use super::driver::{Buffer, Gpu, Launch, Stream};
use super::loader::Loader;
use crate::checkpoint::Piece;
use crate::error::{Error, ErrorKind, Result};
use crate::quant::awq::StoredGemm;
use crate::tensor::{DenseMatrix, DenseType, Offset, W4Matrix, Weight, WeightShape};

/// Rows of a dense matrix that one kernel call lays out.
const MOST_ROWS: usize = 32768;

/// A weight the way kernels read it.
pub(super) enum CudaWeight {
    W4(CudaW4),
    Dense(CudaDense),
    Vector {
        len: u32,
        buffer: Buffer,
    },
    /// One of the matrices behind the first one of a stack, which holds them all.
    Expert {
        first: u32,
    },
}

/// A packed matrix in the tiles of `prelude/w4.cuh`, or as many as there are experts, one behind the other.
pub(super) struct CudaW4 {
    pub(super) experts: u32,
    /// Rows and inputs of one.
    pub(super) n: u32,
    pub(super) k: u32,
    pub(super) groups: u32,
    /// A group is 32 << `group_shift` inputs; 31 where a row is one.
    pub(super) group_shift: u32,
    /// [`cuda::OFFSET_IS_BIAS`], [`cuda::FRACTIONS`].
    pub(super) flags: u32,
    pub(super) codes: Buffer,
    pub(super) params: Buffer,
}

impl CudaW4 {
    /// Stages of a row.
    pub(super) fn stages(&self) -> u32 {
        self.k.div_ceil(STAGE)
    }

    /// Pairs of row tiles of one matrix.
    pub(super) fn pairs(&self) -> u32 {
        self.n.div_ceil(2 * TILE)
    }

    /// Bytes of one matrix.
    pub(super) fn expert_bytes(&self) -> u64 {
        (self.codes.bytes() + self.params.bytes()) / u64::from(self.experts)
    }
}

/// A dense matrix: half precision rows of `stride` elements, padded with zeros to pairs of row tiles; or as many as there
/// are experts, one behind the other.
pub(super) struct CudaDense {
    pub(super) experts: u32,
    /// Rows and inputs of one.
    pub(super) n: u32,
    pub(super) k: u32,
    pub(super) stride: u32,
    pub(super) rows: Buffer,
    /// Element type on the way in; `None` where packed rows are dequantised for it.
    from: Option<DenseType>,
}

impl CudaDense {
    /// Row tiles of one matrix, padding included.
    pub(super) fn row_tiles(&self) -> u32 {
        self.n.div_ceil(2 * TILE) * 2
    }

    /// Bytes of one matrix.
    pub(super) fn expert_bytes(&self) -> u64 {
        self.rows.bytes() / u64::from(self.experts)
    }
}

/// How packed groups have to lie for the packed kernels: 32, 64, 128, ... inputs, or one a row. Others are dequantised.
fn group_shift(group_size: usize, k: usize) -> Option<u32> {
    match group_size {
        _ if group_size == k => Some(31),
        32.. if group_size.is_power_of_two() => Some(group_size.ilog2() - 5),
        _ => None,
    }
}

fn padded(n: usize, to: u32) -> u64 {
    (n as u64).next_multiple_of(u64::from(to))
}

/// Bytes of codes and parameters of a packed matrix.
fn w4_bytes(n: usize, k: usize, groups: usize) -> (u64, u64) {
    let rows = padded(n, 2 * TILE);
    (rows * padded(k, STAGE) / 2, rows * groups as u64 * 4)
}

fn dense_bytes(n: usize, k: usize) -> u64 {
    padded(n, 2 * TILE) * padded(k, STAGE) * 2
}

/// Bytes that a weight takes on the device.
pub(super) fn bytes(shape: &WeightShape) -> u64 {
    match *shape {
        WeightShape::W4 { n, k, group_size, .. } if group_shift(group_size, k).is_some() => {
            let (codes, params) = w4_bytes(n, k, k / group_size);
            codes + params
        }
        WeightShape::W4 { n, k, .. } | WeightShape::Dense { n, k, .. } => dense_bytes(n, k),
        WeightShape::Vector { len } => padded(len, 2 * TILE) * 4,
        // What they would take: no kernel has them.
        WeightShape::Packed { .. } | WeightShape::Blocks { .. } | WeightShape::Order { .. } => {
            shape.bytes(shape.rows())
        }
    }
}

/// Refuses the forms that no kernel has.
///
/// # Errors
/// [`ErrorKind::Unsupported`].
pub(super) fn check(shape: &WeightShape) -> Result<()> {
    let what = match *shape {
        WeightShape::Dense { .. } | WeightShape::Vector { .. } => return Ok(()),
        WeightShape::W4 { offset: Offset::Zero | Offset::Bias, .. } => return Ok(()),
        WeightShape::W4 { .. } => "4-bit matrices whose weights are rounded to bfloat16, or twice".to_owned(),
        WeightShape::Packed { bits: 4, .. } => {
            "4-bit matrices with other scales than those of half precision".to_owned()
        }
        WeightShape::Packed { bits, .. } => format!("matrices of {bits} bits"),
        WeightShape::Blocks { ggml_type, .. } => format!("matrices in blocks of {ggml_type:?}"),
        WeightShape::Order { .. } => "matrices whose inputs are reordered".to_owned(),
    };
    let message = format!("the CUDA backend has no kernels for {what}; use wgpu or the CPU");
    Err(Error::new(ErrorKind::Unsupported, message))
}

fn dimension(value: usize) -> Result<u32> {
    u32::try_from(value)
        .map_err(|_| Error::new(ErrorKind::Unsupported, format!("dimension {value} does not fit 32 bits")))
}

impl CudaWeight {
    /// Makes room for a weight of `shape`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`], [`ErrorKind::Unsupported`] for shapes beyond 32 bits, or a device error.
    pub(super) fn reserve(gpu: &Arc<Gpu>, stream: &Stream, name: &str, shape: &WeightShape) -> Result<Self> {
        Self::reserve_stack(gpu, stream, name, shape, 1)
    }

    /// As [`Self::reserve`], for `experts` matrices of that shape.
    pub(super) fn reserve_stack(
        gpu: &Arc<Gpu>,
        stream: &Stream,
        name: &str,
        shape: &WeightShape,
        experts: u32,
    ) -> Result<Self> {
        check(shape)?;
        let zeros = |bytes: u64| {
            let all = bytes.checked_mul(u64::from(experts));
            let all =
                all.ok_or_else(|| Error::new(ErrorKind::OutOfMemory, format!("{experts} times {bytes} bytes")))?;
            let buffer = gpu.buffer(name, all)?;
            stream.clear(&buffer)?;
            Ok::<_, Error>(buffer)
        };
        let dense = |n: usize, k: usize, from| {
            let stride = dimension(k.next_multiple_of(STAGE as usize))?;
            let rows = zeros(dense_bytes(n, k))?;
            Ok::<_, Error>(Self::Dense(CudaDense { experts, n: dimension(n)?, k: dimension(k)?, stride, rows, from }))
        };
        match *shape {
            WeightShape::W4 { n, k, group_size, offset } => match group_shift(group_size, k) {
                Some(group_shift) => {
                    let (codes, params) = w4_bytes(n, k, k / group_size);
                    Ok(Self::W4(CudaW4 {
                        experts,
                        n: dimension(n)?,
                        k: dimension(k)?,
                        groups: dimension(k / group_size)?,
                        group_shift,
                        flags: if offset == Offset::Bias { cuda::OFFSET_IS_BIAS } else { 0 },
                        codes: zeros(codes)?,
                        params: zeros(params)?,
                    }))
                }
                None => dense(n, k, None),
            },
            WeightShape::Dense { n, k, dtype } => dense(n, k, Some(dtype)),
            WeightShape::Vector { len } => {
                Ok(Self::Vector { len: dimension(len)?, buffer: zeros(padded(len, 2 * TILE) * 4)? })
            }
            WeightShape::Packed { .. } | WeightShape::Blocks { .. } | WeightShape::Order { .. } => {
                Err(Error::new(ErrorKind::Unsupported, "no kernel has this form"))
            }
        }
    }

    /// Rows from the first one of a matrix of a stack to the first one of the next.
    pub(super) fn stack_rows(&self) -> usize {
        let n = match self {
            Self::W4(m) => m.n,
            Self::Dense(m) => m.n,
            Self::Vector { .. } | Self::Expert { .. } => 0,
        };
        n.next_multiple_of(2 * TILE) as usize
    }

    /// Bytes on the device.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::W4(m) => m.codes.bytes() + m.params.bytes(),
            Self::Dense(m) => m.rows.bytes(),
            Self::Vector { buffer, .. } => buffer.bytes(),
            Self::Expert { .. } => 0,
        }
    }

    /// Queues the upload of the next rows.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if they are of another form, or a device error.
    pub(super) fn fill(&mut self, loader: &mut Loader, rows: &Weight) -> Result<()> {
        let other = || Error::new(ErrorKind::InvalidInput, format!("{:?} are rows of another weight", rows.shape()));
        let first = loader.filled;
        match (&mut *self, rows) {
            (Self::W4(to), Weight::W4(rows))
                if rows.k == to.k as usize
                    && rows.groups() == to.groups as usize
                    && first.is_multiple_of(2 * TILE as usize) =>
            {
                to.fill(loader, rows)?;
            }
            (Self::Dense(to), Weight::Dense(rows)) if rows.k == to.k as usize && Some(rows.dtype) == to.from => {
                to.fill(loader, rows)?;
            }
            (Self::Dense(to), Weight::W4(rows)) if rows.k == to.k as usize && to.from.is_none() => {
                to.fill_dequantised(loader, rows)?;
            }
            (Self::Vector { buffer, .. }, Weight::Vector(values)) => {
                loader.stream.upload(buffer, first as u64 * 4, bytemuck::cast_slice(values))?;
            }
            _ => return Err(other()),
        }
        loader.filled = first + rows.shape().rows();
        Ok(())
    }

    /// Whether [`Self::fill_stored`] takes `stored` as the next rows.
    pub(super) fn takes_stored(&self, loader: &Loader, stored: &StoredGemm) -> bool {
        matches!(self, Self::W4(to) if to.takes(loader, stored))
    }

    /// Queues the upload of some inputs of the next rows.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if they are of another form, those of reading, or a device error.
    pub(super) fn fill_stored(&mut self, loader: &mut Loader, stored: &StoredGemm, inputs: Range<usize>) -> Result<()> {
        let last = inputs.end == stored.k;
        match self {
            Self::W4(to) if to.takes(loader, stored) => to.fill_stored(loader, stored, inputs)?,
            _ => return Err(Error::new(ErrorKind::InvalidInput, "this weight does not take rows as they are stored")),
        }
        if last {
            loader.filled += stored.n;
        }
        Ok(())
    }
}

impl CudaW4 {
    fn fill(&mut self, loader: &mut Loader, rows: &W4Matrix) -> Result<()> {
        if rows.offset == Offset::Zero && !rows.group_params.iter().all(|params| is_code(*params)) {
            self.flags |= cuda::FRACTIONS;
        }
        let (codes, params) = (loader.gpu().function("w4_rows")?, loader.gpu().function("w4_rows_params")?);
        let (columns, groups) = (rows.k / 8, rows.groups());
        let pair = 2 * TILE as usize;
        let pair_bytes = pair * (columns + groups) * 4;
        let at_once = ((loader.room - 64) / pair_bytes).max(1) * pair;
        for first in (0..rows.n).step_by(at_once) {
            let last = rows.n.min(first + at_once);
            let words: &[u8] = bytemuck::cast_slice(&rows.qweight[first * columns..last * columns]);
            let numbers: &[u8] = bytemuck::cast_slice(&rows.group_params[first * groups..last * groups]);
            let tiles = (last - first).div_ceil(TILE as usize) as u32;
            let arguments = W4Args {
                out: self.codes.address(),
                out_params: self.params.address(),
                n: (last - first) as u32,
                k: self.k,
                groups: self.groups,
                stages: self.stages(),
                first_tile: ((loader.filled + first) / TILE as usize) as u32,
                tiles,
                ..Default::default()
            };
            let grids = ([2 * self.stages(), tiles.div_ceil(8), 1], [self.groups, tiles.div_ceil(32), 1]);
            if words.len() + numbers.len() + 16 > loader.room {
                return Err(Error::new(ErrorKind::Unsupported, format!("rows of {} bytes", pair_bytes / pair)));
            }
            loader.pass(&[Piece::Bytes(words), Piece::Bytes(numbers)], |at| {
                let arguments = W4Args { codes: at[0], params: at[1], ..arguments };
                Ok(vec![
                    Launch::new(codes, grids.0, 256, 0, &arguments),
                    Launch::new(params, grids.1, 256, 0, &arguments),
                ])
            })?;
        }
        Ok(())
    }

    /// Whether the kernels undo this layout, and a few of its inputs fit on the way.
    fn takes(&self, loader: &Loader, stored: &StoredGemm) -> bool {
        let alike = stored.k == self.k as usize && stored.k / stored.group_size == self.groups as usize;
        alike
            && stored.fits(loader.room)
            && self.flags & cuda::OFFSET_IS_BIAS == 0
            && (loader.filled | stored.n).is_multiple_of(2 * TILE as usize)
    }

    /// Queues inputs `inputs`, from a multiple of [`crate::backend::INPUT_STEP`] on, of the next rows.
    fn fill_stored(&self, loader: &mut Loader, stored: &StoredGemm, inputs: Range<usize>) -> Result<()> {
        let (codes, params) = (loader.gpu().function("w4_awq")?, loader.gpu().function("w4_awq_params")?);
        for inputs in stored.cuts(inputs, loader.room) {
            let groups = stored.groups_from(&inputs);
            let tiles = (stored.n / TILE as usize) as u32;
            let arguments = W4Args {
                out: self.codes.address(),
                out_params: self.params.address(),
                n: dimension(stored.n)?,
                k: self.k,
                groups: self.groups,
                stages: self.stages(),
                first_tile: (loader.filled / TILE as usize) as u32,
                tiles,
                first_chunk: (inputs.start / CHUNK as usize) as u32,
                first_group: groups.start as u32,
                ..Default::default()
            };
            let chunks = inputs.len().div_ceil(CHUNK as usize) as u32;
            loader.pass(&stored.pieces(&inputs), |at| {
                let arguments = W4Args { codes: at[0], scales: at[1], zeros: at[2], ..arguments };
                let mut launches = vec![Launch::new(codes, [chunks, tiles.div_ceil(8), 1], 256, 0, &arguments)];
                if !groups.is_empty() {
                    let grid = [groups.len() as u32, tiles.div_ceil(32), 1];
                    launches.push(Launch::new(params, grid, 256, 0, &arguments));
                }
                Ok(launches)
            })?;
        }
        Ok(())
    }
}

impl CudaDense {
    fn fill(&mut self, loader: &mut Loader, rows: &DenseMatrix) -> Result<()> {
        let kind = match rows.dtype {
            DenseType::F16 => cuda::FROM_F16,
            DenseType::BF16 => cuda::FROM_BF16,
            DenseType::F32 => cuda::FROM_F32,
        };
        let row_bytes = rows.row_bytes();
        let at_once = (loader.room / row_bytes.max(1)).clamp(1, MOST_ROWS);
        for first in (0..rows.n).step_by(at_once) {
            let count = at_once.min(rows.n - first);
            let data = &rows.bytes[first * row_bytes..(first + count) * row_bytes];
            self.pass(loader, loader.filled + first, count, data, kind)?;
        }
        Ok(())
    }

    fn fill_dequantised(&mut self, loader: &mut Loader, rows: &W4Matrix) -> Result<()> {
        let at_once = (loader.room / (rows.k * 4)).clamp(1, MOST_ROWS);
        let mut values = Vec::new();
        for first in (0..rows.n).step_by(at_once) {
            let count = at_once.min(rows.n - first);
            values.resize(count * rows.k, 0.0);
            for (i, row) in values.chunks_exact_mut(rows.k).enumerate() {
                rows.dequantize_row(first + i, row);
            }
            self.pass(loader, loader.filled + first, count, bytemuck::cast_slice(&values), cuda::FROM_F32)?;
        }
        Ok(())
    }

    /// Brings `count` rows to row `first`.
    fn pass(&self, loader: &mut Loader, first: usize, count: usize, data: &[u8], kind: u32) -> Result<()> {
        if data.len() > loader.room {
            return Err(Error::new(ErrorKind::Unsupported, format!("rows of {} bytes", data.len() / count.max(1))));
        }
        let function = loader.gpu().function("dense_rows")?;
        let to = self.rows.address() + first as u64 * u64::from(self.stride) * 2;
        let (k, stride) = (self.k, self.stride);
        let grid = [stride.div_ceil(256), count as u32, 1];
        loader.pass(&[Piece::Bytes(data)], |at| {
            let arguments = RowsArgs { from: at[0], to, k, stride, r#type: kind, pad: 0 };
            Ok(vec![Launch::new(function, grid, 256, 0, &arguments)])
        })
    }
}

/// Whether the zero point of a group is one of the codes.
fn is_code(params: u32) -> bool {
    let zero = half::f16::from_bits((params >> 16) as u16).to_f32();
    (0.0..=15.0).contains(&zero) && zero.fract() == 0.0
}
