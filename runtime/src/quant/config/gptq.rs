//! `quantization_config` of AutoGPTQ, GPTQModel and Optimum, and of AutoRound, which writes the same layouts.

use serde_json::Value;

use super::{
    Group, MAX_ENTRIES, Pattern, Quantization, Scheme, ZeroPoints, brief, field, flag, group_size, invalid, read_bits,
    text, unsupported,
};
use crate::error::Result;
use crate::quant::Dialect;

const BITS: &[u64] = &[2, 3, 4, 8];

pub(super) fn read(section: &Value) -> Result<Quantization> {
    let format = text(section, "checkpoint_format")?.or(text(section, "format")?).unwrap_or_else(|| "gptq".into());
    let writer = writer(section);
    // GPTQModel packs first and then subtracts from words; others subtract before packing.
    let by_gptq_model = writer.as_deref().is_some_and(|writer| writer.starts_with("gptqmodel"));
    let (dialect, zeros) = match format.as_str() {
        "gptq_v2" => (Dialect::GptqV2, ZeroPoints::Plain),
        "gptq" | "gemm" if by_gptq_model => {
            (Dialect::Gptq, ZeroPoints::WordsLessOne(read_bits(field(section, &["bits"]), BITS)?))
        }
        "gptq" | "gemm" => (Dialect::Gptq, ZeroPoints::FieldsLessOne),
        _ => {
            let message = format!("GPTQ checkpoint format {format:?} (gptq and gptq_v2 are read)");
            return Err(unsupported(message));
        }
    };
    if let Some(pack) = field(section, &["pack_dtype"]).filter(|pack| pack.as_str() != Some("int32")) {
        return Err(unsupported(format!("`pack_dtype` {}", brief(pack))));
    }
    let base = overridden(section, None, dialect, zeros)?;
    let mut rules = Vec::new();
    match field(section, &["dynamic"]) {
        None => {}
        Some(Value::Object(dynamic)) if dynamic.len() <= MAX_ENTRIES => {
            for (rule, change) in dynamic {
                rules.push(match rule.strip_prefix("-:") {
                    Some(pattern) => (Pattern::regex(pattern)?, None),
                    None => {
                        let pattern = Pattern::regex(rule.strip_prefix("+:").unwrap_or(rule))?;
                        (pattern, Some(overridden(change, Some(base), dialect, zeros)?))
                    }
                });
            }
        }
        Some(other) => return Err(invalid(format!("expected an object as `dynamic`, found {}", brief(other)))),
    }
    let groups = vec![Group { targets: block_modules(section)?, scheme: base }];
    Ok(Quantization { dialect, writer, rules, ignore: Vec::new(), groups })
}

/// AutoRound's section: `packing_format` names the layout, `extra_config` the modules that differ.
pub(super) fn auto_round(section: &Value) -> Result<Quantization> {
    let format = text(section, "packing_format")?.unwrap_or_else(|| "auto_round:auto_gptq".into());
    let (dialect, zeros) = match format.as_str() {
        "auto_round:auto_gptq" | "auto_round:gptq" => (Dialect::Gptq, ZeroPoints::FieldsLessOne),
        "auto_round" | "auto_round:gptqmodel" | "auto_round:exllamav2" => (Dialect::GptqV2, ZeroPoints::Plain),
        "auto_round:auto_awq" | "auto_round:awq" => (Dialect::AwqGemm, ZeroPoints::Plain),
        _ => return Err(unsupported(format!("AutoRound packing format {format:?}"))),
    };
    match text(section, "data_type")?.as_deref() {
        None | Some("int" | "int_sym" | "int_asym") => {}
        Some(other) => return Err(unsupported(format!("AutoRound data type {other:?}"))),
    }
    if field(section, &["act_bits"]).and_then(Value::as_u64).is_some_and(|bits| bits < 16) {
        return Err(unsupported("quantized activations (`act_bits`)"));
    }
    let base = overridden(section, None, dialect, zeros)?;
    let writer = field(section, &["autoround_version"]).and_then(Value::as_str);
    let mut rules = Vec::new();
    match field(section, &["extra_config"]) {
        None => {}
        Some(Value::Object(modules)) if modules.len() <= MAX_ENTRIES => {
            for (module, change) in modules {
                let packed = field(change, &["bits"]).and_then(Value::as_u64).is_none_or(|bits| bits < 16);
                let scheme = packed.then(|| overridden(change, Some(base), dialect, zeros)).transpose()?;
                // Names of modules; patterns are regular expressions that name no module.
                let is_name = module.chars().all(|c| c.is_alphanumeric() || matches!(c, '.' | '_' | '-'));
                rules.push((if is_name { Pattern::Exact(module.clone()) } else { Pattern::regex(module)? }, scheme));
            }
        }
        Some(other) => return Err(invalid(format!("expected an object as `extra_config`, found {}", brief(other)))),
    }
    let groups = vec![Group { targets: vec![Pattern::Contains(String::new())], scheme: base }];
    let writer = Some(format!("auto-round {}", writer.unwrap_or("of unknown version")));
    Ok(Quantization { dialect, writer, rules, ignore: Vec::new(), groups })
}

/// What a section says, over `base`.
fn overridden(section: &Value, base: Option<Scheme>, dialect: Dialect, zeros: ZeroPoints) -> Result<Scheme> {
    let known = if dialect == Dialect::AwqGemm { &[4] } else { BITS };
    let bits = match (field(section, &["bits"]), base) {
        (None, Some(base)) => base.bits,
        (bits, _) => read_bits(bits, known)?,
    };
    let group_size = match (field(section, &["group_size"]), base) {
        (None, Some(base)) => base.group_size,
        (None, None) => return Err(invalid("`group_size` is missing")),
        (Some(value), _) => group_size(value)?,
    };
    let symmetric = flag(section, "sym")?.or(base.map(|base| base.symmetric)).unwrap_or(false);
    let act_order = flag(section, "desc_act")?.or(base.map(|base| base.act_order)).unwrap_or(false);
    Ok(Scheme { dialect, bits, group_size, symmetric, act_order, zeros })
}

/// Modules of a block that are packed: all, unless Optimum lists some.
fn block_modules(section: &Value) -> Result<Vec<Pattern>> {
    let everything = vec![Pattern::Contains(String::new())];
    let Some(list) = field(section, &["modules_in_block_to_quantize"]) else { return Ok(everything) };
    let wrong = || invalid("expected lists of module names as `modules_in_block_to_quantize`");
    let mut modules = Vec::new();
    for entry in list.as_array().filter(|list| list.len() <= MAX_ENTRIES).ok_or_else(wrong)? {
        match entry {
            Value::String(name) => modules.push(Pattern::Contains(name.clone())),
            Value::Array(names) if names.len() <= MAX_ENTRIES => {
                for name in names {
                    modules.push(Pattern::Contains(name.as_str().ok_or_else(wrong)?.to_owned()));
                }
            }
            _ => return Err(wrong()),
        }
    }
    Ok(if modules.is_empty() { everything } else { modules })
}

/// `meta.quantizer`: a text or a list of texts such as `gptqmodel:2.2.0`.
fn writer(section: &Value) -> Option<String> {
    let quantizer = section.get("meta")?.get("quantizer")?;
    let text = quantizer.as_str().or_else(|| quantizer.get(0)?.as_str())?;
    Some(text.chars().take(64).collect::<String>().to_ascii_lowercase())
}
