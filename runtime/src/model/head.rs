//! The output head in fewer bits: rounded to 4-bit planes while its rows are loaded, which every backend multiplies with
//! the kernels that it has for packed matrices.

use half::f16;

use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{DenseMatrix, Offset, W4Matrix, Weight, WeightShape};

/// Bits of the weights of an output head that is stored in half or single precision. Packed ones stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HeadBits {
    /// As stored.
    #[default]
    Sixteen,
    /// 8 bits, to nearest, with a scale of half precision for every 128, 64 or 32 inputs.
    Eight,
    /// 4 bits, to nearest, with a scale and a zero point for every 64 or 32 inputs.
    Four,
}

/// Codes of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plane {
    /// All of them.
    Only,
    /// The high halves of codes of 8 bits; the product with the low halves is added to theirs.
    High,
    /// The low halves.
    Low,
}

impl HeadBits {
    /// The planes of a matrix with `k` inputs, and the inputs of a group; `None` to leave it as it is, also where no
    /// group divides its inputs.
    pub(super) fn planes(self, k: usize) -> Option<(&'static [Plane], usize)> {
        let (planes, groups): (&[Plane], &[usize]) = match self {
            Self::Sixteen => return None,
            Self::Eight => (&[Plane::High, Plane::Low], &[128, 64, 32]),
            Self::Four => (&[Plane::Only], &[64, 32]),
        };
        groups.iter().find(|&&group| k.is_multiple_of(group)).map(|&group| (planes, group))
    }
}

/// The shape of a plane of an (n, k) matrix.
pub(super) fn shape(n: usize, k: usize, group_size: usize) -> WeightShape {
    WeightShape::W4 { n, k, group_size, offset: Offset::Zero }
}

/// Rows of a plane, rounded from dense ones.
///
/// # Errors
/// [`ErrorKind::InvalidTensor`] for rows of another form, and for weights that are no numbers.
pub(super) fn round(rows: Weight, plane: Plane, group_size: usize) -> Result<Weight> {
    let Weight::Dense(rows) = rows else {
        return Err(Error::new(ErrorKind::InvalidTensor, "the head is not dense"));
    };
    let DenseMatrix { n, k, dtype, .. } = rows;
    let groups = k / group_size;
    let mut matrix = W4Matrix {
        n,
        k,
        group_size,
        qweight: Vec::with_capacity(n * k / 8),
        group_params: Vec::with_capacity(n * groups),
        offset: Offset::Zero,
    };
    let mut values = vec![0.0; k];
    for row in rows.bytes.chunks_exact(rows.row_bytes()) {
        dtype.widen(row, &mut values);
        for group in values.chunks_exact(group_size) {
            let (scale, zero, codes) = match plane {
                Plane::Only => affine(group)?,
                Plane::High | Plane::Low => symmetric(group, plane)?,
            };
            let zero = u32::from(f16::from_f32(zero).to_bits());
            matrix.group_params.push(u32::from(scale.to_bits()) | zero << 16);
            for codes in codes[..group_size].as_chunks::<8>().0 {
                let word = codes.iter().enumerate().fold(0, |word, (i, code)| word | u32::from(*code) << (4 * i));
                matrix.qweight.push(word);
            }
        }
    }
    Ok(Weight::W4(matrix))
}

/// Most inputs of a group.
const MOST: usize = 128;

fn no_numbers() -> Error {
    Error::new(ErrorKind::InvalidTensor, "the head has weights that are no finite numbers of half precision")
}

/// Scale, zero point and codes from the smallest weight to the largest.
fn affine(group: &[f32]) -> Result<(f16, f32, [u8; MOST])> {
    let (low, high) = group.iter().fold((0.0f32, 0.0f32), |(low, high), &w| (low.min(w), high.max(w)));
    let scale = f16::from_f32((high - low) / 15.0);
    if !scale.is_finite() || group.iter().any(|w| !w.is_finite()) {
        return Err(no_numbers());
    }
    let mut codes = [0; MOST];
    let inverse = if scale.to_f32() > 0.0 { 1.0 / scale.to_f32() } else { 0.0 };
    let zero = (-low * inverse).round().clamp(0.0, 15.0);
    for (code, w) in codes.iter_mut().zip(group) {
        *code = ((w * inverse).round() + zero).clamp(0.0, 15.0) as u8;
    }
    Ok((scale, zero, codes))
}

