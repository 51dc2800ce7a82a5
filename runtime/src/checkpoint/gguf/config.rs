//! `config.json` from the hyper-parameters of the metadata.

use serde_json::{Value as Json, json};

use super::model::GgufModel;
use super::tokenizer::Vocabulary;
use super::{Array, Value};
use crate::error::{Error, ErrorKind, Result};

/// Largest hyper-parameter taken seriously; keeps products of two inside 64 bits.
const MAX_SIZE: u64 = 1 << 31;

/// Hyper-parameters under the names of `config.json`.
pub(super) struct Config {
    /// Class name (`LlamaForCausalLM`).
    pub(super) architecture: &'static str,
    pub(super) model_type: &'static str,
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) num_attention_heads: usize,
    pub(super) num_key_value_heads: usize,
    pub(super) head_dim: usize,
    pub(super) vocab_size: usize,
    pub(super) max_position_embeddings: usize,
    pub(super) tie_word_embeddings: bool,
    /// Whether q, k and v have biases.
    pub(super) qkv_bias: bool,
    /// Whether the attention output has a bias.
    pub(super) output_bias: bool,
    /// Whether q and k are normalized per head.
    pub(super) qk_norm: bool,
    /// Whether the rows of q and k are stored with the two halves of each head interleaved.
    pub(super) permuted: bool,
    rms_norm_eps: f64,
    rope_theta: f64,
    rope_scaling: Option<Json>,
    sliding_window: Option<u64>,
}

/// Reads and checks the hyper-parameters of `model`.
pub(super) fn read(model: &GgufModel) -> Result<Config> {
    read_inner(model).map_err(|e| e.in_file(model.metadata().path()))
}

fn read_inner(model: &GgufModel) -> Result<Config> {
    let Some(arch) = model.metadata().string("general.architecture")? else {
        return Err(Error::new(ErrorKind::InvalidConfig, "metadata `general.architecture` is missing"));
    };
    let keys = Keys { model, arch };
    let sliding_window = keys.size("attention.sliding_window")?.map(|window| window as u64);
    let (architecture, model_type) = match (arch, sliding_window) {
        ("llama", None) => ("LlamaForCausalLM", "llama"),
        ("llama", Some(_)) => ("MistralForCausalLM", "mistral"),
        ("qwen2", None) => ("Qwen2ForCausalLM", "qwen2"),
        ("qwen3", None) => ("Qwen3ForCausalLM", "qwen3"),
        ("qwen2" | "qwen3", Some(_)) => {
            return Err(Error::new(ErrorKind::Unsupported, format!("sliding window of architecture `{arch}`")));
        }
        (other, _) => return Err(Error::new(ErrorKind::Unsupported, format!("architecture `{other}`"))),
    };
    if keys.uint("expert_count")?.is_some_and(|n| n > 0) {
        return Err(Error::new(ErrorKind::Unsupported, format!("mixture of experts of architecture `{arch}`")));
    }
    let hidden_size = keys.required("embedding_length")?;
    let num_attention_heads = keys.required("attention.head_count")?;
    let num_key_value_heads = keys.size("attention.head_count_kv")?.unwrap_or(num_attention_heads);
    let head_dim = match keys.size("attention.key_length")? {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
        None => {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!("{num_attention_heads} heads do not divide the width {hidden_size}"),
            ));
        }
    };
    if !num_attention_heads.is_multiple_of(num_key_value_heads) || !head_dim.is_multiple_of(2) {
        return Err(Error::new(
            ErrorKind::InvalidConfig,
            format!("{num_attention_heads} heads, {num_key_value_heads} key-value heads, head width {head_dim}"),
        ));
    }
    for (key, reason) in [("attention.value_length", "other widths for v"), ("rope.dimension_count", "partial rope")] {
        if let Some(found) = keys.size(key)?.filter(|found| *found != head_dim) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{reason}: metadata `{arch}.{key}` is {found}, head width {head_dim}"),
            ));
        }
    }
    let num_hidden_layers = keys.required("block_count")?;
    if num_hidden_layers > model.n_tensors() {
        return Err(Error::new(
            ErrorKind::InvalidConfig,
            format!("{num_hidden_layers} blocks, the file has {} tensors", model.n_tensors()),
        ));
    }
    let Some(embedding) = model.tensor("token_embd.weight") else {
        return Err(Error::new(ErrorKind::InvalidTensor, "missing").in_tensor("token_embd.weight"));
    };
    let rms_norm_eps = keys.positive("attention.layer_norm_rms_epsilon")?.ok_or_else(|| {
        Error::new(ErrorKind::InvalidConfig, format!("metadata `{arch}.attention.layer_norm_rms_epsilon` is missing"))
    })?;
    let has = |name: &str| model.tensor(name).is_some();
    Ok(Config {
        architecture,
        model_type,
        hidden_size,
        intermediate_size: keys.required("feed_forward_length")?,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        vocab_size: embedding.rows(),
        max_position_embeddings: keys.required("context_length")?,
        tie_word_embeddings: !has("output.weight"),
        qkv_bias: check_biases(model, arch)?,
        output_bias: has("blk.0.attn_output.bias"),
        qk_norm: arch == "qwen3",
        permuted: arch == "llama",
        rms_norm_eps,
        rope_theta: keys.positive("rope.freq_base")?.unwrap_or(10_000.0),
        rope_scaling: rope_scaling(&keys, head_dim)?,
        sliding_window,
    })
}

