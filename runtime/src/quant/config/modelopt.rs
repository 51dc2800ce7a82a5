//! The quantization sections of NVIDIA ModelOpt: `hf_quant_config.json`, or in newer exports `config.json` itself.

use serde_json::Value;

use super::{MAX_ENTRIES, Pattern, Quantization, Scheme, brief, field, group_size, invalid, strings, unsupported};
use crate::error::Result;
use crate::quant::Dialect;

/// Whether a section without `quant_method` is ModelOpt's own file.
pub(super) fn is_separate(section: &Value) -> bool {
    field(section, &["quantization"]).is_some_and(|inner| inner.get("quant_algo").is_some())
}

/// Whether the section of a `config.json` says how large groups are.
pub(super) fn has_group_size(config: &Value) -> bool {
    let Some(section) = field(config, &["quantization_config"]) else { return false };
    field(section, &["group_size"]).is_some() || field(section, &["config_groups"]).is_some()
}

pub(super) fn read(section: &Value) -> Result<Quantization> {
    // In the separate file everything is one level down.
    let inner = field(section, &["quantization"]).unwrap_or(section);
    let base = algorithm(inner, None)?;
    let mut rules = Vec::new();
    match field(inner, &["quantized_layers"]) {
        None => {}
        Some(Value::Object(layers)) if layers.len() <= MAX_ENTRIES * 16 => {
            for (name, layer) in layers {
                rules.push((Pattern::Exact(name.clone()), algorithm(layer, Some(inner))?));
            }
        }
        Some(other) => {
            return Err(invalid(format!("expected an object as `quantized_layers`, found {}", brief(other))));
        }
    }
    let mut ignore = Vec::new();
    for key in ["exclude_modules", "ignore"] {
        for name in strings(inner, key)? {
            ignore.push(Pattern::wildcard(&name)?);
        }
    }
    let producer = field(section, &["producer"]);
    let version = producer.and_then(|producer| producer.get("version")).and_then(Value::as_str);
    let writer = version.map(|version| format!("modelopt {version}"));
    let mixed = base.is_none();
    let scheme = base.or_else(|| rules.iter().find_map(|(_, scheme)| *scheme));
    let scheme = scheme.ok_or_else(|| invalid("`quant_algo` is missing"))?;
    let mut quantization = Quantization::uniform(scheme, writer, ignore);
    quantization.rules = rules;
    if mixed {
        // Only the layers that are listed.
        quantization.rules.push((Pattern::Contains(String::new()), None));
    }
    Ok(quantization)
}

/// The scheme of an algorithm, `None` if every layer has its own.
fn algorithm(section: &Value, defaults: Option<&Value>) -> Result<Option<Scheme>> {
    let algorithm = match field(section, &["quant_algo"]) {
        Some(Value::String(text)) => text.to_ascii_uppercase(),
        Some(other) => return Err(invalid(format!("expected a string as `quant_algo`, found {}", brief(other)))),
        None => return Err(invalid("`quant_algo` is missing")),
    };
    match algorithm.as_str() {
        "W4A16_AWQ" | "W4A16" | "INT4_AWQ" => {}
        "MIXED_PRECISION" if defaults.is_none() => return Ok(None),
        _ => return Err(unsupported(format!("ModelOpt algorithm {}", brief(&Value::String(algorithm))))),
    }
    let weights = field(section, &["config_groups"])
        .and_then(|groups| groups.as_object()?.values().next())
        .and_then(|group| group.get("weights"));
    let size = field(section, &["group_size"])
        .or_else(|| weights.and_then(|weights| field(weights, &["group_size"])))
        .or_else(|| defaults.and_then(|defaults| field(defaults, &["group_size"])));
    let size = size.map(group_size).transpose()?.unwrap_or(Some(128));
    if field(section, &["has_zero_point"]).and_then(Value::as_bool).unwrap_or(false) {
        return Err(unsupported("ModelOpt weights with zero points"));
    }
    Ok(Some(Scheme::new(Dialect::ModelOpt, 4, size, true)))
}