/// Scale, zero point and codes of a plane of q in -128..=127, where q + 128 is 16 times the high code and the low one:
/// q s = (high - 8) 16 s + low s, without a rounding in between.
fn symmetric(group: &[f32], plane: Plane) -> Result<(f16, f32, [u8; MOST])> {
    let largest = group.iter().fold(0.0f32, |largest, w| largest.max(w.abs()));
    let scale = f16::from_f32(largest / 127.0);
    let sixteen = f16::from_f32(scale.to_f32() * 16.0);
    if !sixteen.is_finite() || group.iter().any(|w| !w.is_finite()) {
        return Err(no_numbers());
    }
    let mut codes = [0; MOST];
    let inverse = if scale.to_f32() > 0.0 { 1.0 / scale.to_f32() } else { 0.0 };
    for (code, w) in codes.iter_mut().zip(group) {
        let q = ((w * inverse).round().clamp(-128.0, 127.0) + 128.0) as u8;
        *code = if plane == Plane::High { q >> 4 } else { q & 15 };
    }
    Ok(if plane == Plane::High { (sixteen, 8.0, codes) } else { (scale, 0.0, codes) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{Bytes, DenseType};

    fn dense(k: usize, values: &[f32]) -> Weight {
        let bytes = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        Weight::Dense(DenseMatrix::new(values.len() / k, k, DenseType::F16, Bytes::owned(bytes)).unwrap())
    }

    fn values(n: usize, scale: f32) -> Vec<f32> {
        let mut seed = 9u64;
        let mut next = || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..n).map(|_| f16::from_f32(next() * scale).to_f32()).collect()
    }

    fn dequantised(planes: &[Weight], n: usize, k: usize) -> Vec<f32> {
        let mut sum = vec![0.0; n * k];
        for plane in planes {
            let Weight::W4(plane) = plane else { panic!("a plane is packed") };
            let mut row = vec![0.0; k];
            for (i, sum) in sum.chunks_exact_mut(k).enumerate() {
                plane.dequantize_row(i, &mut row);
                sum.iter_mut().zip(&row).for_each(|(sum, v)| *sum += v);
            }
        }
        sum
    }

    #[test]
    fn weights_are_within_half_a_step() {
        for (bits, k, steps) in
            [(HeadBits::Eight, 256, 127.0), (HeadBits::Eight, 96, 127.0), (HeadBits::Four, 192, 7.5)]
        {
            let (planes, group) = bits.planes(k).unwrap();
            for scale in [0.02, 3.0, 1e-4] {
                let mut original = values(5 * k, scale);
                original[..group].fill(0.0);
                original[group] = 8.0 * scale;
                let rounded: Vec<Weight> =
                    planes.iter().map(|plane| round(dense(k, &original), *plane, group).unwrap()).collect();
                assert!(rounded.iter().all(|plane| plane.shape() == shape(5, k, group)));
                let found = dequantised(&rounded, 5, k);
                for (found, original) in found.chunks(group).zip(original.chunks(group)) {
                    let largest = original.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                    // A scale is a number of half precision, which has little to say of the smallest ones, and
                    // `dequantize_row` rounds each plane to half precision, which kernels do not.
                    let allowed = 0.5 * largest / steps * 1.001 + largest / 1024.0 + 127.0 * 3e-8;
                    for (f, o) in found.iter().zip(original) {
                        assert!((f - o).abs() <= allowed, "{bits:?} {f} instead of {o}, largest {largest}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_can_not_be_rounded_is_left_or_refused() {
        assert_eq!(HeadBits::Sixteen.planes(128), None);
        assert_eq!(HeadBits::Eight.planes(100), None);
        assert_eq!(HeadBits::Four.planes(96).map(|(planes, group)| (planes.len(), group)), Some((1, 32)));
        for bad in [f32::NAN, f32::INFINITY] {
            let mut values = vec![0.5; 32];
            values[7] = bad;
            for plane in [Plane::Only, Plane::High, Plane::Low] {
                assert_eq!(round(dense(32, &values), plane, 32).unwrap_err().kind(), ErrorKind::InvalidTensor);
            }
        }
        assert!(round(Weight::Vector(vec![1.0]), Plane::Only, 32).is_err());
    }
}
