//! Matrices of integer codes that are not in the canonical 4-bit form: other widths, other scales, codebooks.

use half::{bf16, f16};

use super::{DenseType, Offset};
use crate::error::{Error, ErrorKind, Result};

/// A matrix of codes in rows of whole words, with a few numbers for each group of a row.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedMatrix {
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Bits of a code: 2, 3, 4, 5, 6 or 8.
    pub bits: u32,
    /// Input features that share what [`Self::levels`] holds for a group: a multiple of 8, or at least `k`. The last
    /// group of a row may be shorter.
    pub group_size: usize,
    /// (n, [`Self::row_words`]): the code of input feature i is at bit `i * bits` of its row and may straddle two words.
    pub codes: Vec<u32>,
    /// What the codes stand for.
    pub levels: Levels,
    /// What weights are rounded to, because the software that defines the format multiplies with such weights, whatever
    /// the levels say of it; f32 is not rounded.
    pub rounding: DenseType,
}

/// What the codes of a [`PackedMatrix`] stand for; vectors are (n, groups).
#[derive(Debug, Clone, PartialEq)]
pub enum Levels {
    /// w = (q - o) * s or q * s + o in half precision numbers: f16 scale `s` in the low half, f16 offset `o` in the
    /// high half.
    Affine(Offset, Vec<u32>),
    /// The same in single precision: `[s, o]`.
    AffineWide(Offset, Vec<[f32; 2]>),
    /// w = table\[q\] * absmax, codes of 4 bits.
    Codebook(Box<[f32; 16]>, Vec<f32>),
}

impl PackedMatrix {
    /// Checks that the parts fit each other.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`].
    pub fn check(&self) -> Result<()> {
        let Self { n, k, bits, group_size, .. } = *self;
        let sizes = n != 0
            && k != 0
            && group_size != 0
            && (group_size.is_multiple_of(8) || group_size >= k)
            && matches!(bits, 2 | 3 | 4 | 5 | 6 | 8)
            && n.checked_mul(self.row_words()) == Some(self.codes.len())
            && n.checked_mul(self.groups()) == Some(self.levels.len())
            && (bits == 4 || !matches!(self.levels, Levels::Codebook(..)));
        if !sizes {
            let message = format!("parts do not make {n} x {k} of {bits} bits in groups of {group_size}");
            return Err(Error::new(ErrorKind::InvalidTensor, message));
        }
        Ok(())
    }

    /// Groups of one row.
    pub fn groups(&self) -> usize {
        self.k.div_ceil(self.group_size)
    }

    /// Words of one row.
    pub fn row_words(&self) -> usize {
        row_words(self.k, self.bits)
    }

    /// Makes room for `rows` more rows.
    ///
    /// # Errors
    /// If there is none.
    pub fn reserve(&mut self, rows: usize) -> Result<(), std::collections::TryReserveError> {
        let (words, groups) = (self.row_words(), self.groups());
        self.codes.try_reserve_exact(rows * words)?;
        match &mut self.levels {
            Levels::Affine(_, params) => params.try_reserve_exact(rows * groups),
            Levels::AffineWide(_, params) => params.try_reserve_exact(rows * groups),
            Levels::Codebook(_, absmax) => absmax.try_reserve_exact(rows * groups),
        }
    }

    /// The code of input feature `col` of row `row`.
    ///
    /// # Panics
    /// If the row or column is out of range.
    pub fn code(&self, row: usize, col: usize) -> u8 {
        assert!(col < self.k, "column out of range");
        let mut code = [0];
        unpack(&self.codes[row * self.row_words()..][..self.row_words()], self.bits, col, &mut code);
        code[0]
    }

    /// Writes the weights of row `row` from input `k0` on to `out`, rounded as they are defined.
    ///
    /// # Panics
    /// If the row or columns are out of range.
    pub fn expand(&self, row: usize, k0: usize, out: &mut [f32]) {
        assert!(k0 + out.len() <= self.k, "columns out of range");
        let words = &self.codes[row * self.row_words()..][..self.row_words()];
        let (mut at, end) = (k0, k0 + out.len());
        let mut codes = [0u8; 256];
        while at < end {
            let group = at / self.group_size;
            // Pieces of a group that the code buffer holds.
            let stop = end.min((group + 1).saturating_mul(self.group_size)).min(at + codes.len());
            let codes = &mut codes[..stop - at];
            unpack(words, self.bits, at, codes);
            self.decode(row * self.groups() + group, codes, &mut out[at - k0..stop - k0]);
            at = stop;
        }
    }

    /// The weights that codes of group number `group` of the whole matrix stand for.
    fn decode(&self, group: usize, codes: &[u8], out: &mut [f32]) {
        // A table saves the arithmetic and the rounding of every element where a group is longer than it.
        let fill = |out: &mut [f32], value: &dyn Fn(u8) -> f32| {
            if self.bits <= 4 && codes.len() > 16 {
                let table: [f32; 16] = std::array::from_fn(|q| value(q as u8));
                out.iter_mut().zip(codes).for_each(|(out, &q)| *out = table[usize::from(q & 15)]);
            } else {
                out.iter_mut().zip(codes).for_each(|(out, &q)| *out = value(q));
            }
        };
        match &self.levels {
            Levels::Affine(offset, params) => {
                let s = f16::from_bits(params[group] as u16).to_f32();
                let o = f16::from_bits((params[group] >> 16) as u16).to_f32();
                fill(out, &|q| offset.weight(q, s, o, self.rounding));
            }
            Levels::AffineWide(offset, params) => {
                let [s, o] = params[group];
                fill(out, &|q| offset.weight(q, s, o, self.rounding));
            }
            Levels::Codebook(table, absmax) => {
                let absmax = absmax[group];
                fill(out, &|q| round(self.rounding, table[usize::from(q & 15)] * absmax));
            }
        }
    }
}

impl Levels {
    /// Groups it describes.
    pub fn len(&self) -> usize {
        match self {
            Self::Affine(_, params) => params.len(),
            Self::AffineWide(_, params) => params.len(),
            Self::Codebook(_, absmax) => absmax.len(),
        }
    }

    /// Whether it describes none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Words that a row of `k` codes of `bits` bits fills.
pub fn row_words(k: usize, bits: u32) -> usize {
    (k * bits as usize).div_ceil(32)
}

/// The codes of a row from input `first` on.
fn unpack(words: &[u32], bits: u32, first: usize, out: &mut [u8]) {
    let mask = (1u32 << bits) - 1;
    let mut bit = first * bits as usize;
    for out in out {
        let (word, shift) = (bit / 32, bit % 32);
        let mut code = words[word] >> shift;
        if shift + bits as usize > 32 {
            code |= words[word + 1] << (32 - shift);
        }
        *out = (code & mask) as u8;
        bit += bits as usize;
    }
}

/// `value` in the precision of `dtype`.
pub fn round(dtype: DenseType, value: f32) -> f32 {
    match dtype {
        DenseType::F16 => f16::from_f32(value).to_f32(),
        DenseType::BF16 => bf16::from_f32(value).to_f32(),
        DenseType::F32 => value,
    }
}
