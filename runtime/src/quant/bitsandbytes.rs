//! bitsandbytes 4-bit weights: NF4 and FP4, also with quantized absmax ("double quant").
//!
//! Layout after bitsandbytes' `functional.py`: the tensor keeps its name P and has N * K / 2 bytes, element 2i of the
//! flattened matrix in the high nibble of byte i; `P.quant_map` f32 (16); `P.absmax` f32, one for each block of
//! consecutive elements, or with double quant u8 indices into `P.nested_quant_map` f32 (256), times
//! `P.nested_absmax` f32 of a block of them, plus an offset; `P.quant_state.bitsandbytes__nf4` (or `fp4`) the bytes of a
//! JSON object with block sizes, offset, shape and the type that weights are rounded to.

use serde_json::Value;

use crate::checkpoint::{Checkpoint, Dtype, TensorView};
use crate::error::Result;
use crate::tensor::{DenseType, Levels, LevelsForm, Weight, WeightShape, row_words};

use super::bits::pack;
use super::build::{Rows, numbers};
use super::canonical::release;

/// Largest JSON object beside a weight, bytes.
const MAX_STATE: usize = 1 << 16;
/// Block sizes that bitsandbytes has kernels for are within.
const MAX_BLOCK: u64 = 1 << 20;

/// The tensor that describes how the module is packed, if it is.
pub(super) fn state<'a>(checkpoint: &'a Checkpoint, prefix: &str) -> Option<&'a TensorView> {
    ["nf4", "fp4"].iter().find_map(|t| checkpoint.tensor(&format!("{prefix}.weight.quant_state.bitsandbytes__{t}")))
}

/// What the JSON object says.
struct State {
    block: usize,
    dtype: DenseType,
    shape: Vec<u64>,
    nested_block: Option<usize>,
    nested_offset: f32,
}

fn read_state(tensor: &TensorView) -> Result<State> {
    tensor.expect_dtype(Dtype::U8)?;
    if tensor.byte_len() > MAX_STATE {
        return Err(tensor.error(format!("{} bytes of quantization state", tensor.byte_len())));
    }
    let json: Value =
        serde_json::from_slice(&tensor.bytes()?).map_err(|error| tensor.error(format!("not valid JSON: {error}")))?;
    let wrong = |key: &str| tensor.error(format!("`{key}` is missing or out of range in the quantization state"));
    let size = |key: &str| match json.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            let size = value.as_u64().filter(|size| (2..=MAX_BLOCK).contains(size) && size.is_power_of_two());
            size.map(|size| Some(size as usize)).ok_or_else(|| wrong(key))
        }
    };
    let kind = json.get("quant_type").and_then(Value::as_str).unwrap_or_default();
    if kind.is_empty() || !tensor.name.ends_with(&format!("bitsandbytes__{kind}")) {
        return Err(wrong("quant_type"));
    }
    let dtype = match json.get("dtype").and_then(Value::as_str) {
        Some("float16") => DenseType::F16,
        Some("bfloat16") => DenseType::BF16,
        Some("float32") => DenseType::F32,
        _ => return Err(wrong("dtype")),
    };
    let shape = json.get("shape").and_then(Value::as_array).ok_or_else(|| wrong("shape"))?;
    let nested_block = size("nested_blocksize")?;
    let nested_offset = json.get("nested_offset").and_then(Value::as_f64);
    if nested_block.is_some() && nested_offset.is_none_or(|offset| !(offset as f32).is_finite()) {
        return Err(wrong("nested_offset"));
    }
    Ok(State {
        block: size("blocksize")?.ok_or_else(|| wrong("blocksize"))?,
        dtype,
        shape: shape.iter().map(|dim| dim.as_u64().unwrap_or(0)).collect(),
        nested_block,
        nested_offset: nested_offset.unwrap_or(0.0) as f32,
    })
}

/// The form of the module's weights.
pub(super) fn shape(checkpoint: &Checkpoint, prefix: &str, (n, k): (usize, usize)) -> Result<WeightShape> {
    let weight = checkpoint.get(&format!("{prefix}.weight"))?;
    let Some(described) = state(checkpoint, prefix) else {
        return Err(weight.error("its quantization state is missing"));
    };
    let State { block, dtype: rounding, .. } = read_state(described)?;
    let group_size = gcd(k, block);
    Ok(match group_size.is_multiple_of(8) || group_size >= k {
        true => WeightShape::Packed { n, k, bits: 4, group_size, levels: LevelsForm::Codebook, rounding },
        false => WeightShape::Dense { n, k, dtype: rounding },
    })
}

/// Output and input features of the module, if its description says them.
pub(super) fn stored_shape(checkpoint: &Checkpoint, prefix: &str) -> Option<(usize, usize)> {
    match read_state(state(checkpoint, prefix)?).ok()?.shape[..] {
        [n, k] => Some((usize::try_from(n).ok()?, usize::try_from(k).ok()?)),
        _ => None,
    }
}

