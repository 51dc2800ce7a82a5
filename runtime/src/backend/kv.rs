//! The element types of the KV cache, and the bytes that they take.

use super::{Program, RunnerConfig};
use crate::error::{Error, ErrorKind, Result};

/// Checks the operands of [`super::Runner::save_kv`] and [`super::Runner::load_kv`].
pub(super) fn check_kv(program: &Program, config: &RunnerConfig, kv_type: KvType, n: u32, len: usize) -> Result<()> {
    let bytes = kv_bytes(program, kv_type, n);
    if n > config.context || bytes != len as u64 {
        let message = format!("{n} positions of a context of {} are {bytes} bytes, got {len}", config.context);
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    Ok(())
}

/// Element type of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvType {
    /// 2 bytes; half the memory and traffic.
    F16,
    /// 4 bytes; adds no rounding.
    F32,
    /// A signed byte, and a half-precision scale for every [`Q8_GROUP`] elements of a key or a value: about half the
    /// memory of `F16`. A scale is the largest magnitude of its group over 127, a code the element over the scale,
    /// rounded to nearest. Keys are rounded behind their rotation. Models whose keys have a few elements far larger than
    /// the others, such as Qwen2 with its biases, lose much accuracy by it. wgpu refuses it.
    Q8,
}

/// Elements of a head that share a scale in [`KvType::Q8`]; the last group of a head may be shorter.
pub const Q8_GROUP: usize = 32;

impl KvType {
    /// Bytes of a key or of a value of `head_dim` elements.
    pub fn row_bytes(self, head_dim: u32) -> u64 {
        self.code_bytes(head_dim) + self.scale_bytes(head_dim)
    }

    /// Those of its elements or codes.
    pub(crate) fn code_bytes(self, head_dim: u32) -> u64 {
        let size = match self {
            Self::F16 => 2,
            Self::F32 => 4,
            Self::Q8 => 1,
        };
        u64::from(head_dim) * size
    }

    /// Those of its scales, if it has any: whole words, so that those of four positions are units that CUDA copies; the
    /// rest is 0.
    pub(crate) fn scale_bytes(self, head_dim: u32) -> u64 {
        match self {
            Self::F16 | Self::F32 => 0,
            Self::Q8 => 4 * u64::from(head_dim).div_ceil(2 * Q8_GROUP as u64),
        }
    }
}

/// Bytes of the keys and values of `n` positions.
pub fn kv_bytes(program: &Program, kv_type: KvType, n: u32) -> u64 {
    let shape = &program.attention;
    [2, u64::from(program.layers), u64::from(shape.kv_heads), u64::from(n)]
        .iter()
        .fold(kv_type.row_bytes(shape.head_dim), |bytes, &factor| bytes.saturating_mul(factor))
}
