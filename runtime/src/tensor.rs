//! Element types, shared byte ranges and the host form of weights.

use std::ops::{Deref, Range};
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;

use crate::error::{Error, ErrorKind, Result};

mod ggml;
mod packed;
mod weight;

pub use ggml::{BlockMatrix, GgmlType, dequantize_row};
pub use packed::{Levels, PackedMatrix, round, row_words};
pub use weight::{LevelsForm, Weight, WeightShape};

/// Element type of a dense matrix that backends compute with directly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DenseType {
    /// IEEE half precision, 2 bytes.
    F16,
    /// bfloat16, 2 bytes.
    BF16,
    /// IEEE single precision, 4 bytes.
    F32,
}

impl DenseType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
        }
    }

    /// Widens little-endian elements to f32, as many as both slices hold.
    pub fn widen(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F16 => {
                for (out, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = f16::from_le_bytes(*b).to_f32();
                }
            }
            Self::BF16 => {
                for (out, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = bf16::from_le_bytes(*b).to_f32();
                }
            }
            Self::F32 => {
                for (out, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = f32::from_le_bytes(*b);
                }
            }
        }
    }

    /// Lower-case name as in `config.json` (`float16`, `bfloat16`, `float32`).
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
            Self::F32 => "float32",
        }
    }
}

/// A range of bytes in a mapped file, an owned allocation or somebody's memory; cloning shares the storage.
#[derive(Clone)]
pub struct Bytes {
    storage: Storage,
    range: Range<usize>,
}

#[derive(Clone)]
enum Storage {
    Mapped(Arc<Mmap>),
    Owned(Arc<Vec<u8>>),
    Shared(Arc<dyn AsRef<[u8]> + Send + Sync>),
}

impl Bytes {
    /// The bytes `range` of a mapped file, or `None` if the file is shorter.
    pub fn mapped(map: Arc<Mmap>, range: Range<usize>) -> Option<Self> {
        (range.start <= range.end && range.end <= map.len()).then_some(Self { storage: Storage::Mapped(map), range })
    }

    /// An owned allocation as a whole.
    pub fn owned(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { storage: Storage::Owned(Arc::new(bytes)), range }
    }

    /// The whole of somebody's memory, which stays where and as it is while `owner` lives.
    pub fn shared(owner: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Self {
        let range = 0..(*owner).as_ref().len();
        Self { storage: Storage::Shared(owner), range }
    }

    /// The sub-range `range`, relative to this one, or `None` if it leaves it.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.range.len() {
            return None;
        }
        let start = self.range.start + range.start;
        Some(Self { storage: self.storage.clone(), range: start..start + range.len() })
    }

    /// Tells the system that mapped pages of this range will not be read soon, so that they stop counting as
    /// resident; reading them again stays valid and brings them back from the file. Other bytes are untouched.
    pub fn release(&self) {
        #[cfg(unix)]
        if let Storage::Mapped(map) = &self.storage {
            // Whole pages inside the range only: the neighbours' bytes may be in use.
            const PAGE: usize = 4096;
            let start = self.range.start.next_multiple_of(PAGE);
            let end = self.range.end / PAGE * PAGE;
            if start < end {
                // SAFETY: the mapping is read-only and backed by a file, so dropped pages are re-read from that
                // file on the next access; no byte of it was ever written through this process.
                let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
            }
        }
    }

    /// Tells the system that mapped pages of this range will be read soon, so that it fetches them meanwhile.
    pub fn prefetch(&self) {
        #[cfg(unix)]
        if let Storage::Mapped(map) = &self.storage {
            let _ = map.advise_range(memmap2::Advice::WillNeed, self.range.start, self.range.len());
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let all: &[u8] = match &self.storage {
            Storage::Mapped(map) => map,
            Storage::Owned(bytes) => bytes,
            Storage::Shared(owner) => (**owner).as_ref(),
        };
        &all[self.range.clone()]
    }
}

impl PartialEq for Bytes {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bytes({} bytes)", self.range.len())
    }
}

/// A dense matrix in the precision of its file.
#[derive(Debug, Clone, PartialEq)]
pub struct DenseMatrix {
    /// Rows: output features, or vocabulary entries of an embedding.
    pub n: usize,
    /// Columns: input features, or the width of an embedding.
    pub k: usize,
    /// Element type of `bytes`.
    pub dtype: DenseType,
    /// (n, k), row-major, little-endian; no alignment is promised.
    pub bytes: Bytes,
}