pub(super) fn decode(checkpoint: &Checkpoint, prefix: &str, (n, k): (usize, usize)) -> Result<Weight> {
    let name = |suffix: &str| format!("{prefix}.weight{suffix}");
    let weight = checkpoint.get(&name(""))?;
    let Some(described) = state(checkpoint, prefix) else {
        return Err(weight.error(format!("`{}` is missing", name(".quant_state.bitsandbytes__nf4"))));
    };
    let state = read_state(described)?;
    if state.shape != [n as u64, k as u64] {
        return Err(described.error(format!("expected shape [{n}, {k}], found {:?}", state.shape)));
    }
    let elements = n * k;
    if weight.byte_len() != elements.div_ceil(2) {
        return Err(weight.error(format!("expected {} bytes, found {}", elements.div_ceil(2), weight.byte_len())));
    }
    let map = checkpoint.require(&name(".quant_map"), &[16])?;
    map.expect_dtype(Dtype::F32)?;
    let table: [f32; 16] = numbers(map)?.0.try_into().map_err(|_| map.error("expected 16 numbers"))?;
    check_table(map, described, &table)?;
    let absmax = absmax(checkpoint, &name, &state, elements.div_ceil(state.block))?;

    // Blocks run over the flattened matrix. Where rows are not whole blocks, the largest piece that never crosses a block
    // or a row takes the place of the block.
    let group_size = gcd(k, state.block);
    let per_block = state.block / group_size;
    let levels = (0..elements / group_size).map(|piece| absmax[piece / per_block]).collect();

    let bytes = weight.bytes()?;
    let code = |i: usize| bytes[i / 2] >> (4 * (1 - i % 2)) & 15;
    let mut codes = weight.reserve(n * row_words(k, 4))?;
    if k % 8 == 0 {
        codes.extend(super::words(&bytes).map(|word| (word & 0x0f0f_0f0f) << 4 | (word >> 4) & 0x0f0f_0f0f));
    } else {
        (0..n).for_each(|row| pack((row * k..(row + 1) * k).map(code), 4, &mut codes));
    }
    release(&[weight]);
    let rows = Rows { n, k, bits: 4, group_size, codes };
    rows.weight(Levels::Codebook(Box::new(table), levels), state.dtype).map_err(|error| weight.error(error.message()))
}

/// The factor of every block.
fn absmax(checkpoint: &Checkpoint, name: &dyn Fn(&str) -> String, state: &State, blocks: usize) -> Result<Vec<f32>> {
    let stored = checkpoint.get(&name(".absmax"))?;
    // Some versions keep a second dimension of 1.
    if stored.shape.iter().product::<usize>() != blocks {
        return Err(stored.error(format!("expected {blocks} factors, found shape {:?}", stored.shape)));
    }
    let Some(block) = state.nested_block else {
        stored.expect_dtype(Dtype::F32)?;
        return Ok(numbers(stored)?.0);
    };
    stored.expect_dtype(Dtype::U8)?;
    let nested = checkpoint.get(&name(".nested_absmax"))?;
    nested.expect_dtype(Dtype::F32)?;
    if nested.shape.iter().product::<usize>() != blocks.div_ceil(block) {
        let expected = blocks.div_ceil(block);
        return Err(nested.error(format!("expected {expected} factors, found shape {:?}", nested.shape)));
    }
    let map = checkpoint.require(&name(".nested_quant_map"), &[256])?;
    map.expect_dtype(Dtype::F32)?;
    let (nested, _) = numbers(nested)?;
    let (map, _) = numbers(map)?;
    let bytes = stored.bytes()?;
    Ok(bytes.iter().enumerate().map(|(i, &q)| map[usize::from(q)] * nested[i / block] + state.nested_offset).collect())
}

/// Checks that the table is that of its kind: it is stored beside every weight, and always the same.
fn check_table(map: &TensorView, state: &TensorView, table: &[f32; 16]) -> Result<()> {
    let expected = if state.name.ends_with("nf4") { &NF4 } else { &FP4 };
    match table.iter().zip(expected).position(|(found, expected)| (found - expected).abs() > 1e-6) {
        None => Ok(()),
        Some(i) => Err(map.error(format!("expected {} at element {i}, found {}", expected[i], table[i]))),
    }
}

/// Quantiles of a normal distribution, from QLoRA (Dettmers et al., 2023).
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Floating-point numbers of 4 bits by their bits, over the largest one.
const FP4: [f32; 16] = [
    0.0,
    0.005_208_333_5,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    0.0,
    -0.005_208_333_5,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];

fn gcd(mut a: usize, mut b: usize) -> usize {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}
