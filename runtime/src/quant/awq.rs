//! The AutoAWQ dialects: `gemm`, `gemv` and `gemv_fast`, and the writing of `gemm`.
//!
//! Layouts follow AutoAWQ's `awq/modules/linear/{gemm,gemv,gemv_fast}.py` and `awq/utils/packing_utils.py`. In the
//! shapes below N is the output and K the input features, G the groups of a row; nibble t of a word is bits 4t..4t+3.
//!
//! | version | qweight | qzeros | scales |
//! |---|---|---|---|
//! | gemm | i32 (K, N/8) | i32 (G, N/8) | f16 (G, N) |
//! | gemv | i32 (N, K/8) | i32 (N, ZW) | f16 (N, 8 ZW) |
//! | gemv_fast | i16 (N/4, K) | f16 (8 ZW, N), -(z * s) | f16 (8 ZW, N) |
//!
//! ZW is ceil(G/8) rounded up to a multiple of 1, 2 or 4 for groups of at least 128, of 64 and of 32; the padding is 0.

use std::ops::Range;

use half::f16;

use crate::checkpoint::source::Extent;
use crate::checkpoint::{Checkpoint, Dtype, Piece, TensorView};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{Bytes, Offset, W4Matrix, Weight};

use super::bits::transpose;
use super::build::{Rows, affine, numbers};
use super::canonical::{pack_params, read_f16, release};
use super::{Dialect, Quantization, Shape, words};

/// Nibble t of a `gemm` word holds output feature 8c + `GEMM_ORDER[t]`.
pub(crate) const GEMM_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// The tensors of one linear in AutoAWQ's `gemm` layout.
#[derive(Debug, Clone, PartialEq)]
pub struct GemmTensors {
    /// (k, n / 8), row-major.
    pub qweight: Vec<u32>,
    /// (groups, n / 8), row-major.
    pub qzeros: Vec<u32>,
    /// (groups, n), row-major.
    pub scales: Vec<f16>,
}

/// Inputs at which [`StoredGemm`] can be cut.
pub const INPUT_STEP: usize = 128;

/// Multiple of bytes at which devices have the pieces of [`StoredGemm::pieces`] begin.
pub const PIECE_ALIGN: usize = 16;

/// A matrix in the layout of `gemm` where it is stored, its headers checked but nothing read: for devices that undo the
/// layout themselves, which is much faster than the processor.
#[derive(Debug, Clone)]
pub struct StoredGemm {
    /// Output features; a multiple of 8.
    pub n: usize,
    /// Input features; a multiple of 8.
    pub k: usize,
    /// Input features of a group; divides `k`.
    pub group_size: usize,
    /// (k, n / 8) words, little-endian.
    qweight: Extent,
    /// (groups, n / 8) words, little-endian.
    qzeros: Extent,
    /// (groups, n) half precision, little-endian.
    scales: Extent,
}

impl StoredGemm {
    /// The module `prefix` of `n` outputs and `k` inputs, if it is stored in this layout with scales of half precision.
    ///
    /// # Errors
    /// As [`super::load_linear`], as far as headers show.
    pub fn of(
        checkpoint: &Checkpoint,
        quantization: Option<&Quantization>,
        prefix: &str,
        n: usize,
        k: usize,
    ) -> Result<Option<Self>> {
        let Some(scheme) = super::scheme_of_stored(checkpoint, quantization, prefix)? else { return Ok(None) };
        if scheme.dialect != Dialect::AwqGemm {
            return Ok(None);
        }
        let shape = Shape::of(checkpoint, prefix, (n, k), scheme)?;
        let [qweight, qzeros, scales] = gemm_tensors(checkpoint, prefix, shape)?;
        let extent = |tensor: &TensorView| tensor.extent().clone();
        Ok((scales.dtype == Dtype::F16).then(|| Self {
            n,
            k,
            group_size: shape.group_size,
            qweight: extent(qweight),
            qzeros: extent(qzeros),
            scales: extent(scales),
        }))
    }

    /// The groups that begin within `inputs`.
    pub fn groups_from(&self, inputs: &Range<usize>) -> Range<usize> {
        inputs.start.div_ceil(self.group_size)..inputs.end.div_ceil(self.group_size)
    }

    /// Bytes of the pieces of `inputs` inputs, at most, each at a multiple of [`PIECE_ALIGN`].
    fn piece_bytes(&self, inputs: usize) -> usize {
        let groups = inputs.div_ceil(self.group_size);
        let codes = inputs.saturating_mul(self.n / 2);
        let params = groups.saturating_mul(self.n * 2 + self.n / 2);
        codes.saturating_add(params).saturating_add(3 * PIECE_ALIGN)
    }

