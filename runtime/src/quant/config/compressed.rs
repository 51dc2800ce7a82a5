//! `quantization_config` of compressed-tensors: groups of targets, each with its own widths and even formats.

use serde_json::Value;

use super::{
    Group, MAX_ENTRIES, Pattern, Quantization, Scheme, brief, field, flag, group_size, invalid, read_bits, strings,
    text, unsupported,
};
use crate::error::{Error, Result};
use crate::quant::Dialect;

pub(super) fn read(section: &Value) -> Result<Quantization> {
    let format = text(section, "format")?;
    if let Some(sparsity) = field(section, &["sparsity_config"]).and_then(|s| s.get("format")).and_then(Value::as_str)
        && sparsity != "dense"
    {
        return Err(unsupported(format!("sparsity format {sparsity:?}")));
    }
    let transforms = field(section, &["transform_config"]).and_then(|t| t.get("config_groups"));
    if transforms.and_then(Value::as_object).is_some_and(|groups| !groups.is_empty()) {
        return Err(unsupported("compressed-tensors `transform_config`"));
    }
    let config_groups = match field(section, &["config_groups"]) {
        Some(Value::Object(groups)) if !groups.is_empty() && groups.len() <= MAX_ENTRIES => groups,
        _ => return Err(invalid("`config_groups` is missing, empty or too large")),
    };
    let mut groups = Vec::with_capacity(config_groups.len());
    for (name, group) in config_groups {
        let of_group = |error: Error| Error::new(error.kind(), format!("`{name}`: {}", error.message()));
        groups.push(config_group(group, format.as_deref()).map_err(of_group)?);
    }
    let ignore = strings(section, "ignore")?.iter().map(|text| Pattern::parse(text)).collect::<Result<_>>()?;
    let writer = field(section, &["version"]).and_then(Value::as_str).map(|v| format!("compressed-tensors {v}"));
    let dialect = groups.first().map_or(Dialect::PackQuantized, |group: &Group| group.scheme.dialect);
    Ok(Quantization { dialect, writer, rules: Vec::new(), ignore, groups })
}

fn config_group(group: &Value, file_format: Option<&str>) -> Result<Group> {
    let own = text(group, "format")?;
    let dialect = match own.as_deref().or(file_format) {
        Some("pack-quantized") => Dialect::PackQuantized,
        Some("int-quantized" | "naive-quantized") => Dialect::IntQuantized,
        Some(other) => return Err(unsupported(format!("compressed-tensors format {other:?}"))),
        None => return Err(invalid("`format` is missing")),
    };
    for key in ["input_activations", "output_activations"] {
        if field(group, &[key]).is_some() {
            return Err(unsupported(format!("quantized activations (`{key}`)")));
        }
    }
    let Some(weights) = field(group, &["weights"]) else { return Err(invalid("`weights` is missing")) };
    let known: &[u64] = if dialect == Dialect::IntQuantized { &[8] } else { &[2, 3, 4, 5, 6, 8] };
    let bits = read_bits(field(weights, &["num_bits"]), known)?;
    match text(weights, "type")?.as_deref() {
        None | Some("int") => {}
        Some(other) => return Err(unsupported(format!("weights of type {other:?}"))),
    }
    if flag(weights, "dynamic")?.unwrap_or(false) {
        return Err(unsupported("dynamic quantization of weights"));
    }
    let act_order = match field(weights, &["actorder"]) {
        None | Some(Value::Bool(false)) => false,
        Some(Value::Bool(true)) => true,
        Some(Value::String(order)) => match order.to_ascii_lowercase().as_str() {
            "static" | "weight" => false,
            "group" | "dynamic" => true,
            _ => return Err(unsupported(format!("`actorder` {order:?}"))),
        },
        Some(other) => return Err(unsupported(format!("`actorder` {}", brief(other)))),
    };
    let stated = field(weights, &["group_size"]).map(group_size).transpose()?;
    let group_size = match text(weights, "strategy")?.as_deref() {
        Some("channel" | "tensor") => None,
        Some("group") => Some(stated.flatten().ok_or_else(|| invalid("`group_size` of strategy `group` is missing"))?),
        // Older writers leave the strategy out and mean what the group size says.
        None => stated.unwrap_or(None),
        Some(other) => return Err(unsupported(format!("quantization strategy {other:?}"))),
    };
    let symmetric = flag(weights, "symmetric")?.unwrap_or(true);
    let targets = strings(group, "targets")?.iter().map(|text| Pattern::parse(text)).collect::<Result<Vec<_>>>()?;
    if targets.is_empty() {
        return Err(invalid("`targets` is missing or empty"));
    }
    Ok(Group { targets, scheme: Scheme { act_order, ..Scheme::new(dialect, bits, group_size, symmetric) } })
}
