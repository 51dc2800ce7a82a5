//! compressed-tensors `pack-quantized`, 4 bits, symmetric and asymmetric, by group and by channel.
//!
//! Layout after compressed-tensors' `compressors/pack_quantized`, with N output and K input features, G groups of a
//! row: `weight_packed` i32 (N, K/8), nibble t of word c is feature 8c + t; `weight_scale` f16 or bf16 (N, G);
//! `weight_zero_point` i32 (ceil(N/8), G), nibble t of row r belongs to output feature 8r + t (asymmetric only);
//! `weight_shape` i64 (2) = (N, K). Values are signed and stored plus 8, zero points too, so the offsets cancel and a
//! symmetric weight has the zero point 8.

use half::f16;

use crate::checkpoint::{Checkpoint, Dtype};
use crate::error::Result;
use crate::tensor::{Offset, W4Matrix};

use super::canonical::{pack_params, read_f16, release};
use super::{Shape, words};

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
        let bytes = stated.bytes.chunks_exact(8).map(|b| <[u8; 8]>::try_from(b).map_or(0, i64::from_le_bytes));
        let found: Vec<i64> = bytes.collect();
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
        (true, Some(stored)) if stored.dtype == Dtype::I8 && stored.bytes.iter().all(|&z| z == 0) => None,
        (true, Some(stored)) => return Err(stored.error("expected no zero points, the configuration says symmetric")),
        (false, _) => {
            let stored = checkpoint.get(&name("weight_zero_point"))?;
            stored.expect_dtype(Dtype::I32)?;
            stored.expect_shape(&[n.div_ceil(8), groups])?;
            let mut zeros = stored.reserve(stored.bytes.len() / 4)?;
            zeros.extend(words(&stored.bytes));
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
    codes.extend(words(&packed.bytes));
    release(&[packed, scales]);
    W4Matrix::new((n, k), group_size, codes, group_params, Offset::Zero)
}
