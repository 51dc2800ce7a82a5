//! compressed-tensors `pack-quantized`, 2 to 8 bits, symmetric and asymmetric, by group, channel and tensor, groups also
//! in the order of activations; and `int-quantized` weights.
//!
//! Layout after compressed-tensors' `compressors/pack_quantized`, with N output and K input features, G groups of a
//! row: `weight_packed` i32 (N, K/8), nibble t of word c is feature 8c + t; `weight_scale` f16 or bf16 (N, G);
//! `weight_zero_point` i32 (ceil(N/8), G), nibble t of row r belongs to output feature 8r + t (asymmetric only);
//! `weight_shape` i64 (2) = (N, K); `weight_g_idx` i32 (K). Values are signed and stored plus 8, zero points too, so the
//! offsets cancel and a symmetric weight has the zero point 8. Other widths b take b for 4 and 2^(b-1) for 8; fields of
//! 3, 5 and 6 bits straddle words since 2026, before that a word held as many whole ones as fit. `int-quantized` has
//! `weight` i8 (N, K) instead, and zero points of a byte.

use half::f16;

use crate::checkpoint::{Checkpoint, Dtype, TensorView};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{Offset, row_words};

use super::bits::{pack, transpose, unpack};
use super::build::{Rows, affine, numbers, order};
use super::canonical::release;
use super::{AffineMatrix, Dialect, InputTransform, LinearWeight, Scheme, Shape, words};

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
    let mut weight_packed = Vec::with_capacity(n * row_words(k, bits));
    for row in matrix.codes.chunks_exact(k) {
        pack(row.iter().copied(), bits, &mut weight_packed);
    }
    let weight_zero_point = (!symmetric).then(|| {
        let mut columns = Vec::new();
        for zeros in transpose(&matrix.zeros, matrix.groups()).chunks_exact(n) {
            pack(zeros.iter().copied(), bits, &mut columns);
        }
        transpose(&columns, row_words(n, bits)).into_owned()
    });
    let weight_shape = [n as i64, k as i64];
    Ok(PackQuantizedTensors { weight_packed, weight_scale: matrix.scales.clone(), weight_zero_point, weight_shape })
}

/// Decodes a module of either format.
pub(super) fn decode(checkpoint: &Checkpoint, prefix: &str, shape: Shape, scheme: Scheme) -> Result<LinearWeight> {
    let Shape { n, k, group_size, groups } = shape;
    let Scheme { bits, act_order, .. } = scheme;
    let name = |suffix: &str| format!("{prefix}.{suffix}");
    let codes = checkpoint.get(&name(scheme.dialect.codes_suffix()))?;
    if let Some(stated) = checkpoint.tensor(&name("weight_shape")) {
        stated.expect_dtype(Dtype::I64)?;
        stated.expect_shape(&[2])?;
        let bytes = stated.bytes()?;
        let found: Vec<i64> = bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
        if found != [n as i64, k as i64] {
            return Err(stated.error(format!("expected values [{n}, {k}], found {found:?}")));
        }
    }
    let order = match checkpoint.tensor(&name("weight_g_idx")) {
        Some(g_idx) if is_unset(g_idx)? => None,
        Some(g_idx) if !act_order => {
            return Err(g_idx.error("expected no group order, since the configuration has no `actorder` of groups"));
        }
        Some(g_idx) => order(g_idx, k, group_size)?,
        None if act_order && groups > 1 => {
            return Err(codes.error(format!("`actorder` of groups needs `{}`, which is missing", name("weight_g_idx"))));
        }
        None => None,
    };

    let mut rows = match scheme.dialect {
        Dialect::IntQuantized => byte_rows(codes, shape)?,
        _ => packed_rows(codes, shape, bits)?,
    };
    if let Some(order) = &order {
        rows = rows.reordered(order);
    }
    let scales = checkpoint.get(&name("weight_scale"))?;
    let (values, rounding) = numbers(scales)?;
    let values = spread(scales, values, shape)?;
    let zeros = zero_points(checkpoint, &name("weight_zero_point"), shape, scheme)?;
    let levels = affine(Offset::Zero, &values, zeros.iter().map(|&zero| f32::from(zero)));
    release(&[codes, scales]);
    let weight = rows.weight(levels, rounding).map_err(|error| codes.error(error.message()))?;
    Ok(LinearWeight { weight, input: InputTransform { order, factors: None } })
}

/// Whether the groups of the inputs are what a writer that never sorted them leaves: -1.
pub(super) fn is_unset(g_idx: &TensorView) -> Result<bool> {
    Ok(words(&g_idx.bytes()?).all(|group| group == u32::MAX))
}

/// Words that a run of `count` fields fills, and whether its fields straddle them; the same for 2, 4 and 8 bits.
fn runs(count: usize, bits: u32) -> [(usize, bool); 2] {
    [(row_words(count, bits), true), (count.div_ceil((32 / bits) as usize), false)]
}

