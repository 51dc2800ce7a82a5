//! Tensors of GGUF files as weights: K-quants as they are, the simpler blocks repacked, all without further loss.

use half::f16;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{BlockMatrix, Bytes, DenseType, GgmlType, Levels, Offset, Weight, row_words};

use super::bits::pack;
use super::build::{Rows, affine};

/// Elements of the simpler blocks.
const BLOCK: usize = 32;

pub(super) fn decode(checkpoint: &Checkpoint, prefix: &str, (n, k): (usize, usize)) -> Result<Weight> {
    let tensor = checkpoint.get(&format!("{prefix}.weight"))?;
    let Some(ggml_type) = tensor.ggml_type() else {
        return Err(tensor.error(format!("expected a GGUF type, found {}", tensor.dtype)));
    };
    tensor.expect_blocks(n, k)?;
    let bytes = tensor.bytes()?;
    match ggml_type {
        GgmlType::Q4K | GgmlType::Q5K | GgmlType::Q6K => BlockMatrix::new(n, k, ggml_type, bytes).map(Weight::Blocks),
        _ => {
            let weight = simple(ggml_type, &bytes, n, k).map_err(|error| tensor.error(error.message()))?;
            tensor.release();
            Ok(weight)
        }
    }
}

/// Blocks of 32 codes with one or two numbers in half precision.
fn simple(ggml_type: GgmlType, bytes: &Bytes, n: usize, k: usize) -> Result<Weight> {
    let half = |block: &[u8], at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let bits = match ggml_type {
        GgmlType::Q4_0 | GgmlType::Q4_1 => 4,
        GgmlType::Q5_0 | GgmlType::Q5_1 => 5,
        _ => 8,
    };
    let has_minimum = matches!(ggml_type, GgmlType::Q4_1 | GgmlType::Q5_1);
    let header = if has_minimum { 4 } else { 2 };
    let (mut codes, mut scales, mut minima) = (Vec::with_capacity(n * row_words(k, bits)), Vec::new(), Vec::new());
    let mut q = [0u8; BLOCK];
    // Blocks of 4, 5 and 8 bits are whole words, so that rows follow each other without a gap.
    for block in bytes.chunks_exact(ggml_type.block_bytes()) {
        scales.push(half(block, 0));
        if has_minimum {
            minima.push(half(block, 2));
        }
        match bits {
            8 => q.iter_mut().zip(&block[2..]).for_each(|(q, byte)| *q = byte ^ 0x80),
            _ => {
                let (top, low) = block[header..].split_at(if bits == 5 { 4 } else { 0 });
                let top = top.iter().rev().fold(0u32, |word, &byte| word << 8 | u32::from(byte));
                for (j, byte) in low.iter().enumerate() {
                    q[j] = byte & 15 | ((top >> j & 1) << 4) as u8;
                    q[j + 16] = byte >> 4 | ((top >> (j + 16) & 1) << 4) as u8;
                }
            }
        }
        pack(q.iter().copied(), bits, &mut codes);
    }
    if let Some(i) = scales.iter().chain(&minima).position(|v: &f32| !v.is_finite()) {
        let message = format!("block {} has a number that is not finite", i % scales.len());
        return Err(Error::new(ErrorKind::InvalidTensor, message));
    }
    let levels: Levels = match has_minimum {
        true => affine(Offset::Bias, &scales, minima.iter().copied()),
        false => affine(Offset::Zero, &scales, std::iter::repeat_n((1u32 << (bits - 1)) as f32, scales.len())),
    };
    Rows { n, k, bits, group_size: BLOCK, codes }.weight(levels, DenseType::F32)
}
