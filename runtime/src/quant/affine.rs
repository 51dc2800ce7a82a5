//! Affine codes of 2 to 6 and 8 bits: what a quantizer chooses and integer dialects store.

use half::f16;

use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{DenseType, Levels, Offset, Weight, row_words};

use super::bits::pack;
use super::build::Rows;
use super::canonical::pack_params;

/// A matrix of unsigned codes with a scale and a zero point for every group of a row.
///
/// A weight is `f16((q - z) * s)`, rounded once as in [`W4Matrix`](crate::tensor::W4Matrix).
#[derive(Debug, Clone, PartialEq)]
pub struct AffineMatrix {
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Bits of a code: 2 to 6, or 8.
    pub bits: u32,
    /// Input features that share a scale; divides `k`.
    pub group_size: usize,
    /// (n, k), each below `2^bits`.
    pub codes: Vec<u8>,
    /// (n, k / group_size).
    pub scales: Vec<f16>,
    /// (n, k / group_size), each below `2^bits`.
    pub zeros: Vec<u8>,
}

impl AffineMatrix {
    /// Checks that the parts fit each other.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`].
    pub fn check(&self) -> Result<()> {
        let sizes = self.group_size != 0
            && self.k.is_multiple_of(self.group_size)
            && matches!(self.bits, 2..=6 | 8)
            && self.n.checked_mul(self.k) == Some(self.codes.len())
            && self.n.checked_mul(self.groups()) == Some(self.scales.len())
            && self.zeros.len() == self.scales.len();
        let below = |values: &[u8]| self.bits == 8 || values.iter().all(|&q| q >> self.bits == 0);
        if !sizes || !below(&self.codes) || !below(&self.zeros) || !self.scales.iter().all(|s| s.is_finite()) {
            let Self { n, k, bits, group_size, .. } = self;
            let message = format!("parts do not make {n} x {k} of {bits} bits in groups of {group_size}");
            return Err(Error::new(ErrorKind::InvalidTensor, message));
        }
        Ok(())
    }

    /// Groups of one row.
    pub fn groups(&self) -> usize {
        self.k / self.group_size
    }

    /// Whether every zero point is the middle of the range, which symmetric dialects do not store.
    pub fn is_symmetric(&self) -> bool {
        self.zeros.iter().all(|&z| u32::from(z) == 1 << (self.bits - 1))
    }

    /// Writes the weights of row `row` to `out`, `k` elements.
    ///
    /// # Panics
    /// If the row is out of range or `out` is not `k` long.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.k, "a row has k elements");
        let codes = &self.codes[row * self.k..][..self.k];
        for (g, (out, codes)) in
            out.chunks_exact_mut(self.group_size).zip(codes.chunks_exact(self.group_size)).enumerate()
        {
            let at = row * self.groups() + g;
            let (scale, zero) = (self.scales[at].to_f32(), f32::from(self.zeros[at]));
            // At most 256 values; a table saves the rounding of every element.
            let table: [f32; 16] = std::array::from_fn(|q| f16::from_f32((q as f32 - zero) * scale).to_f32());
            for (out, &q) in out.iter_mut().zip(codes) {
                *out = match table.get(usize::from(q)) {
                    Some(&w) if self.bits <= 4 => w,
                    _ => f16::from_f32((f32::from(q) - zero) * scale).to_f32(),
                };
            }
        }
    }

    /// What a backend computes with.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`] if the parts do not fit each other.
    pub fn to_weight(&self) -> Result<Weight> {
        self.check()?;
        let (n, k, bits, group_size) = (self.n, self.k, self.bits, self.group_size);
        let mut codes = Vec::with_capacity(n * row_words(k, bits));
        self.codes.chunks_exact(k).for_each(|row| pack(row.iter().copied(), bits, &mut codes));
        let params = self.scales.iter().zip(&self.zeros);
        let params = params.map(|(&s, &z)| pack_params(s, f16::from_f32(f32::from(z)))).collect();
        Rows { n, k, bits, group_size, codes }.weight(Levels::Affine(Offset::Zero, params), DenseType::F16)
    }
}
