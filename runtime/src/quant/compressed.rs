//! compressed-tensors `pack-quantized`, 2, 3, 4 and 8 bits, symmetric and asymmetric, by group and by channel.
//!
//! Layout after compressed-tensors' `compressors/pack_quantized`, with N output and K input features, G groups of a
//! row: `weight_packed` i32 (N, K/8), nibble t of word c is feature 8c + t; `weight_scale` f16 or bf16 (N, G);
//! `weight_zero_point` i32 (ceil(N/8), G), nibble t of row r belongs to output feature 8r + t (asymmetric only);
//! `weight_shape` i64 (2) = (N, K). Values are signed and stored plus 8, zero points too, so the offsets cancel and a
//! symmetric weight has the zero point 8. Other widths b take b for 4 and 2^(b-1) for 8; 3-bit fields straddle words
//! since 2026, before that a word held ten of them.

use half::f16;

use crate::checkpoint::{Checkpoint, Dtype};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{Offset, W4Matrix};

use super::bits::{dense_words, pack, transpose, unpack};
use super::canonical::{pack_params, read_f16, release};
use super::{AffineMatrix, Shape, words};

/// The tensors of one linear.
#[derive(Debug, Clone, PartialEq)]
pub struct PackQuantizedTensors {
    /// (n, ceil(k * bits / 32)), row-major.
    pub weight_packed: Vec<u32>,
    /// (n, groups), row-major.
    pub weight_scale: Vec<f16>,
    /// (ceil(n * bits / 32), groups), row-major; `None` if symmetric.
    pub weight_zero_point: Option<Vec<u32>>,
    /// (n, k).
    pub weight_shape: [i64; 2],
}