    /// Whether the pieces of [`INPUT_STEP`] inputs are at most `room` bytes.
    pub fn fits(&self, room: usize) -> bool {
        self.piece_bytes(INPUT_STEP) <= room
    }

    /// `inputs` in cuts at multiples of [`INPUT_STEP`] from their start on, the pieces of each at most `room` bytes if
    /// [`Self::fits`] says so.
    pub fn cuts(&self, inputs: Range<usize>, room: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let at_once = (room / self.piece_bytes(INPUT_STEP)).max(1) * INPUT_STEP;
        inputs.clone().step_by(at_once).map(move |from| from..inputs.end.min(from + at_once))
    }

    /// The bytes of [`Self::pieces`], views where the file offers them.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] or [`ErrorKind::OutOfMemory`].
    pub(crate) fn read(&self, inputs: &Range<usize>) -> Result<[Bytes; 3]> {
        let [codes, scales, zeros] = self.pieces(inputs).map(|piece| match piece {
            Piece::Bytes(bytes) => Ok(Bytes::owned(bytes.to_vec())),
            Piece::Stored { extent, at, len } => match extent.slice(at..at + len) {
                Some(part) => part.bytes(),
                None => Err(Error::new(ErrorKind::Io, "the file ends too early").in_file(extent.path())),
            },
        });
        Ok([codes?, scales?, zeros?])
    }

    /// What is stored for `inputs`: (inputs, n / 8) words of codes, and of the groups that begin there (groups, n) scales
    /// and (groups, n / 8) words of zero points.
    pub fn pieces(&self, inputs: &Range<usize>) -> [Piece<'_>; 3] {
        let groups = self.groups_from(inputs);
        let rows = |extent, rows: &Range<usize>, bytes: usize| Piece::Stored {
            extent,
            at: rows.start * bytes,
            len: rows.len() * bytes,
        };
        [
            rows(&self.qweight, inputs, self.n / 2),
            rows(&self.scales, &groups, self.n * 2),
            rows(&self.qzeros, &groups, self.n / 2),
        ]
    }
}

/// The tensors of a module, after checks of their types and shapes.
fn gemm_tensors<'a>(checkpoint: &'a Checkpoint, prefix: &str, shape: Shape) -> Result<[&'a TensorView; 3]> {
    let Shape { n, k, groups, .. } = shape;
    let [qweight, qzeros, scales] = tensors(checkpoint, prefix, "qzeros")?;
    shape.expect_words().map_err(|error| error.in_file(&qweight.file).in_tensor(&qweight.name))?;
    if n % 8 != 0 {
        return Err(qweight.error(format!("expected output features in multiples of 8, found {n}")));
    }
    check(qweight, Dtype::I32, &[k, n / 8])?;
    check(qzeros, Dtype::I32, &[groups, n / 8])?;
    scales.expect_shape(&[groups, n])?;
    Ok([qweight, qzeros, scales])
}

pub(super) fn decode_gemm(checkpoint: &Checkpoint, prefix: &str, shape: Shape) -> Result<Weight> {
    let Shape { n, k, group_size, groups } = shape;
    let [qweight, qzeros, scales] = gemm_tensors(checkpoint, prefix, shape)?;
    let scale_values = read_f16(scales)?;

    let mut group_params = qzeros.reserve(n * groups)?;
    group_params.resize(n * groups, 0);
    for (i, word) in words(&qzeros.bytes()?).enumerate() {
        let (group, c) = (i / (n / 8), i % (n / 8));
        for (t, column) in GEMM_ORDER.iter().enumerate() {
            let row = 8 * c + column;
            let zero = f16::from_f32((word >> (4 * t) & 15) as f32);
            group_params[row * groups + group] = pack_params(scale_values[group * n + row], zero);
        }
    }
    let mut codes = qweight.reserve(n * (k / 8))?;
    codes.resize(n * (k / 8), 0);
    repack_gemm(&qweight.bytes()?, n, k, &mut codes);
    release(&[qweight, qzeros, scales]);
    W4Matrix::new((n, k), group_size, codes, group_params, Offset::Zero.rounded_to(scales.dense_type()?))
        .map(Weight::W4)
}

