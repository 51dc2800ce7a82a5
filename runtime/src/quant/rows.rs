//! Form of a module before its bytes are read, and some rows of it at a time, so that loading can be cut into pieces.

use std::ops::Range;

use super::build::{is_half, order};
use super::{
    Dialect, InputTransform, Quantization, Scheme, Shape, bitsandbytes, compressed, load_module, modelopt,
    scheme_of_stored,
};
use crate::checkpoint::{Checkpoint, Dtype, TensorView};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{DenseType, GgmlType, LevelsForm, Offset, Weight, WeightShape};

/// Rows at which every dialect can be cut.
pub const ROW_STEP: usize = 32;

/// What [`super::load_linear`] will give.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearShape {
    /// Form and size of the matrix.
    pub weight: WeightShape,
    /// What happens to its inputs.
    pub input: InputTransform,
}

/// What [`super::load_linear`] will give, from the headers and from what is stored once for each input. Only where
/// scales are not in half precision they are read, to see whether that would hold them.
///
/// # Errors
/// Those of [`super::load_linear`] that these show.
pub fn linear_shape(
    checkpoint: &Checkpoint,
    quantization: Option<&Quantization>,
    prefix: &str,
    n: usize,
    k: usize,
) -> Result<LinearShape> {
    let plain = |weight| LinearShape { weight, input: InputTransform::default() };
    let Some(scheme) = scheme_of_stored(checkpoint, quantization, prefix)? else {
        let tensor = checkpoint.require(&format!("{prefix}.weight"), &[n, k])?;
        return Ok(plain(WeightShape::Dense { n, k, dtype: tensor.dense_type()? }));
    };
    let name = |suffix: &str| format!("{prefix}.{suffix}");
    let codes = checkpoint.get(&name(scheme.dialect.codes_suffix()))?;
    let shape = Shape::of(checkpoint, prefix, (n, k), scheme)?;
    let affine = |scales: &str, offsets: Option<&str>, offset| -> Result<WeightShape> {
        let scales = checkpoint.get(&name(scales))?;
        let narrow =
            is_half(scales)? && offsets.map_or(Ok(true), |name_of| is_half(checkpoint.get(&name(name_of))?))?;
        Ok(affine_shape(shape, scheme.bits, offset, narrow, scales.dense_type()?))
    };
    let sorted = |g_idx: &str| match checkpoint.tensor(&name(g_idx)) {
        Some(g_idx) if !compressed::is_unset(g_idx)? => order(g_idx, k, shape.group_size),
        _ => Ok(None),
    };
    Ok(match scheme.dialect {
        Dialect::AwqGemm | Dialect::AwqGemv => {
            let rounding = checkpoint.get(&name("scales"))?.dense_type()?;
            let offset = Offset::Zero.rounded_to(rounding);
            plain(WeightShape::W4 { n, k, group_size: shape.group_size, offset })
        }
        Dialect::AwqGemvFast => plain(affine("scales", Some("qzeros"), Offset::Bias)?),
        Dialect::TinyChat => plain(affine("scales", Some("scaled_zeros"), Offset::Bias)?),
        Dialect::Mlx => plain(affine("scales", Some("biases"), Offset::RoundedBias)?),
        Dialect::PackQuantized | Dialect::IntQuantized => {
            let input = InputTransform { order: sorted("weight_g_idx")?, factors: None };
            LinearShape { weight: affine("weight_scale", None, Offset::Zero)?, input }
        }
        Dialect::Gptq | Dialect::GptqV2 => {
            let input = InputTransform { order: sorted("g_idx")?, factors: None };
            LinearShape { weight: affine("scales", None, Offset::Zero)?, input }
        }
        Dialect::ModelOpt => {
            let factors = modelopt::factors(checkpoint, prefix, k)?;
            let input = InputTransform { order: None, factors };
            LinearShape { weight: affine("weight_scale", None, Offset::Zero)?, input }
        }
        Dialect::BitsAndBytes => plain(bitsandbytes::shape(checkpoint, prefix, (n, k))?),
        Dialect::Gguf => plain(gguf_shape(codes, n, k)?),
    })
}

/// What [`super::load_table`] will give.
///
/// # Errors
/// Those of [`super::load_table`] that headers show.
pub fn table_shape(
    checkpoint: &Checkpoint,
    quantization: Option<&Quantization>,
    prefix: &str,
    n: usize,
    k: usize,
) -> Result<WeightShape> {
    let LinearShape { weight, input } = linear_shape(checkpoint, quantization, prefix, n, k)?;
    if input != InputTransform::default() {
        let message = "an embedding table whose columns are in another order";
        return Err(Error::new(ErrorKind::Unsupported, message).in_file(checkpoint.dir()).in_tensor(prefix));
    }
    Ok(weight)
}

/// The form that [`super::build::Rows::weight`] chooses.
fn affine_shape(shape: Shape, bits: u32, offset: Offset, narrow: bool, rounding: DenseType) -> WeightShape {
    let Shape { n, k, group_size, .. } = shape;
    let eights = group_size.is_multiple_of(8);
    if narrow && bits == 4 && k.is_multiple_of(8) && eights && k.is_multiple_of(group_size) {
        return WeightShape::W4 { n, k, group_size, offset: offset.rounded_to(rounding) };
    }
    if eights || group_size >= k {
        let levels = if narrow { LevelsForm::Affine(offset) } else { LevelsForm::AffineWide(offset) };
        return WeightShape::Packed { n, k, bits, group_size, levels, rounding };
    }
    WeightShape::Dense { n, k, dtype: rounding }
}