/// Encodes a matrix; decoding it gives the same matrix back.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] if it is asked to leave out zero points that differ from the middle of the range.
pub fn encode(matrix: &AffineMatrix, symmetric: bool) -> Result<PackQuantizedTensors> {
    if symmetric && !matrix.is_symmetric() {
        let message = "zero points differ from the middle of the range, but symmetric weights store none";
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    let (n, k, bits) = (matrix.n, matrix.k, matrix.bits);
    let mut weight_packed = Vec::with_capacity(n * dense_words(k, bits).unwrap_or(0));
    for row in matrix.codes.chunks_exact(k) {
        pack(row.iter().copied(), bits, &mut weight_packed);
    }
    let weight_zero_point = (!symmetric).then(|| {
        let mut columns = Vec::new();
        for zeros in transpose(&matrix.zeros, matrix.groups()).chunks_exact(n) {
            pack(zeros.iter().copied(), bits, &mut columns);
        }
        transpose(&columns, dense_words(n, bits).unwrap_or(0)).into_owned()
    });
    let weight_shape = [n as i64, k as i64];
    Ok(PackQuantizedTensors { weight_packed, weight_scale: matrix.scales.clone(), weight_zero_point, weight_shape })
}

/// Decodes a module of any width; [`decode`] is the fast way for 4 bits.
pub(super) fn decode_affine(
    checkpoint: &Checkpoint,
    prefix: &str,
    (n, k): (usize, usize),
    bits: u32,
    group_size: usize,
    symmetric: bool,
) -> Result<AffineMatrix> {
    let name = |suffix: &str| format!("{prefix}.{suffix}");
    let packed = checkpoint.get(&name("weight_packed"))?;
    if n == 0 || k == 0 || group_size == 0 || k % group_size != 0 {
        return Err(packed.error(format!("groups of {group_size} do not divide {n} x {k}")));
    }
    let groups = k / group_size;
    // Words of a run, and whether its fields straddle them; the same for 2, 4 and 8 bits.
    let runs = |count: usize| {
        let whole = count.div_ceil((32 / bits) as usize);
        [(dense_words(count, bits).unwrap_or(usize::MAX), true), (whole, false)]
    };
    packed.expect_dtype(Dtype::I32)?;
    let Some((k_words, dense)) = runs(k).into_iter().find(|&(words, _)| packed.shape == [n, words]) else {
        return Err(packed.error(format!("expected shape [{n}, {}], found {:?}", runs(k)[0].0, packed.shape)));
    };
    let scales = checkpoint.require(&name("weight_scale"), &[n, groups])?;
    if let Some(order) = checkpoint.tensor(&name("weight_g_idx")) {
        return Err(order.error("expected no group order, since the configuration has no `actorder` of groups"));
    }
    let mut codes = packed.reserve(n * k)?;
    codes.resize(n * k, 0);
    for (row, run) in codes.chunks_exact_mut(k).zip(packed.bytes()?.chunks_exact(4 * k_words)) {
        unpack(words(run), bits, dense, row);
    }
    let mut zeros = vec![1u8 << (bits - 1); n * groups];
    if !symmetric {
        let stored = checkpoint.get(&name("weight_zero_point"))?;
        stored.expect_dtype(Dtype::I32)?;
        let Some((n_words, dense)) = runs(n).into_iter().find(|&(words, _)| stored.shape == [words, groups]) else {
            return Err(stored.error(format!("expected shape [{}, {groups}], found {:?}", runs(n)[0].0, stored.shape)));
        };
        let rows: Vec<u32> = words(&stored.bytes()?).collect();
        let mut columns = vec![0; n * groups];
        for (column, run) in columns.chunks_exact_mut(n).zip(transpose(&rows, groups).chunks_exact(n_words)) {
            unpack(run.iter().copied(), bits, dense, column);
        }
        zeros = transpose(&columns, n).into_owned();
    }
    let matrix = AffineMatrix { n, k, bits, group_size, codes, scales: read_f16(scales)?, zeros };
    release(&[packed, scales]);
    matrix.check().map_err(|error| packed.error(error.message()))?;
    Ok(matrix)
}

pub(super) fn decode(checkpoint: &Checkpoint, prefix: &str, shape: Shape, symmetric: bool) -> Result<W4Matrix> {
    let Shape { n, k, group_size, groups } = shape;
    let name = |suffix: &str| format!("{prefix}.{suffix}");
    let packed = checkpoint.get(&name("weight_packed"))?;
    packed.expect_dtype(Dtype::I32)?;
    packed.expect_shape(&[n, k / 8])?;
    let scales = checkpoint.require(&name("weight_scale"), &[n, groups])?;
    let scale_values = read_f16(scales)?;
    if let Some(stated) = checkpoint.tensor(&name("weight_shape")) {
        stated.expect_dtype(Dtype::I64)?;
        stated.expect_shape(&[2])?;
        let bytes = stated.bytes()?;
        let found: Vec<i64> = bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
        if found != [n as i64, k as i64] {
            return Err(stated.error(format!("expected values [{n}, {k}], found {found:?}")));
        }
    }
    if let Some(order) = checkpoint.tensor(&name("weight_g_idx")) {
        return Err(order.error("expected no group order, since the configuration has no `actorder` of groups"));
    }

    let zero_points = checkpoint.tensor(&name("weight_zero_point"));
    let zeros: Option<Vec<u32>> = match (symmetric, zero_points) {
        (true, None) => None,
        // Some writers store the constant zero points of symmetric weights, as int8 zeros.
        (true, Some(stored)) if stored.dtype == Dtype::I8 && stored.bytes()?.iter().all(|&z| z == 0) => None,
        (true, Some(stored)) => return Err(stored.error("expected no zero points, the configuration says symmetric")),
        (false, _) => {
            let stored = checkpoint.get(&name("weight_zero_point"))?;
            stored.expect_dtype(Dtype::I32)?;
            stored.expect_shape(&[n.div_ceil(8), groups])?;
            let mut zeros = stored.reserve(stored.byte_len() / 4)?;
            zeros.extend(words(&stored.bytes()?));
            Some(zeros)
        }
    };
    let zero = |row: usize, group: usize| match &zeros {
        None => 8,
        Some(zeros) => zeros[row / 8 * groups + group] >> (4 * (row % 8)) & 15,
    };
    let mut group_params = scales.reserve(n * groups)?;
    for row in 0..n {
        group_params.extend(
            (0..groups).map(|g| pack_params(scale_values[row * groups + g], f16::from_f32(zero(row, g) as f32))),
        );
    }
    let mut codes = packed.reserve(n * (k / 8))?;
    codes.extend(words(&packed.bytes()?));
    release(&[packed, scales]);
    W4Matrix::new((n, k), group_size, codes, group_params, Offset::Zero)
}