pub(super) fn decode_gemv(checkpoint: &Checkpoint, prefix: &str, shape: Shape) -> Result<Weight> {
    let Shape { n, k, group_size, groups } = shape;
    let [qweight, qzeros, scales] = tensors(checkpoint, prefix, "qzeros")?;
    shape.expect_words().map_err(|error| error.in_file(&qweight.file).in_tensor(&qweight.name))?;
    let zeros_width = zeros_width(shape).map_err(|error| qzeros.error(error))?;
    check(qweight, Dtype::I32, &[n, k / 8])?;
    check(qzeros, Dtype::I32, &[n, zeros_width])?;
    scales.expect_shape(&[n, 8 * zeros_width])?;
    let scale_values = read_f16(scales)?;

    let mut group_params = qzeros.reserve(n * groups)?;
    for (scales, zeros) in scale_values.chunks_exact(8 * zeros_width).zip(qzeros.bytes()?.chunks_exact(4 * zeros_width))
    {
        // Eight zero points a word; what lies past the last group is padding.
        let zeros = words(zeros).flat_map(|word| (0..8).map(move |t| word >> (4 * t) & 15));
        let pairs = scales.iter().zip(zeros).take(groups);
        group_params.extend(pairs.map(|(&scale, zero)| pack_params(scale, f16::from_f32(zero as f32))));
    }
    let mut codes = qweight.reserve(n * (k / 8))?;
    codes.extend(words(&qweight.bytes()?));
    release(&[qweight, qzeros, scales]);
    W4Matrix::new((n, k), group_size, codes, group_params, Offset::Zero.rounded_to(scales.dense_type()?))
        .map(Weight::W4)
}

/// Decodes `gemv_fast`, or the same layout of llm-awq, which calls its offsets otherwise and may have them in bfloat16.
pub(super) fn decode_gemv_fast(checkpoint: &Checkpoint, prefix: &str, shape: Shape, offsets: &str) -> Result<Weight> {
    let Shape { n, k, group_size, groups } = shape;
    let [qweight, qzeros, scales] = tensors(checkpoint, prefix, offsets)?;
    shape.expect_words().map_err(|error| error.in_file(&qweight.file).in_tensor(&qweight.name))?;
    let zeros_width = zeros_width(shape).map_err(|error| qzeros.error(error))?;
    if n % 4 != 0 || k % 64 != 0 {
        return Err(qweight.error(format!("expected multiples of 4 x 64 features, found {n} x {k}")));
    }
    check(qweight, Dtype::I16, &[n / 4, k])?;
    qzeros.expect_shape(&[8 * zeros_width, n])?;
    scales.expect_shape(&[8 * zeros_width, n])?;
    if qzeros.dtype != scales.dtype {
        return Err(qzeros.error(format!("expected dtype {} as of the scales, found {}", scales.dtype, qzeros.dtype)));
    }
    let (scale_values, rounding) = numbers(scales)?;
    let (biases, _) = numbers(qzeros)?;
    // What lies past the last group is padding.
    let scale_values = transpose(&scale_values[..groups * n], n);
    let biases = transpose(&biases[..groups * n], n);
    let mut codes: Vec<u32> = qweight.reserve(n * (k / 8))?;
    codes.resize(n * (k / 8), 0);
    // A band is 4 rows, i.e. 4 * k / 8 words; a block of it 4 rows of 64 input features, 8 words a row.
    for (band, codes) in qweight.bytes()?.chunks_exact(2 * k).zip(codes.chunks_exact_mut(k / 2)) {
        for (block, bytes) in band.chunks_exact(128).enumerate() {
            for (row, bytes) in bytes.chunks_exact(32).enumerate() {
                let out = &mut codes[row * (k / 8) + 8 * block..][..8];
                for (out, bytes) in out.chunks_exact_mut(4).zip(bytes.chunks_exact(16)) {
                    deinterleave(bytes, out);
                }
            }
        }
    }
    release(&[qweight, qzeros, scales]);
    let levels = affine(Offset::Bias, &scale_values, biases.iter().copied());
    Rows { n, k, bits: 4, group_size, codes }.weight(levels, rounding)
}

/// Undoes the order of 32 input features in `gemv_fast`: nibble 4l + j of word i holds feature 8j + 2i + l.
fn deinterleave(bytes: &[u8], out: &mut [u32]) {
    out.fill(0);
    for (i, word) in words(bytes).enumerate() {
        for (j, out) in out.iter_mut().enumerate() {
            let even = word >> (4 * j) & 15;
            let odd = word >> (4 * (4 + j)) & 15;
            *out |= (even | odd << 4) << (8 * i);
        }
    }
}

