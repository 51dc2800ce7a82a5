//! `quantization_config` of bitsandbytes. How a module is packed is beside its weights; only the method is said here.

use serde_json::Value;

use super::{Pattern, Quantization, Scheme, flag, strings, text, unsupported};
use crate::error::Result;
use crate::quant::Dialect;

pub(super) fn read(section: &Value) -> Result<Quantization> {
    let four = flag(section, "load_in_4bit")?.or(flag(section, "_load_in_4bit")?).unwrap_or(false);
    if !four {
        return Err(unsupported("bitsandbytes in 8 bits (LLM.int8())"));
    }
    match text(section, "bnb_4bit_quant_type")?.as_deref() {
        None | Some("nf4" | "fp4") => {}
        Some(other) => return Err(unsupported(format!("`bnb_4bit_quant_type` {other:?}"))),
    }
    let ignore = strings(section, "llm_int8_skip_modules")?.into_iter().map(Pattern::Contains).collect();
    Ok(Quantization::uniform(Scheme::new(Dialect::BitsAndBytes, 4, Some(64), false), None, ignore))
}
