//! `quantization_config` of AutoAWQ and of llm-awq.

use serde_json::Value;

use super::{Pattern, Quantization, Scheme, brief, field, group_size, invalid, read_bits, strings, text, unsupported};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::quant::Dialect;

pub(super) fn read(section: &Value) -> Result<Quantization> {
    read_bits(field(section, &["bits", "w_bit"]), &[4])?;
    let version = text(section, "version")?.unwrap_or_else(|| "gemm".into());
    let tiny_chat = text(section, "backend")?.is_some_and(|backend| backend == "llm-awq");
    let dialect = match version.as_str() {
        _ if tiny_chat => Dialect::TinyChat,
        "gemm" => Dialect::AwqGemm,
        "gemv" => Dialect::AwqGemv,
        "gemv_fast" => Dialect::AwqGemvFast,
        "llm-awq" => Dialect::TinyChat,
        _ => return Err(unsupported(format!("AWQ version {}", brief(&Value::String(version))))),
    };
    let group_size = match field(section, &["group_size", "q_group_size"]) {
        None => return Err(invalid("`group_size` is missing")),
        Some(value) => group_size(value)?,
    };
    let ignore = strings(section, "modules_to_not_convert")?.into_iter().map(Pattern::Contains).collect();
    // `zero_point` is not asked: writers that say false store constant zero points, and what is stored decides.
    Ok(Quantization::uniform(Scheme::new(dialect, 4, group_size, false), None, ignore))
}

/// What llm-awq's own files say, which have no configuration: the group size is a part of their usual names
/// (`...-w4-g128-awq-v2.pt`), and 128 unless stated. `None` without tensors that only they have.
pub(super) fn tiny_chat(checkpoint: &Checkpoint) -> Option<Quantization> {
    let zeros = checkpoint.tensors().find(|tensor| tensor.name.ends_with(".scaled_zeros"))?;
    let name = zeros.file.file_name()?.to_string_lossy().to_ascii_lowercase();
    let stated = name.split(['-', '_', '.']).find_map(|part| part.strip_prefix('g')?.parse().ok());
    let scheme = Scheme::new(Dialect::TinyChat, 4, Some(stated.unwrap_or(128)), false);
    Some(Quantization::uniform(scheme, Some("llm-awq".into()), Vec::new()))
}
