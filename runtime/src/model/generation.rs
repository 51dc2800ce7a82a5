//! `generation_config.json`: end-of-turn ids and the sampling the model's authors recommend.

use serde_json::Value;

use crate::error::{Error, ErrorKind, Result};
use crate::session::sampler::Sampling;

/// How a model wants to be sampled, and where its turns end.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// Every id that ends a turn.
    pub eos_token_ids: Vec<u32>,
    /// Id that starts a text, if the model has one.
    pub bos_token_id: Option<u32>,
    /// Recommended sampling; what the file does not say is [`Sampling::default`].
    pub sampling: Sampling,
}

impl GenerationConfig {
    /// Reads `generation_config.json` if there is one; ids it does not name come from `config.json`.
    pub(super) fn from_json(generation: Option<&Value>, config: &Value, vocab_size: usize) -> Result<Self> {
        let find = |key: &str| {
            generation
                .and_then(|g| g.get(key))
                .filter(|v| !v.is_null())
                .or_else(|| config.get(key).filter(|v| !v.is_null()))
                .or_else(|| config.get("text_config")?.get(key).filter(|v| !v.is_null()))
        };
        let id = |key: &str, value: &Value| -> Result<u32> {
            value.as_u64().filter(|&id| id < vocab_size as u64).map(|id| id as u32).ok_or_else(|| {
                let message = format!("`{key}` must be token ids below {vocab_size}, found {value}");
                Error::new(ErrorKind::InvalidConfig, message)
            })
        };
        let eos_token_ids = match find("eos_token_id") {
            None => Vec::new(),
            Some(Value::Array(ids)) => ids.iter().map(|v| id("eos_token_id", v)).collect::<Result<_>>()?,
            Some(value) => vec![id("eos_token_id", value)?],
        };
        let bos_token_id = find("bos_token_id").map(|v| id("bos_token_id", v)).transpose()?;

        let mut sampling = Sampling::default();
        if let Some(generation) = generation {
            let number = |key: &str| generation.get(key).and_then(Value::as_f64).map(|n| n as f32);
            sampling.temperature = number("temperature").unwrap_or(sampling.temperature);
            sampling.top_k = generation.get("top_k").and_then(Value::as_u64).map_or(sampling.top_k, |k| k as u32);
            sampling.top_p = number("top_p").unwrap_or(sampling.top_p);
            sampling.min_p = number("min_p").unwrap_or(sampling.min_p);
            sampling.repetition_penalty = number("repetition_penalty").unwrap_or(sampling.repetition_penalty);
            if generation.get("do_sample") == Some(&Value::Bool(false)) {
                sampling.temperature = 0.0;
            }
            sampling.validate().map_err(|e| Error::new(ErrorKind::InvalidConfig, e.message()))?;
        }
        Ok(Self { eos_token_ids, bos_token_id, sampling })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn generation_config_wins_over_config() {
        let g = json!({"eos_token_id": [3, 5], "temperature": 0.2});
        let c = json!({"eos_token_id": 2, "bos_token_id": 1});
        let read = GenerationConfig::from_json(Some(&g), &c, 10).unwrap();
        assert_eq!((read.eos_token_ids, read.bos_token_id), (vec![3, 5], Some(1)));
        assert_eq!(read.sampling.temperature, 0.2);
        assert_eq!(GenerationConfig::from_json(None, &c, 10).unwrap().eos_token_ids, [2]);
    }

    #[test]
    fn ids_outside_the_vocabulary_are_refused() {
        for bad in [json!({"eos_token_id": 10}), json!({"eos_token_id": -1}), json!({"eos_token_id": ["a"]})] {
            let error = GenerationConfig::from_json(None, &bad, 10).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        }
    }
}
