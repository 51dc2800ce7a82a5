//! The element types of GGML tensors, as GGUF files hold them, and their expansion to f32.
//!
//! Every quantized type stores a row as blocks of 32 or 256 consecutive elements; the layouts are those of
//! `ggml-common.h`, the arithmetic (single precision, no fused multiply-add) that of the reference dequantizer, so
//! results agree with it bit for bit.

use half::{bf16, f16};

use crate::error::{Error, ErrorKind, Result};
use crate::tensor::Bytes;

/// An element type that [`dequantize_row`] expands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GgmlType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// 32 codes of 4 bits and an f16 scale: w = d * (q - 8).
    Q4_0,
    /// 32 codes of 4 bits, f16 scale and minimum: w = d * q + m.
    Q4_1,
    /// 32 codes of 5 bits and an f16 scale: w = d * (q - 16).
    Q5_0,
    /// 32 codes of 5 bits, f16 scale and minimum: w = d * q + m.
    Q5_1,
    /// 32 codes of 8 bits and an f16 scale: w = d * q.
    Q8_0,
    /// 256 codes of 4 bits in 8 sub-blocks with 6-bit scales and minima.
    Q4K,
    /// 256 codes of 5 bits in 8 sub-blocks with 6-bit scales and minima.
    Q5K,
    /// 256 codes of 6 bits in 16 sub-blocks with 8-bit scales.
    Q6K,
}

/// Names of the types that files may hold but this reader does not expand, by their number in the file.
const OTHER_TYPES: &[(u32, &str)] = &[
    (4, "Q4_2"),
    (5, "Q4_3"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

impl GgmlType {
    /// All supported types.
    pub const ALL: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// The type with the number `id` in the file.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] with the type's name, or its number if nobody gave it a name.
    pub fn from_id(id: u32) -> Result<Self> {
        if let Some(found) = Self::ALL.into_iter().find(|t| t.id() == id) {
            return Ok(found);
        }
        let name = OTHER_TYPES.iter().find(|(other, _)| *other == id).map(|(_, name)| *name);
        Err(Error::new(
            ErrorKind::Unsupported,
            match name {
                Some(name) => format!("tensor type {name} is not supported"),
                None => format!("unknown tensor type {id}"),
            },
        ))
    }

    /// Number of the type in the file.
    pub fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
            Self::BF16 => 30,
        }
    }

    /// Usual upper-case name, as `Q4_K`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }

    /// Elements of one block; 1 for the unquantized types.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Bytes of a row of `k` elements, or `None` if blocks do not divide it or the size overflows.
    pub fn row_bytes(self, k: usize) -> Option<usize> {
        if !k.is_multiple_of(self.block_len()) {
            return None;
        }
        (k / self.block_len()).checked_mul(self.block_bytes())
    }
}

/// Expands one row, or any number of whole blocks, to f32.
///
/// `bytes` are the blocks, `out` the `k` elements they hold.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] if `bytes` is not exactly the size of `out.len()` elements.
pub fn dequantize_row(ggml_type: GgmlType, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    if ggml_type.row_bytes(out.len()) != Some(bytes.len()) {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("{} bytes are not a row of {} {} elements", bytes.len(), out.len(), ggml_type.name()),
        ));
    }
    expand_blocks(ggml_type, bytes, out);
    Ok(())
}

fn expand_blocks(ggml_type: GgmlType, bytes: &[u8], out: &mut [f32]) {
    let expand = match ggml_type {
        GgmlType::F32 => f32_block,
        GgmlType::F16 => f16_block,
        GgmlType::BF16 => bf16_block,
        GgmlType::Q4_0 => q4_0,
        GgmlType::Q4_1 => q4_1,
        GgmlType::Q5_0 => q5_0,
        GgmlType::Q5_1 => q5_1,
        GgmlType::Q8_0 => q8_0,
        GgmlType::Q4K => q4_k,
        GgmlType::Q5K => q5_k,
        GgmlType::Q6K => q6_k,
    };
    let blocks = bytes.chunks_exact(ggml_type.block_bytes());
    for (block, out) in blocks.zip(out.chunks_exact_mut(ggml_type.block_len())) {
        expand(block, out);
    }
}

fn half_at(block: &[u8], offset: usize) -> f32 {
    f16::from_le_bytes([block[offset], block[offset + 1]]).to_f32()
}

fn f32_block(block: &[u8], out: &mut [f32]) {
    out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
}

fn f16_block(block: &[u8], out: &mut [f32]) {
    out[0] = half_at(block, 0);
}

fn bf16_block(block: &[u8], out: &mut [f32]) {
    out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32();
}

/// Codes of byte j: the low nibble is element j, the high one element j + 16.
fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    let (low, high) = out.split_at_mut(16);
    for ((byte, low), high) in block[2..].iter().zip(low).zip(high) {
        *low = d * (f32::from(byte & 15) - 8.0);
        *high = d * (f32::from(byte >> 4) - 8.0);
    }
}

fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let (low, high) = out.split_at_mut(16);
    for ((byte, low), high) in block[4..].iter().zip(low).zip(high) {
        *low = d * f32::from(byte & 15) + m;
        *high = d * f32::from(byte >> 4) + m;
    }
}

