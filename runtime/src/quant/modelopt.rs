//! NVIDIA ModelOpt `W4A16_AWQ`: symmetric 4-bit weights, some with a factor for each input.
//!
//! Layout after ModelOpt's `torch/export`: with N outputs, K inputs and G groups, `weight` u8 (N / 2, K), the codes of outputs
//! 2r (low nibble) and 2r + 1 in a byte, in two's complement; `weight_scale` (N, G); `pre_quant_scale` (K) where it could
//! not be folded into a layer before: y = W (x * pre_quant_scale).

use crate::checkpoint::{Checkpoint, Dtype};
use crate::error::Result;
use crate::tensor::{Offset, row_words};

use super::bits::pack;
use super::build::{Rows, affine, numbers};
use super::canonical::release;
use super::{InputTransform, LinearWeight, Shape};

/// The factors of the inputs, if there are any.
pub(super) fn factors(checkpoint: &Checkpoint, prefix: &str, k: usize) -> Result<Option<Vec<f32>>> {
    let Some(tensor) = checkpoint.tensor(&format!("{prefix}.pre_quant_scale")) else { return Ok(None) };
    tensor.expect_shape(&[k])?;
    Ok(Some(numbers(tensor)?.0))
}

pub(super) fn decode(checkpoint: &Checkpoint, prefix: &str, shape: Shape) -> Result<LinearWeight> {
    let Shape { n, k, group_size, groups } = shape;
    let name = |suffix: &str| format!("{prefix}.{suffix}");
    let weight = checkpoint.get(&name("weight"))?;
    weight.expect_dtype(Dtype::U8)?;
    weight.expect_shape(&[n.div_ceil(2), k])?;
    if n % 2 != 0 {
        return Err(weight.error(format!("expected output features in pairs, found {n}")));
    }
    let scales = checkpoint.get(&name("weight_scale"))?;
    // One group a row may be stored without its dimension.
    if !(scales.shape == [n, groups] || groups == 1 && scales.shape == [n]) {
        return Err(scales.error(format!("expected shape [{n}, {groups}], found {:?}", scales.shape)));
    }
    let (values, rounding) = numbers(scales)?;
    let factors = factors(checkpoint, prefix, k)?;
    let mut codes = weight.reserve(n * row_words(k, 4))?;
    for pair in weight.bytes()?.chunks_exact(k) {
        // Two's complement to the distance from -8.
        pack(pair.iter().map(|q| (q & 15) ^ 8), 4, &mut codes);
        pack(pair.iter().map(|q| (q >> 4) ^ 8), 4, &mut codes);
    }
    let levels = affine(Offset::Zero, &values, std::iter::repeat_n(8.0, values.len()));
    release(&[weight, scales]);
    let weight = Rows { n, k, bits: 4, group_size, codes }.weight(levels, rounding)?;
    Ok(LinearWeight { weight, input: InputTransform { order: None, factors } })
}
