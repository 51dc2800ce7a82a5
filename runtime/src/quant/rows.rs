//! Form of a module before its bytes are read, and some rows of it at a time, so that loading can be cut into pieces.

use std::ops::Range;

use super::{Dialect, Quantization, Scheme, Shape, load_module, scheme_of_stored};
use crate::checkpoint::{Checkpoint, Dtype, TensorView};
use crate::error::Result;
use crate::tensor::{DenseType, Offset, Weight, WeightShape};

/// Rows at which every dialect can be cut.
pub const ROW_STEP: usize = 32;

/// What [`super::load_linear`] will give, from the headers alone.
///
/// # Errors
/// Those of [`super::load_linear`] that headers show.
pub fn linear_shape(
    checkpoint: &Checkpoint,
    quantization: Option<&Quantization>,
    prefix: &str,
    n: usize,
    k: usize,
) -> Result<WeightShape> {
    let Some(scheme) = scheme_of_stored(checkpoint, quantization, prefix)? else {
        let tensor = checkpoint.require(&format!("{prefix}.weight"), &[n, k])?;
        return Ok(WeightShape::Dense { n, k, dtype: tensor.dense_type()? });
    };
    let codes = format!("{prefix}.{}", scheme.dialect.codes_suffix());
    checkpoint.get(&codes)?;
    if scheme.bits == 8 {
        return Ok(WeightShape::Dense { n, k, dtype: DenseType::F16 });
    }
    let Shape { group_size, .. } = Shape::of(checkpoint, prefix, (n, k), scheme)?;
    let offset = match scheme.dialect {
        Dialect::AwqGemvFast => Offset::Bias,
        Dialect::AwqGemm | Dialect::AwqGemv | Dialect::PackQuantized | Dialect::GptqV2 => Offset::Zero,
    };
    Ok(WeightShape::W4 { n, k, group_size, offset })
}

/// Rows `rows` of the module `prefix` of shape (n, k), as [`super::load_linear`]; `None` where it can only be loaded as
/// a whole. A start that is no multiple of [`ROW_STEP`] may make it so.
///
/// # Errors
/// As [`super::load_linear`].
pub fn load_rows(
    checkpoint: &Checkpoint,
    quantization: Option<&Quantization>,
    prefix: &str,
    (n, k): (usize, usize),
    rows: Range<usize>,
) -> Result<Option<Weight>> {
    let scheme = scheme_of_stored(checkpoint, quantization, prefix)?;
    let Some(scheme) = scheme.filter(|_| rows != (0..n)) else {
        return match scheme {
            Some(_) => load_module(checkpoint, scheme, prefix, n, k).map(Some),
            None => checkpoint.dense_rows(&format!("{prefix}.weight"), n, k, rows).map(|m| Some(Weight::Dense(m))),
        };
    };
    match cut(checkpoint, scheme, prefix, (n, k), &rows)? {
        Some(part) => load_module(&part, Some(scheme), prefix, rows.len(), k).map(Some),
        None => Ok(None),
    }
}

/// The tensors of the module that hold the rows, as a checkpoint of their own.
fn cut(
    checkpoint: &Checkpoint,
    scheme: Scheme,
    prefix: &str,
    (n, k): (usize, usize),
    rows: &Range<usize>,
) -> Result<Option<Checkpoint>> {
    let mut parts = Vec::new();
    for &(suffix, axis, step) in tensors(scheme) {
        let Some(tensor) = checkpoint.tensor(&format!("{prefix}.{suffix}")) else { continue };
        let whole = tensor.shape.get(axis).is_some_and(|&len| len == n.div_ceil(step));
        let cut_here = |row: usize| row.is_multiple_of(step);
        if !whole || !cut_here(rows.start) || !(cut_here(rows.end) || rows.end == n) {
            return Ok(None);
        }
        match tensor.cut(axis, rows.start / step..rows.end.div_ceil(step)) {
            Some(part) => parts.push(part),
            None => return Ok(None),
        }
    }
    // What is not parted: a shape that is stated is compared here, since the rows do not have it; the rest is kept.
    for suffix in ["weight_shape", "weight_g_idx", "g_idx"] {
        match checkpoint.tensor(&format!("{prefix}.{suffix}")) {
            Some(stated) if suffix == "weight_shape" && !states(stated, n, k)? => return Ok(None),
            Some(tensor) if suffix != "weight_shape" => parts.push(tensor.clone()),
            _ => {}
        }
    }
    Ok(Some(checkpoint.with_tensors(parts)))
}

/// Tensors of a dialect with the dimension of the output features and how many of them an element of it has.
fn tensors(scheme: Scheme) -> &'static [(&'static str, usize, usize)] {
    match (scheme.dialect, scheme.bits) {
        (Dialect::AwqGemm, _) => &[("qweight", 1, 8), ("qzeros", 1, 8), ("scales", 1, 1)],
        (Dialect::AwqGemv, _) => &[("qweight", 0, 1), ("qzeros", 0, 1), ("scales", 0, 1)],
        (Dialect::AwqGemvFast, _) => &[("qweight", 0, 4), ("qzeros", 1, 1), ("scales", 1, 1)],
        (Dialect::PackQuantized, 4) => &[("weight_packed", 0, 1), ("weight_scale", 0, 1), ("weight_zero_point", 0, 8)],
        (Dialect::GptqV2, 4) => &[("qweight", 1, 1), ("qzeros", 1, 8), ("scales", 1, 1)],
        // Zero points of other widths straddle words.
        _ => &[("qweight", 0, usize::MAX), ("weight_packed", 0, usize::MAX)],
    }
}

fn states(stated: &TensorView, n: usize, k: usize) -> Result<bool> {
    let bytes = stated.bytes()?;
    let found = bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b));
    Ok(stated.dtype == Dtype::I64 && found.eq([n as i64, k as i64]))
}