/// The 5-bit codes of byte j: bit j of `high_bits` tops the low nibble, bit j + 16 the high one.
fn five_bit_codes(high_bits: &[u8], byte: u8, j: usize) -> (f32, f32) {
    let bits = u32::from_le_bytes([high_bits[0], high_bits[1], high_bits[2], high_bits[3]]);
    let low = (byte & 15) | (((bits >> j) & 1) as u8) << 4;
    let high = (byte >> 4) | (((bits >> (j + 16)) & 1) as u8) << 4;
    (f32::from(low), f32::from(high))
}

fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for j in 0..16 {
        let (low, high) = five_bit_codes(&block[2..6], block[6 + j], j);
        out[j] = d * (low - 16.0);
        out[j + 16] = d * (high - 16.0);
    }
}

fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for j in 0..16 {
        let (low, high) = five_bit_codes(&block[4..8], block[8 + j], j);
        out[j] = d * low + m;
        out[j + 16] = d * high + m;
    }
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (byte, out) in block[2..].iter().zip(out) {
        *out = d * f32::from(*byte as i8);
    }
}

/// The 6-bit scale and minimum of sub-block `j` of a K block, from its 12 bytes.
fn scale_min(s: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        ((s[j + 4] & 15) | (s[j - 4] >> 6) << 4, (s[j + 4] >> 4) | (s[j] >> 6) << 4)
    };
    (f32::from(scale), f32::from(min))
}

fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, d_min) = (half_at(block, 0), half_at(block, 2));
    let (scales, codes) = (&block[4..16], &block[16..144]);
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(scales, j);
        let (scale, min) = (d * scale, d_min * min);
        let shift = 4 * (j % 2);
        for (byte, out) in codes[j / 2 * 32..][..32].iter().zip(out) {
            *out = scale * f32::from((byte >> shift) & 15) - min;
        }
    }
}

fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, d_min) = (half_at(block, 0), half_at(block, 2));
    let (scales, high_bits, codes) = (&block[4..16], &block[16..48], &block[48..176]);
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(scales, j);
        let (scale, min) = (d * scale, d_min * min);
        let shift = 4 * (j % 2);
        for ((byte, high), out) in codes[j / 2 * 32..][..32].iter().zip(high_bits).zip(out) {
            *out = scale * f32::from((byte >> shift) & 15 | ((high >> j) & 1) << 4) - min;
        }
    }
}

fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low_bits, high_bits, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    // Runs of 32 elements: run r of half h takes low nibbles of 32 bytes for r < 2 and high nibbles for r >= 2,
    // and bits 2r, 2r + 1 of the half's 32 bytes of high bits.
    for (run, out) in out.chunks_exact_mut(32).enumerate() {
        let (h, r) = (run / 4, run % 4);
        let low = &low_bits[64 * h + 32 * (r % 2)..][..32];
        let high = &high_bits[32 * h..][..32];
        for (l, out) in out.iter_mut().enumerate() {
            let code = (low[l] >> (4 * (r / 2))) & 15 | ((high[l] >> (2 * r)) & 3) << 4;
            let scale = d * f32::from(scales[2 * run + l / 16] as i8);
            *out = scale * (f32::from(code) - 32.0);
        }
    }
}

/// A matrix in blocks of 256 elements with two levels of scales, as a GGUF file stores it.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockMatrix {
    /// Output features.
    pub n: usize,
    /// Input features, whole blocks.
    pub k: usize,
    /// [`GgmlType::Q4K`], [`GgmlType::Q5K`] or [`GgmlType::Q6K`].
    pub ggml_type: GgmlType,
    /// (n, k / 256) blocks; mapped, unless rows had to be put in another order.
    pub bytes: Bytes,
}

impl BlockMatrix {
    /// A matrix over `bytes`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`] if the type is not one of K blocks or the length is not that of `n` rows.
    pub fn new(n: usize, k: usize, ggml_type: GgmlType, bytes: Bytes) -> Result<Self> {
        let k_blocks = matches!(ggml_type, GgmlType::Q4K | GgmlType::Q5K | GgmlType::Q6K);
        let expected = ggml_type.row_bytes(k).filter(|_| k_blocks).and_then(|row| row.checked_mul(n));
        if expected != Some(bytes.len()) {
            let message = format!("{} bytes are not {n} x {k} of {}", bytes.len(), ggml_type.name());
            return Err(Error::new(ErrorKind::InvalidTensor, message));
        }
        Ok(Self { n, k, ggml_type, bytes })
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.k / self.ggml_type.block_len() * self.ggml_type.block_bytes()
    }

    /// Writes the weights of row `row` from input `k0` on to `out`.
    ///
    /// # Panics
    /// If they are not whole blocks of the matrix.
    pub fn expand(&self, row: usize, k0: usize, out: &mut [f32]) {
        let (len, bytes) = (self.ggml_type.block_len(), self.ggml_type.block_bytes());
        assert!(k0.is_multiple_of(len) && out.len().is_multiple_of(len), "whole blocks");
        let row = &self.bytes[row * self.row_bytes()..][..self.row_bytes()];
        expand_blocks(self.ggml_type, &row[k0 / len * bytes..][..out.len() / len * bytes], out);
    }
}
