//! The `quantization` section of MLX, with overrides by the path of a module.

use serde_json::Value;

use super::{MAX_ENTRIES, Pattern, Quantization, Scheme, field, group_size, invalid, read_bits, text, unsupported};
use crate::error::Result;
use crate::quant::Dialect;

pub(super) fn read(section: &Value) -> Result<Quantization> {
    let Some(object) = section.as_object().filter(|object| object.len() <= MAX_ENTRIES * 16) else {
        return Err(invalid("`quantization` is not an object"));
    };
    let base = scheme(section, None)?;
    let mut rules = Vec::new();
    for (module, change) in object {
        match change {
            Value::Bool(packed) => rules.push((Pattern::Exact(module.clone()), packed.then_some(base))),
            Value::Object(_) => rules.push((Pattern::Exact(module.clone()), Some(scheme(change, Some(base))?))),
            _ => {}
        }
    }
    let mut quantization = Quantization::uniform(base, None, Vec::new());
    quantization.rules = rules;
    Ok(quantization)
}

fn scheme(section: &Value, base: Option<Scheme>) -> Result<Scheme> {
    match text(section, "mode")?.as_deref() {
        None | Some("affine") => {}
        Some(other) => return Err(unsupported(format!("MLX quantization mode {other:?}"))),
    }
    let bits = match (field(section, &["bits"]), base) {
        (None, Some(base)) => base.bits,
        (bits, _) => read_bits(bits, &[2, 3, 4, 5, 6, 8])?,
    };
    let size = match (field(section, &["group_size"]), base) {
        (None, Some(base)) => base.group_size,
        (None, None) => Some(64),
        (Some(value), _) => group_size(value)?,
    };
    Ok(Scheme::new(Dialect::Mlx, bits, size, false))
}