/// Encodes a matrix in AutoAWQ's `gemm` layout; decoding it gives the same matrix back.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if the output features are not a multiple of 8, or an offset is not a zero point 0 to 15.
pub fn encode_gemm(matrix: &W4Matrix) -> Result<GemmTensors> {
    let (n, k, groups) = (matrix.n, matrix.k, matrix.groups());
    let refuse = |message: String| Err(Error::new(ErrorKind::Unsupported, message));
    if n % 8 != 0 {
        return refuse(format!("gemm packs output features in multiples of 8, found {n}"));
    }
    if matrix.offset.is_bias() {
        return refuse("gemm stores integer zero points, found biases".into());
    }
    let mut scales = vec![f16::ZERO; groups * n];
    let mut qzeros = vec![0; groups * (n / 8)];
    for row in 0..n {
        // The nibble of this row within its word: the inverse of `GEMM_ORDER`.
        let nibble = row % 8 / 2 + 4 * (row % 2);
        for group in 0..groups {
            let (scale, offset) = matrix.group(row, group);
            let zero = offset.to_f32();
            if !(0.0..=15.0).contains(&zero) || zero.fract() != 0.0 {
                return refuse(format!("gemm stores zero points 0 to 15, found {zero} in group {group} of row {row}"));
            }
            scales[group * n + row] = scale;
            qzeros[group * (n / 8) + row / 8] |= (zero as u32) << (4 * nibble);
        }
    }
    let mut qweight = vec![0; k * (n / 8)];
    for c in 0..n / 8 {
        for column in 0..k / 8 {
            // Row t of the block feeds nibble t, so that its transpose has the words in order of input feature.
            let mut block: [[u32; 1]; 8] =
                std::array::from_fn(|t| [matrix.qweight[(8 * c + GEMM_ORDER[t]) * (k / 8) + column]]);
            transpose_nibbles(&mut block);
            for (i, [word]) in block.into_iter().enumerate() {
                qweight[(8 * column + i) * (n / 8) + c] = word;
            }
        }
    }
    Ok(GemmTensors { qweight, qzeros, scales })
}

/// Words of a row handled together: one cache line of the source.
const LANES: usize = 16;

/// Codes (k, n / 8) in `gemm` order to canonical (n, k / 8).
///
/// Works on tiles of 16 x 16 words, so that both sides are touched in whole cache lines; inside a tile, 8 x 8 blocks of
/// nibbles are transposed 16 at a time in loops that the compiler turns into vector code.
fn repack_gemm(bytes: &[u8], n: usize, k: usize, out: &mut [u32]) {
    let (in_width, out_width) = (n / 8, k / 8);
    // (8 * LANES output features, LANES words of input features)
    let mut tile = vec![[0u32; LANES]; 8 * LANES];
    for first in (0..in_width).step_by(LANES) {
        let lanes = LANES.min(in_width - first);
        for first_column in (0..out_width).step_by(LANES) {
            let columns = LANES.min(out_width - first_column);
            for (slot, column) in (first_column..first_column + columns).enumerate() {
                let mut block = [[0u32; LANES]; 8];
                for (i, block) in block.iter_mut().enumerate() {
                    let start = 4 * ((8 * column + i) * in_width + first);
                    for (lane, word) in block.iter_mut().zip(words(&bytes[start..start + 4 * lanes])) {
                        *lane = word;
                    }
                }
                transpose_nibbles(&mut block);
                for (t, block) in block.iter().enumerate() {
                    for (lane, &word) in block.iter().enumerate() {
                        tile[8 * lane + GEMM_ORDER[t]][slot] = word;
                    }
                }
            }
            for (row, tile) in tile[..8 * lanes].iter().enumerate() {
                let start = (8 * first + row) * out_width + first_column;
                out[start..start + columns].copy_from_slice(&tile[..columns]);
            }
        }
    }
}

/// Transposes 8 x 8 nibbles in every lane: nibble t of word i becomes nibble i of word t.
pub(crate) fn transpose_nibbles<const L: usize>(block: &mut [[u32; L]; 8]) {
    for (distance, shift, mask) in [(4, 16, 0x0000_ffff), (2, 8, 0x00ff_00ff), (1, 4, 0x0f0f_0f0f)] {
        for i in (0..8).filter(|i| i & distance == 0) {
            let (low, high) = block.split_at_mut(i + distance);
            for (a, b) in low[i].iter_mut().zip(&mut high[0]) {
                let swap = (*a >> shift ^ *b) & mask;
                *b ^= swap;
                *a ^= swap << shift;
            }
        }
    }
}

fn tensors<'a>(checkpoint: &'a Checkpoint, prefix: &str, offsets: &str) -> Result<[&'a TensorView; 3]> {
    let get = |suffix: &str| checkpoint.get(&format!("{prefix}.{suffix}"));
    Ok([get("qweight")?, get(offsets)?, get("scales")?])
}

fn check(tensor: &TensorView, dtype: Dtype, shape: &[usize]) -> Result<()> {
    tensor.expect_dtype(dtype)?;
    tensor.expect_shape(shape)
}

/// Words of packed zero points a row, padding included.
fn zeros_width(shape: Shape) -> Result<usize, String> {
    let multiple = match shape.group_size {
        128.. => 1,
        64 => 2,
        32 => 4,
        other => return Err(format!("gemv layouts have groups of 32, 64 or at least 128, found {other}")),
    };
    Ok(shape.groups.div_ceil(8).next_multiple_of(multiple))
}
