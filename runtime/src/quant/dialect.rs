//! The dialects by name, and what distinguishes them before a tensor is read.

use super::{Scheme, bitsandbytes};
use crate::checkpoint::Checkpoint;

/// How packed weights lie on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// AutoAWQ `gemm`: packed along the output features.
    AwqGemm,
    /// AutoAWQ `gemv`: packed along the input features.
    AwqGemv,
    /// AutoAWQ `gemv_fast`: bands of four rows, offsets as f16.
    AwqGemvFast,
    /// llm-awq's second format, which TinyChat runs: `gemv_fast` under other names.
    TinyChat,
    /// compressed-tensors `pack-quantized`.
    PackQuantized,
    /// compressed-tensors `int-quantized` and `naive-quantized`, weights only: a byte a code.
    IntQuantized,
    /// GPTQ as AutoGPTQ wrote it first: zero points less one.
    Gptq,
    /// GPTQModel's second GPTQ format.
    GptqV2,
    /// bitsandbytes NF4 and FP4.
    BitsAndBytes,
    /// NVIDIA ModelOpt, 4-bit AWQ.
    ModelOpt,
    /// MLX, affine.
    Mlx,
    /// A GGUF file; each tensor has a type of its own.
    Gguf,
}

impl Dialect {
    /// Name as its writers use it.
    pub fn name(self) -> &'static str {
        match self {
            Self::AwqGemm => "awq gemm",
            Self::AwqGemv => "awq gemv",
            Self::AwqGemvFast => "awq gemv_fast",
            Self::TinyChat => "llm-awq v2",
            Self::PackQuantized => "compressed-tensors pack-quantized",
            Self::IntQuantized => "compressed-tensors int-quantized",
            Self::Gptq => "gptq",
            Self::GptqV2 => "gptq_v2",
            Self::BitsAndBytes => "bitsandbytes",
            Self::ModelOpt => "modelopt awq",
            Self::Mlx => "mlx",
            Self::Gguf => "gguf",
        }
    }

    /// Suffix of the tensor with the codes, which tells that a module is packed.
    pub fn codes_suffix(self) -> &'static str {
        match self {
            Self::AwqGemm | Self::AwqGemv | Self::AwqGemvFast | Self::TinyChat | Self::Gptq | Self::GptqV2 => "qweight",
            Self::PackQuantized => "weight_packed",
            Self::IntQuantized | Self::BitsAndBytes | Self::ModelOpt | Self::Mlx | Self::Gguf => "weight",
        }
    }

    /// Whether packed modules are found that the configuration excludes.
    pub(super) fn excludes_loosely(self) -> bool {
        !matches!(self, Self::PackQuantized | Self::IntQuantized)
    }

    /// Whether modules of decoder layers may be dense without being excluded: what is stored says so by itself.
    pub(super) fn leaves_some_dense(self) -> bool {
        matches!(self, Self::BitsAndBytes | Self::Mlx | Self::Gguf)
    }

    /// Whether the last group of a row may be shorter than the others.
    pub(super) fn allows_short_group(self) -> bool {
        matches!(self, Self::Gptq | Self::GptqV2 | Self::BitsAndBytes | Self::Gguf)
    }
}

/// What a tensor is to its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The codes.
    Codes,
    /// Scales, or what they are computed from.
    Scales,
    /// Zero points or biases.
    Zeros,
    /// A factor for every input.
    Factors,
    /// The group of every input.
    Groups,
    /// Anything else: stored shape, tables, descriptions.
    Metadata,
}

/// The packed module that a tensor is a part of, and what it is there.
pub fn part_of<'a>(checkpoint: &Checkpoint, name: &'a str) -> Option<(&'a str, Part)> {
    const SUFFIXES: &[(&str, Part)] = &[
        (".qweight", Part::Codes),
        (".weight_packed", Part::Codes),
        (".scales", Part::Scales),
        (".weight_scale", Part::Scales),
        (".weight.absmax", Part::Scales),
        (".weight.nested_absmax", Part::Scales),
        (".qzeros", Part::Zeros),
        (".scaled_zeros", Part::Zeros),
        (".weight_zero_point", Part::Zeros),
        (".biases", Part::Zeros),
        (".pre_quant_scale", Part::Factors),
        (".g_idx", Part::Groups),
        (".weight_g_idx", Part::Groups),
        (".weight_shape", Part::Metadata),
        (".weight.quant_map", Part::Metadata),
        (".weight.nested_quant_map", Part::Metadata),
        (".weight.quant_state.bitsandbytes__nf4", Part::Metadata),
        (".weight.quant_state.bitsandbytes__fp4", Part::Metadata),
        (".weight", Part::Codes),
    ];
    let (module, part) = SUFFIXES.iter().find_map(|(suffix, part)| Some((name.strip_suffix(suffix)?, *part)))?;
    let codes = ["qweight", "weight_packed"].iter().any(|s| checkpoint.tensor(&format!("{module}.{s}")).is_some());
    let weight = checkpoint.tensor(&format!("{module}.weight"));
    let packed = weight.is_some_and(|weight| weight.dense_type().is_err() && weight.shape.len() == 2)
        || bitsandbytes::state(checkpoint, module).is_some();
    // `.weight` beside codes is a second copy of the module, which loading refuses.
    let is_part = if name.ends_with(".weight") { packed } else { codes || packed };
    is_part.then_some((module, part))
}

/// Output and input features of the packed module `prefix`, from what is stored of it; `None` if that is no module of
/// this scheme. What it says is for descriptions: loading checks against the shape that the model asks for.
pub fn stored_shape(checkpoint: &Checkpoint, scheme: Scheme, prefix: &str) -> Option<(usize, usize)> {
    let codes = checkpoint.tensor(&format!("{prefix}.{}", scheme.dialect.codes_suffix()))?;
    if scheme.dialect == Dialect::BitsAndBytes {
        return bitsandbytes::stored_shape(checkpoint, prefix);
    }
    let &[rows, columns] = &codes.shape[..] else { return None };
    let features = |words: usize| Some(words.checked_mul(32)? / (scheme.bits.max(1) as usize));
    let inputs = |suffix: &str| Some(*checkpoint.tensor(&format!("{prefix}.{suffix}"))?.shape.first()?);
    match scheme.dialect {
        Dialect::AwqGemm => Some((columns.checked_mul(8)?, rows)),
        Dialect::AwqGemv => Some((rows, columns.checked_mul(8)?)),
        Dialect::AwqGemvFast | Dialect::TinyChat => Some((rows.checked_mul(4)?, columns)),
        Dialect::PackQuantized => {
            let stated = checkpoint.tensor(&format!("{prefix}.weight_shape")).and_then(|shape| shape.bytes().ok());
            let stated = stated.and_then(|bytes| {
                let [n, k] = bytes.as_chunks::<8>().0 else { return None };
                let size = |dim: &[u8; 8]| usize::try_from(i64::from_le_bytes(*dim)).ok();
                Some((size(n)?, size(k)?))
            });
            stated.or(Some((rows, features(columns)?)))
        }
        Dialect::IntQuantized => Some((rows, columns)),
        Dialect::Gptq | Dialect::GptqV2 => Some((columns, inputs("g_idx").or(features(rows))?)),
        Dialect::ModelOpt => Some((rows.checked_mul(2)?, columns)),
        Dialect::Mlx => Some((rows, features(columns)?)),
        Dialect::Gguf => match codes.elements()[..] {
            [n, k] => Some((n, k)),
            _ => None,
        },
        Dialect::BitsAndBytes => None,
    }
}