/// Whether q, k, v have biases; refuses combinations that the architecture's class has no place for.
fn check_biases(model: &GgufModel, arch: &str) -> Result<bool> {
    let has = |name: &str| model.tensor(&format!("blk.0.{name}.bias")).is_some();
    let qkv = has("attn_q");
    let expected_output = qkv && arch != "qwen2";
    if has("attn_output") != expected_output || (arch == "qwen2" && !qkv) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("these attention biases are not those of architecture `{arch}`"),
        )
        .in_tensor("blk.0.attn_output.bias"));
    }
    Ok(qkv)
}

/// The metadata of one architecture.
struct Keys<'a> {
    model: &'a GgufModel,
    arch: &'a str,
}

impl Keys<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    /// A count; one that is given for each layer has to be the same everywhere.
    fn uint(&self, key: &str) -> Result<Option<u64>> {
        let key = self.key(key);
        let values: Vec<u64> = match self.model.metadata().metadata().get(&key) {
            Some(Value::Array(Array::Uint(values))) => values.clone(),
            Some(Value::Array(Array::Int(values))) => values.iter().map(|v| u64::try_from(*v).unwrap_or(0)).collect(),
            _ => return self.model.metadata().uint(&key),
        };
        match values.first() {
            Some(first) if values.iter().all(|v| v == first) => Ok(Some(*first)),
            _ => Err(Error::new(ErrorKind::Unsupported, format!("metadata `{key}` differs between layers"))),
        }
    }

    /// A size: positive and not absurd.
    fn size(&self, key: &str) -> Result<Option<usize>> {
        match self.uint(key)? {
            None => Ok(None),
            Some(size) if (1..=MAX_SIZE).contains(&size) => Ok(usize::try_from(size).ok()),
            Some(size) => Err(Error::new(ErrorKind::InvalidConfig, format!("metadata `{}` is {size}", self.key(key)))),
        }
    }

    fn required(&self, key: &str) -> Result<usize> {
        self.size(key)?
            .ok_or_else(|| Error::new(ErrorKind::InvalidConfig, format!("metadata `{}` is missing", self.key(key))))
    }

    /// A finite float above 0, in the shortest decimal form of its precision.
    fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.model.metadata().float(&self.key(key))? {
            None => Ok(None),
            Some(v) if v.is_finite() && v > 0.0 => Ok(Some(shortest(v))),
            Some(v) => Err(Error::new(ErrorKind::InvalidConfig, format!("metadata `{}` is {v}", self.key(key)))),
        }
    }
}

/// 1e-5 instead of the 0.000009999999747378752 that its single-precision form widens to.
fn shortest(value: f64) -> f64 {
    let narrow = value as f32;
    if f64::from(narrow) == value { narrow.to_string().parse().unwrap_or(value) } else { value }
}