impl DenseMatrix {
    /// A matrix over `bytes`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`] if the byte length is not `n * k` elements.
    pub fn new(n: usize, k: usize, dtype: DenseType, bytes: Bytes) -> Result<Self> {
        let expected = n.checked_mul(k).and_then(|e| e.checked_mul(dtype.size()));
        if expected != Some(bytes.len()) {
            return Err(Error::new(
                ErrorKind::InvalidTensor,
                format!("expected {n} x {k} {} elements, found {} bytes", dtype.name(), bytes.len()),
            ));
        }
        Ok(Self { n, k, dtype, bytes })
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.k * self.dtype.size()
    }
}

/// How the numbers of a group turn codes into weights: what the second one is, and where the software that defines the
/// format rounds, which multiplies with weights in half precision or in bfloat16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Offset {
    /// `o` is a zero point in code units: w = f16((q - o) * s).
    Zero,
    /// `o` is a bias in weight units: w = f16(q * s + o).
    Bias,
    /// The same with the product rounded first: w = f16(f16(q * s) + o).
    RoundedBias,
    /// [`Self::Zero`], rounded to bfloat16.
    ZeroBf16,
    /// [`Self::Bias`], rounded to bfloat16.
    BiasBf16,
    /// [`Self::RoundedBias`], both rounded to bfloat16.
    RoundedBiasBf16,
}

impl Offset {
    /// Whether `o` is a bias.
    pub fn is_bias(self) -> bool {
        !matches!(self, Self::Zero | Self::ZeroBf16)
    }

    /// Whether products are rounded before the bias is added.
    pub fn rounds_products(self) -> bool {
        matches!(self, Self::RoundedBias | Self::RoundedBiasBf16)
    }

    /// What weights are rounded to: half precision or bfloat16.
    pub fn rounding(self) -> DenseType {
        match self {
            Self::Zero | Self::Bias | Self::RoundedBias => DenseType::F16,
            Self::ZeroBf16 | Self::BiasBf16 | Self::RoundedBiasBf16 => DenseType::BF16,
        }
    }

    /// The same meaning with weights rounded to bfloat16 if that is `rounding`, else to half precision.
    #[must_use]
    pub fn rounded_to(self, rounding: DenseType) -> Self {
        let bf16 = rounding == DenseType::BF16;
        match self {
            Self::Zero | Self::ZeroBf16 => {
                if bf16 {
                    Self::ZeroBf16
                } else {
                    Self::Zero
                }
            }
            Self::Bias | Self::BiasBf16 => {
                if bf16 {
                    Self::BiasBf16
                } else {
                    Self::Bias
                }
            }
            Self::RoundedBias | Self::RoundedBiasBf16 => {
                if bf16 {
                    Self::RoundedBiasBf16
                } else {
                    Self::RoundedBias
                }
            }
        }
    }

    /// The weight that code `q` stands for, rounded to `rounding` wherever this form rounds.
    pub fn weight(self, q: u8, s: f32, o: f32, rounding: DenseType) -> f32 {
        // Products are exact in f32 while `s` is a number of half precision or bfloat16 (8 + 11 bits).
        let exact = match self {
            Self::Zero | Self::ZeroBf16 => (f32::from(q) - o) * s,
            Self::Bias | Self::BiasBf16 => f32::from(q) * s + o,
            Self::RoundedBias | Self::RoundedBiasBf16 => round(rounding, f32::from(q) * s) + o,
        };
        round(rounding, exact)
    }

    /// The weights that codes 0 to 15 of a group with these [`W4Matrix::group_params`] stand for.
    pub fn weights(self, params: u32) -> [f32; 16] {
        let scale = f16::from_bits(params as u16).to_f32();
        let o = f16::from_bits((params >> 16) as u16).to_f32();
        std::array::from_fn(|q| self.weight(q as u8, scale, o, self.rounding()))
    }
}

/// A matrix in the canonical 4-bit form that every backend reads; every dialect on disk decodes to it.
///
/// A weight is `f16((q - o) * s)`, `f16(q * s + o)` or the like (see [`Offset`]): computed in f32 and rounded, because
/// that is what the software that defines these formats multiplies with. The recorded hashes of
/// its dequantized tensors agree bit for bit with [`W4Matrix::dequantize_row`].
#[derive(Debug, Clone, PartialEq)]
pub struct W4Matrix {
    /// Output features.
    pub n: usize,
    /// Input features; a multiple of 8.
    pub k: usize,
    /// Input features that share one scale; a multiple of 8 that divides `k` (`k` itself: one group a row).
    pub group_size: usize,
    /// (n, k / 8): nibble t (bits 4t..4t+3) of word c of row r is the code of input feature 8c + t.
    pub qweight: Vec<u32>,
    /// (n, k / group_size): f16 scale `s` in the low half, f16 offset `o` in the high half.
    pub group_params: Vec<u32>,
    /// Meaning of `o`.
    pub offset: Offset,
}

impl W4Matrix {
    /// Groups of one row.
    pub fn groups(&self) -> usize {
        self.k / self.group_size
    }
}