fn packed_rows(packed: &TensorView, shape: Shape, bits: u32) -> Result<Rows> {
    let Shape { n, k, group_size, .. } = shape;
    packed.expect_dtype(Dtype::I32)?;
    let Some((k_words, dense)) = runs(k, bits).into_iter().find(|&(words, _)| packed.shape == [n, words]) else {
        return Err(packed.error(format!("expected shape [{n}, {}], found {:?}", row_words(k, bits), packed.shape)));
    };
    let mut codes: Vec<u32> = packed.reserve(n * row_words(k, bits))?;
    let bytes = packed.bytes()?;
    if dense {
        codes.extend(words(&bytes));
    } else {
        let mut row = vec![0; k];
        for run in bytes.chunks_exact(4 * k_words) {
            unpack(words(run), bits, false, &mut row);
            pack(row.iter().copied(), bits, &mut codes);
        }
    }
    Ok(Rows { n, k, bits, group_size, codes })
}

/// A signed byte a code, stored without an offset.
fn byte_rows(weight: &TensorView, shape: Shape) -> Result<Rows> {
    let Shape { n, k, group_size, .. } = shape;
    weight.expect_dtype(Dtype::I8)?;
    weight.expect_shape(&[n, k])?;
    let mut codes = weight.reserve(n * row_words(k, 8))?;
    for row in weight.bytes()?.chunks_exact(k) {
        pack(row.iter().map(|q| q ^ 0x80), 8, &mut codes);
    }
    Ok(Rows { n, k, bits: 8, group_size, codes })
}

/// Scales (n, groups) from those of groups, of channels or of the whole tensor.
fn spread(scales: &TensorView, values: Vec<f32>, shape: Shape) -> Result<Vec<f32>> {
    let Shape { n, groups, .. } = shape;
    match scales.shape[..] {
        [rows, columns] if (rows, columns) == (n, groups) => Ok(values),
        // One number for the whole tensor, where the configuration has one group a row.
        [] | [1] | [1, 1] if groups == 1 => Ok(vec![values[0]; n]),
        [rows] if rows == n && groups == 1 => Ok(values),
        _ => Err(scales.error(format!("expected shape [{n}, {groups}], found {:?}", scales.shape))),
    }
}

/// Zero points (n, groups) plus the middle of the range, as the codes are stored.
fn zero_points(checkpoint: &Checkpoint, name: &str, shape: Shape, scheme: Scheme) -> Result<Vec<u8>> {
    let Shape { n, groups, .. } = shape;
    let middle = 1u8 << (scheme.bits - 1);
    let constant = vec![middle; n * groups];
    let stored = match (scheme.symmetric, checkpoint.tensor(name)) {
        (true, None) => return Ok(constant),
        (true, Some(stored)) => {
            // Some writers store the constant zero points of symmetric weights, as int8 zeros.
            if stored.dtype == Dtype::I8 && stored.bytes()?.iter().all(|&zero| zero == 0) {
                return Ok(constant);
            }
            return Err(stored.error("expected no zero points, the configuration says symmetric"));
        }
        (false, _) => checkpoint.get(name)?,
    };
    if stored.dtype == Dtype::I8 {
        let bytes = stored.bytes()?;
        let values: Vec<u8> = match stored.shape[..] {
            [rows, columns] if (rows, columns) == (n, groups) => bytes.to_vec(),
            [] | [1] | [1, 1] if groups == 1 => vec![bytes[0]; n],
            _ => return Err(stored.error(format!("expected shape [{n}, {groups}], found {:?}", stored.shape))),
        };
        let largest = i16::from(middle);
        if let Some(&zero) = values.iter().find(|&&zero| !(-largest..largest).contains(&i16::from(zero as i8))) {
            return Err(stored.error(format!("zero point {} does not fit {} bits", zero as i8, scheme.bits)));
        }
        return Ok(values.iter().map(|&zero| zero.wrapping_add(middle)).collect());
    }
    stored.expect_dtype(Dtype::I32)?;
    let runs = runs(n, scheme.bits);
    let Some((n_words, dense)) = runs.into_iter().find(|&(words, _)| stored.shape == [words, groups]) else {
        return Err(stored.error(format!("expected shape [{}, {groups}], found {:?}", runs[0].0, stored.shape)));
    };
    let rows: Vec<u32> = words(&stored.bytes()?).collect();
    let mut columns = vec![0; n * groups];
    for (column, run) in columns.chunks_exact_mut(n).zip(transpose(&rows, groups).chunks_exact(n_words)) {
        unpack(run.iter().copied(), scheme.bits, dense, column);
    }
    Ok(transpose(&columns, n).into_owned())
}