fn rope_scaling(keys: &Keys, head_dim: usize) -> Result<Option<Json>> {
    let metadata = keys.model.metadata();
    // As in llama.cpp a factor without a type means linear, and 0 means none.
    let scaling_type = metadata.string(&keys.key("rope.scaling.type"))?.unwrap_or("linear");
    let factor = match metadata.float(&keys.key("rope.scaling.factor"))? {
        Some(factor) => Some(factor),
        None => metadata.float(&keys.key("rope.scale_linear"))?,
    };
    let factor = factor.filter(|f| *f != 0.0).map(shortest);
    if factor.is_some_and(|f| !f.is_finite() || f < 1.0) {
        return Err(Error::new(ErrorKind::InvalidConfig, format!("rope scaling factor {factor:?}")));
    }
    let factors = keys.model.tensor("rope_freqs.weight");
    let unsupported = |what: &str| Error::new(ErrorKind::Unsupported, format!("rope scaling: {what}"));
    let factor = factor.filter(|f| *f != 1.0);
    match (scaling_type, factor, factors) {
        ("none" | "linear", None, None) => Ok(None),
        ("none", _, None) => Ok(None),
        ("none" | "linear", None, Some(_)) => llama3_scaling(keys, head_dim),
        ("linear", Some(factor), None) => {
            Ok(Some(json!({ "rope_type": "linear", "type": "linear", "factor": factor })))
        }
        ("yarn", Some(factor), None) => {
            for key in ["attn_factor", "yarn_ext_factor", "yarn_attn_factor", "yarn_log_multiplier"] {
                let key = keys.key(&format!("rope.scaling.{key}"));
                if metadata.metadata().contains_key(&key) {
                    return Err(unsupported(&format!("yarn with `{key}`")));
                }
            }
            let original = keys.size("rope.scaling.original_context_length")?;
            let original = original.ok_or_else(|| unsupported("yarn without the original context length"))?;
            let mut scaling = json!({
                "rope_type": "yarn",
                "type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
            });
            for (key, name) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
                if let Some(beta) = keys.positive(&format!("rope.scaling.{key}"))? {
                    scaling[name] = json!(beta);
                }
            }
            Ok(Some(scaling))
        }
        ("yarn", None, None) => Ok(None),
        ("linear" | "yarn", Some(_), Some(_)) => Err(unsupported("a factor and per-frequency factors together")),
        (other, _, _) => Err(unsupported(&format!("type `{other}`"))),
    }
}

/// The `llama3` parameters that give the per-frequency factors of `rope_freqs.weight`.
///
/// The tensor holds the result of the formula only; the two bounds are the same in all published models, so the
/// largest factor and the original context length are what there is to find.
fn llama3_scaling(keys: &Keys, head_dim: usize) -> Result<Option<Json>> {
    const NAME: &str = "rope_freqs.weight";
    const LOW: f64 = 1.0;
    const HIGH: f64 = 4.0;
    let Some(tensor) = keys.model.tensor(NAME) else { return Ok(None) };
    if tensor.shape != [head_dim / 2] {
        return Err(Error::new(
            ErrorKind::InvalidTensor,
            format!("expected shape [{}], found {:?}", head_dim / 2, tensor.shape),
        )
        .in_tensor(NAME));
    }
    let mut factors = vec![0.0f32; head_dim / 2];
    tensor.dequantize_row(0, &mut factors)?;
    if factors.iter().any(|f| !f.is_finite() || *f < 1.0) {
        return Err(Error::new(ErrorKind::InvalidTensor, "factors below 1 or not finite").in_tensor(NAME));
    }
    let factor = shortest(f64::from(factors.iter().copied().fold(1.0, f32::max)));
    if factor == 1.0 {
        return Ok(None);
    }
    let theta = keys.positive("rope.freq_base")?.unwrap_or(10_000.0);
    let stated = keys.size("rope.scaling.original_context_length")?;
    for original in stated.into_iter().chain([8192]) {
        let length = original as f64;
        let matches = factors.iter().enumerate().all(|(i, found)| {
            let wavelength = 2.0 * std::f64::consts::PI * theta.powf(2.0 * i as f64 / head_dim as f64);
            let expected = if wavelength < length / HIGH {
                1.0
            } else if wavelength > length / LOW {
                factor
            } else {
                let smooth = (length / wavelength - LOW) / (HIGH - LOW);
                1.0 / ((1.0 - smooth) / factor + smooth)
            };
            (f64::from(*found) - expected).abs() <= 1e-4 * expected
        });
        if matches {
            return Ok(Some(json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LOW,
                "high_freq_factor": HIGH,
                "original_max_position_embeddings": original,
            })));
        }
    }
    Err(Error::new(ErrorKind::Unsupported, "rope factors that the llama3 formula does not give").in_tensor(NAME))
}

impl Config {
    /// The content of `config.json`.
    pub(super) fn to_json(&self, torch_dtype: &str, vocabulary: &Vocabulary) -> Json {
        let mut json = json!({
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": torch_dtype,
            "bos_token_id": vocabulary.bos,
            "eos_token_id": vocabulary.eos,
            "pad_token_id": vocabulary.pad,
        });
        match self.model_type {
            "llama" => {
                json["attention_bias"] = json!(self.qkv_bias);
                json["mlp_bias"] = json!(false);
            }
            "qwen2" => json["use_sliding_window"] = json!(false),
            "qwen3" => {
                json["attention_bias"] = json!(self.qkv_bias);
                json["use_sliding_window"] = json!(false);
            }
            _ => json["sliding_window"] = json!(self.sliding_window),
        }
        json
    }
}
