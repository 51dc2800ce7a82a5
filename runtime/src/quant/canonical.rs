//! The canonical form itself: reading scales, and the exact values the packed codes stand for.

use half::{bf16, f16};

use crate::checkpoint::{Dtype, TensorView};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{Offset, W4Matrix};

impl W4Matrix {
    /// A matrix from its parts; see the fields for shapes.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`] if the parts do not fit each other.
    pub fn new(
        (n, k): (usize, usize),
        group_size: usize,
        qweight: Vec<u32>,
        group_params: Vec<u32>,
        offset: Offset,
    ) -> Result<Self> {
        let fits = group_size != 0
            && group_size.is_multiple_of(8)
            && k % group_size == 0
            && n.checked_mul(k / 8) == Some(qweight.len())
            && n.checked_mul(k / group_size) == Some(group_params.len());
        if !fits {
            let (words, params) = (qweight.len(), group_params.len());
            let message = format!("{words} words and {params} groups do not make {n} x {k} in groups of {group_size}");
            return Err(Error::new(ErrorKind::InvalidTensor, message));
        }
        Ok(Self { n, k, group_size, qweight, group_params, offset })
    }

    /// Scale and offset of group `group` of row `row`.
    ///
    /// # Panics
    /// If the row or group is out of range.
    pub fn group(&self, row: usize, group: usize) -> (f16, f16) {
        assert!(group < self.groups(), "group out of range");
        unpack_params(self.group_params[row * self.groups() + group])
    }

    /// The code (0 to 15) of input feature `col` of row `row`.
    ///
    /// # Panics
    /// If the row or column is out of range.
    pub fn code(&self, row: usize, col: usize) -> u8 {
        assert!(col < self.k, "column out of range");
        (self.qweight[row * (self.k / 8) + col / 8] >> (4 * (col % 8)) & 15) as u8
    }

    /// Writes the weights of row `row` to `out`, k elements, each exactly the half-precision value of the peer.
    ///
    /// # Panics
    /// If the row is out of range or `out` is not `k` long.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.k, "a row has k elements");
        let words = &self.qweight[row * (self.k / 8)..][..self.k / 8];
        let params = &self.group_params[row * self.groups()..][..self.groups()];
        for ((out, words), &params) in
            out.chunks_exact_mut(self.group_size).zip(words.chunks_exact(self.group_size / 8)).zip(params)
        {
            let table = self.offset.weights(params);
            for (out, &word) in out.chunks_exact_mut(8).zip(words) {
                for (t, out) in out.iter_mut().enumerate() {
                    *out = table[(word >> (4 * t) & 15) as usize];
                }
            }
        }
    }

    /// The sixteen weights that the codes of group `group` of row `row` can stand for.
    ///
    /// # Panics
    /// If the row or group is out of range.
    pub fn group_table(&self, row: usize, group: usize) -> [f32; 16] {
        assert!(group < self.groups(), "group out of range");
        self.offset.weights(self.group_params[row * self.groups() + group])
    }
}

/// Scale and offset as one word of [`W4Matrix::group_params`].
pub(crate) fn pack_params(scale: f16, offset: f16) -> u32 {
    u32::from(scale.to_bits()) | u32::from(offset.to_bits()) << 16
}

fn unpack_params(word: u32) -> (f16, f16) {
    (f16::from_bits(word as u16), f16::from_bits((word >> 16) as u16))
}

/// Reads scales, F16 or BF16, as finite f16 values in file order.
///
/// # Errors
/// [`ErrorKind::InvalidTensor`] for other types and for what half precision does not hold exactly.
pub(crate) fn read_f16(tensor: &TensorView) -> Result<Vec<f16>> {
    let bytes = tensor.bytes()?;
    let pairs = bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    let mut values: Vec<f16> = tensor.reserve(pairs.len())?;
    let exactly = |v: bf16| f16::from_f32(v.to_f32()).to_f32() == v.to_f32();
    match tensor.dtype {
        Dtype::F16 => values.extend(pairs.map(f16::from_le_bytes)),
        Dtype::BF16 => {
            if let Some(v) = pairs.clone().map(bf16::from_le_bytes).find(|v| !exactly(*v)) {
                return Err(tensor.error(format!("expected numbers of half precision, found {v}")));
            }
            values.extend(pairs.map(|b| f16::from_f32(bf16::from_le_bytes(b).to_f32())));
        }
        other => return Err(tensor.error(format!("expected dtype F16 or BF16, found {other}"))),
    }
    match values.iter().position(|v| !v.is_finite()) {
        Some(i) => Err(tensor.error(format!("expected finite numbers, found {} at element {i}", values[i]))),
        None => Ok(values),
    }
}

/// Gives the pages of packed tensors back once they have been repacked.
pub(crate) fn release(tensors: &[&TensorView]) {
    tensors.iter().for_each(|tensor| tensor.release());
}