fn gguf_shape(tensor: &TensorView, n: usize, k: usize) -> Result<WeightShape> {
    tensor.expect_blocks(n, k)?;
    let simple = |bits, offset| {
        let shape = Shape { n, k, group_size: 32, groups: k / 32 };
        affine_shape(shape, bits, offset, true, DenseType::F32)
    };
    Ok(match tensor.ggml_type() {
        Some(ggml_type @ (GgmlType::Q4K | GgmlType::Q5K | GgmlType::Q6K)) => WeightShape::Blocks { n, k, ggml_type },
        Some(GgmlType::Q4_0) => simple(4, Offset::Zero),
        Some(GgmlType::Q4_1) => simple(4, Offset::Bias),
        Some(GgmlType::Q5_0) => simple(5, Offset::Zero),
        Some(GgmlType::Q5_1) => simple(5, Offset::Bias),
        _ => simple(8, Offset::Zero),
    })
}

/// Rows `rows` of the module `prefix` of shape (n, k), as [`super::load_linear`] gives them but for what it does to the
/// inputs; `None` where it can only be loaded as a whole. A start that is no multiple of [`ROW_STEP`] may make it so.
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
            Some(_) => load_module(checkpoint, scheme, prefix, n, k).map(|linear| Some(linear.weight)),
            None => checkpoint.dense_rows(&format!("{prefix}.weight"), n, k, rows).map(|m| Some(Weight::Dense(m))),
        };
    };
    match cut(checkpoint, scheme, prefix, (n, k), &rows)? {
        Some(part) => load_module(&part, Some(scheme), prefix, rows.len(), k).map(|linear| Some(linear.weight)),
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
    let Some(cuts) = tensors(scheme) else { return Ok(None) };
    let mut parts = Vec::new();
    for Cut { suffix, axis, rows: step, elements } in cuts {
        let Some(tensor) = checkpoint.tensor(&format!("{prefix}.{suffix}")) else { continue };
        let whole = tensor.shape.get(axis).is_some_and(|&len| len == (n * elements).div_ceil(step));
        let cut_here = |row: usize| row.is_multiple_of(step);
        if !whole || !cut_here(rows.start) || !(cut_here(rows.end) || rows.end == n) {
            return Ok(None);
        }
        match tensor.cut(axis, rows.start / step * elements..(rows.end * elements).div_ceil(step)) {
            Some(part) => parts.push(part),
            None => return Ok(None),
        }
    }
    // What is not parted: a shape that is stated is compared here, since the rows do not have it; the rest is kept.
    for suffix in ["weight_shape", "weight_g_idx", "g_idx", "pre_quant_scale"] {
        match checkpoint.tensor(&format!("{prefix}.{suffix}")) {
            Some(stated) if suffix == "weight_shape" && !states(stated, n, k)? => return Ok(None),
            Some(tensor) if suffix != "weight_shape" => parts.push(tensor.clone()),
            _ => {}
        }
    }
    Ok(Some(checkpoint.with_tensors(parts)))
}

/// A tensor that is cut along a dimension, of which `elements` hold `rows` output features.
struct Cut {
    suffix: &'static str,
    axis: usize,
    rows: usize,
    elements: usize,
}

/// The tensors of a dialect; `None` where rows do not lie apart.
fn tensors(scheme: Scheme) -> Option<Vec<Cut>> {
    let cut = |suffix, axis, rows, elements| Cut { suffix, axis, rows, elements };
    let bits = scheme.bits as usize;
    // Fields along the outputs: whole words of them, or 32 of them in as many words as they have bits.
    let along = |suffix, axis| match bits {
        2 | 4 | 8 => cut(suffix, axis, 32 / bits, 1),
        _ => cut(suffix, axis, 32, bits),
    };
    Some(match scheme.dialect {
        Dialect::AwqGemm => vec![cut("qweight", 1, 8, 1), cut("qzeros", 1, 8, 1), cut("scales", 1, 1, 1)],
        Dialect::AwqGemv => vec![cut("qweight", 0, 1, 1), cut("qzeros", 0, 1, 1), cut("scales", 0, 1, 1)],
        Dialect::AwqGemvFast => vec![cut("qweight", 0, 4, 1), cut("qzeros", 1, 1, 1), cut("scales", 1, 1, 1)],
        Dialect::TinyChat => vec![cut("qweight", 0, 4, 1), cut("scaled_zeros", 1, 1, 1), cut("scales", 1, 1, 1)],
        Dialect::PackQuantized => {
            vec![cut("weight_packed", 0, 1, 1), cut("weight_scale", 0, 1, 1), along("weight_zero_point", 0)]
        }
        Dialect::IntQuantized => {
            vec![cut("weight", 0, 1, 1), cut("weight_scale", 0, 1, 1), cut("weight_zero_point", 0, 1, 1)]
        }
        Dialect::Gptq | Dialect::GptqV2 => vec![cut("qweight", 1, 1, 1), along("qzeros", 1), cut("scales", 1, 1, 1)],
        Dialect::ModelOpt => vec![cut("weight", 0, 2, 1), cut("weight_scale", 0, 1, 1)],
        Dialect::Mlx => vec![cut("weight", 0, 1, 1), cut("scales", 0, 1, 1), cut("biases", 0, 1, 1)],
        Dialect::Gguf => vec![cut("weight", 0, 1, 1)],
        // Blocks run over the flattened matrix.
        Dialect::BitsAndBytes => return None,
    })
}

fn states(stated: &TensorView, n: usize, k: usize) -> Result<bool> {
    let bytes = stated.bytes()?;
    let found = bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b));
    Ok(stated.dtype == Dtype::I64 && found.eq([n as i64, k as i64]))
}
