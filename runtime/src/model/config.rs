//! `config.json` of a decoder-only model: keys keep the checkpoint's names, every number is checked.

use serde_json::Value;

use super::arch::{self, Arch, Window};
use super::rope::Rope;
use crate::error::{Error, ErrorKind, Result};

/// Largest value accepted for any size in a configuration; real ones are far below, and products of three stay in u64.
const MAX_SIZE: u64 = 1 << 20;

/// Hyper-parameters of a checkpoint.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// Class name in `architectures`, e.g. `LlamaForCausalLM`.
    pub architecture: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Elements of a head; `heads * head_dim` need not equal `hidden_size`.
    pub head_dim: usize,
    /// Entries of the embedding table.
    pub vocab_size: usize,
    /// Positions the model was trained for.
    pub max_position_embeddings: usize,
    /// Added to the mean of squares in every norm.
    pub rms_norm_eps: f32,
    /// Whether the embedding table is also the output head.
    pub tie_word_embeddings: bool,
    /// Whether q, k and v projections have biases.
    pub qkv_bias: bool,
    /// Whether the output projection of attention has a bias.
    pub o_bias: bool,
    /// Whether the MLP projections have biases.
    pub mlp_bias: bool,
    /// Sliding window of each layer, in tokens; `None` sees everything.
    pub windows: Vec<Option<u32>>,
    /// Rotary embedding.
    pub rope: Rope,
    pub(super) arch: &'static Arch,
}

impl ModelConfig {
    /// Reads the parsed `config.json`.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] naming an architecture or option that is not implemented;
    /// [`ErrorKind::InvalidConfig`] naming a key that is missing, out of range or contradicts another one.
    pub fn from_json(config: &Value) -> Result<Self> {
        let reader = Reader { config };
        let architecture = reader.architecture()?;
        let arch = arch::find(&architecture)?;
        if let Some(act) = config.get("hidden_act").and_then(Value::as_str)
            && act != "silu"
            && act != "swish"
        {
            return Err(unsupported(format!("activation `{act}` of {architecture}")));
        }

        let hidden_size = reader.size("hidden_size")?;
        let num_hidden_layers = reader.size("num_hidden_layers")?;
        let num_attention_heads = reader.size("num_attention_heads")?;
        let num_key_value_heads = reader.optional_size("num_key_value_heads")?.unwrap_or(num_attention_heads);
        let head_dim = match reader.optional_size("head_dim")? {
            Some(dim) => dim,
            None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
            None => {
                return Err(invalid(format!(
                    "`hidden_size` {hidden_size} is not a multiple of `num_attention_heads` {num_attention_heads} \
                     and there is no `head_dim`"
                )));
            }
        };
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            return Err(invalid(format!(
                "`num_attention_heads` {num_attention_heads} is not a multiple of `num_key_value_heads` \
                 {num_key_value_heads}"
            )));
        }
        if !head_dim.is_multiple_of(2) || head_dim > 256 {
            return Err(unsupported(format!("`head_dim` {head_dim} (even, at most 256)")));
        }
        if num_hidden_layers > 1024 {
            return Err(invalid(format!("`num_hidden_layers` {num_hidden_layers} is above 1024")));
        }
        let max_position_embeddings = reader.optional_u64("max_position_embeddings", 1 << 28)?.unwrap_or(2048) as usize;
        let eps = reader.number("rms_norm_eps")?.unwrap_or(1e-6);
        if !(0.0..1.0).contains(&eps) {
            return Err(invalid(format!("`rms_norm_eps` must be from 0 to 1, found {eps}")));
        }
        let attention_bias = reader.flag("attention_bias")?.unwrap_or(false);

        Ok(Self {
            windows: reader.windows(arch, num_hidden_layers)?,
            rope: Rope::from_json(config, head_dim, max_position_embeddings)?,
            intermediate_size: reader.size("intermediate_size")?,
            vocab_size: reader
                .optional_u64("vocab_size", 1 << 24)?
                .filter(|&v| v > 0)
                .ok_or_else(|| invalid("`vocab_size` is missing or 0"))? as usize,
            tie_word_embeddings: reader.flag("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: arch.qkv_bias || (arch.config_bias && attention_bias),
            o_bias: arch.config_bias && attention_bias,
            mlp_bias: arch.config_bias && reader.flag("mlp_bias")?.unwrap_or(false),
            rms_norm_eps: eps as f32,
            architecture,
            hidden_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            max_position_embeddings,
            arch,
        })
    }
}

struct Reader<'a> {
    config: &'a Value,
}

impl Reader<'_> {
    fn architecture(&self) -> Result<String> {
        let names = self.config.get("architectures").and_then(Value::as_array);
        match names.map(Vec::as_slice) {
            Some([Value::String(name)]) => Ok(name.clone()),
            Some([_, _, ..]) => Err(invalid("`architectures` names more than one class")),
            _ => match self.config.get("model_type").and_then(Value::as_str) {
                Some(model_type) => arch::class_of_model_type(model_type).map(Into::into),
                None => Err(invalid("neither `architectures` nor `model_type` names the model")),
            },
        }
    }

    fn optional_u64(&self, key: &str, max: u64) -> Result<Option<u64>> {
        match self.config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_u64() {
                Some(n) if n <= max => Ok(Some(n)),
                _ => Err(invalid(format!("`{key}` must be a whole number up to {max}, found {value}"))),
            },
        }
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        match self.optional_u64(key, MAX_SIZE)? {
            Some(0) => Err(invalid(format!("`{key}` is 0"))),
            n => Ok(n.map(|n| n as usize)),
        }
    }

    fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?.ok_or_else(|| invalid(format!("`{key}` is missing")))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(n) if n.is_finite() => Ok(Some(n)),
                _ => Err(invalid(format!("`{key}` must be a number, found {value}"))),
            },
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(value) => Err(invalid(format!("`{key}` must be true or false, found {value}"))),
        }
    }

    /// `layer_types` of newer configurations decides if present, otherwise the architecture's older rule.
    fn windows(&self, arch: &Arch, layers: usize) -> Result<Vec<Option<u32>>> {
        let window = self.optional_u64("sliding_window", u64::from(u32::MAX))?.map(|w| w as u32);
        if window == Some(0) {
            return Err(invalid("`sliding_window` is 0"));
        }
        let from = match arch.window {
            Window::Never => return Ok(vec![None; layers]),
            Window::EveryLayer => 0,
            // The number alone means nothing: files carry it although the window is off.
            Window::FromLayer if !self.flag("use_sliding_window")?.unwrap_or(false) => return Ok(vec![None; layers]),
            Window::FromLayer => self.optional_u64("max_window_layers", MAX_SIZE)?.map_or(layers, |n| n as usize),
        };
        if let Some(types) = self.config.get("layer_types").and_then(Value::as_array) {
            if types.len() != layers {
                let message = format!("`layer_types` has {} entries for {layers} layers", types.len());
                return Err(invalid(message));
            }
            return types
                .iter()
                .map(|t| match t.as_str() {
                    Some("full_attention") => Ok(None),
                    Some("sliding_attention") if window.is_some() => Ok(window),
                    Some("sliding_attention") => Err(invalid("`layer_types` slides but `sliding_window` is missing")),
                    _ => Err(unsupported(format!("layer type {t}"))),
                })
                .collect();
        }
        Ok((0..layers).map(|layer| window.filter(|_| layer >= from)).collect())
    }
}

pub(super) fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidConfig, message)
}

pub(super) fn unsupported(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, message)
}
