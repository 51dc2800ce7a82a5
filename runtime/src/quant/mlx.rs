//! MLX affine quantization, 2 to 8 bits; embeddings and heads too.
//!
//! Layout after MLX's `quantize`: with N outputs, K inputs and G groups, `weight` u32 (N, K b / 32), a bit string along the
//! inputs; `scales` and `biases` (N, G) in f16, bf16 or f32; a weight is q * s + b, in
//! the arithmetic of that type: the product is rounded before the sum.

use crate::checkpoint::{Checkpoint, Dtype};
use crate::error::Result;
use crate::tensor::{Offset, Weight, row_words};

use super::build::{Rows, affine, numbers};
use super::canonical::release;
use super::{Shape, words};

pub(super) fn decode(checkpoint: &Checkpoint, prefix: &str, shape: Shape, bits: u32) -> Result<Weight> {
    let Shape { n, k, group_size, groups } = shape;
    let name = |suffix: &str| format!("{prefix}.{suffix}");
    let weight = checkpoint.get(&name("weight"))?;
    weight.expect_dtype(Dtype::U32)?;
    weight.expect_shape(&[n, row_words(k, bits)])?;
    let scales = checkpoint.require(&name("scales"), &[n, groups])?;
    let biases = checkpoint.require(&name("biases"), &[n, groups])?;
    if biases.dtype != scales.dtype {
        return Err(
            biases.error(format!("expected dtype {} as that of the scales, found {}", scales.dtype, biases.dtype))
        );
    }
    let (scale_values, rounding) = numbers(scales)?;
    let (bias_values, _) = numbers(biases)?;
    let mut codes: Vec<u32> = weight.reserve(n * row_words(k, bits))?;
    codes.extend(words(&weight.bytes()?));
    let levels = affine(Offset::RoundedBias, &scale_values, bias_values.iter().copied());
    release(&[weight, scales, biases]);
    Rows { n, k, bits, group_size, codes }.weight(levels, rounding).map_err(|error| weight.error(error.message()))
}
