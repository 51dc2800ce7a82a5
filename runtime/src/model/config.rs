//! `config.json` of a decoder-only model: keys keep the checkpoint's names, every number is checked.

use serde_json::Value;

use super::arch::{self, Arch, Bias, Factor, NormWeights, QkNorm, RopeRule, Window};
use super::rope::Rope;
use crate::backend::Activation;
use crate::error::{Error, ErrorKind, Result};

/// Largest value accepted for any size in a configuration; real ones are far below, and products of three stay in u64.
const MAX_SIZE: u64 = 1 << 20;
/// Most experts of a layer, and most that a token goes through.
const MAX_EXPERTS: usize = 1024;
const MAX_EXPERTS_PER_TOKEN: usize = 32;

/// Hyper-parameters of a checkpoint.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// Class name in `architectures`, e.g. `LlamaForCausalLM`; for a multimodal file that of its text part.
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
    /// The function on the gate of the MLP.
    pub activation: Activation,
    /// What differs between layers.
    pub layers: Vec<LayerConfig>,
    /// Rotary embeddings; layers name theirs.
    pub ropes: Vec<Rope>,
    /// Factor on embedded tokens.
    pub embedding_multiplier: f32,
    /// Factor on the results of attention and MLP before they are added to the residual stream.
    pub residual_multiplier: f32,
    /// Factor on the products of queries and keys.
    pub attention_multiplier: f32,
    /// Bound of attention scores.
    pub attention_softcap: Option<f32>,
    /// Factor on the logits.
    pub logits_multiplier: f32,
    /// Bound of the logits.
    pub logits_softcap: Option<f32>,
    /// Whether attention and MLP read the same normalised input instead of following each other.
    pub parallel_residual: bool,
    /// The mixture of experts of sparse layers.
    pub experts: Option<ExpertConfig>,
    pub(super) qk_norm: QkNorm,
    pub(super) arch: &'static Arch,
}

/// What differs between the layers of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// Sliding window in tokens, the token itself included; `None` sees everything.
    pub window: Option<u32>,
    /// Index of the rotary embedding in [`ModelConfig::ropes`]; `None` rotates nothing.
    pub rope: Option<u32>,
    /// Whether the MLP is the mixture of experts.
    pub sparse: bool,
}

/// A mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertConfig {
    /// Experts of a layer.
    pub count: usize,
    /// Experts that a token goes through.
    pub per_token: usize,
    /// Width of an expert's gated MLP.
    pub intermediate_size: usize,
    /// Whether the weights of a token's experts are made to add up to 1.
    pub renormalise: bool,
    /// Width of the expert that every token goes through, if there is one.
    pub shared_intermediate_size: Option<usize>,
}

impl ModelConfig {
    /// Reads the parsed `config.json`; of a multimodal file, its text part.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] naming an architecture or option that is not implemented;
    /// [`ErrorKind::InvalidConfig`] naming a key that is missing, out of range or contradicts another one.
    pub fn from_json(config: &Value) -> Result<Self> {
        let (arch, values) = resolve(config)?;
        let reader = Reader { values: &values };
        reader.check_options(arch)?;

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
        let eps_key = if arch.norm == NormWeights::Layer { "layer_norm_eps" } else { "rms_norm_eps" };
        let eps = reader.number(eps_key)?.unwrap_or(1e-6);
        if !(0.0..1.0).contains(&eps) {
            return Err(invalid(format!("`{eps_key}` must be from 0 to 1, found {eps}")));
        }
        let residual_multiplier = reader.positive("residual_multiplier")?.unwrap_or(1.0);

        let mut ropes = vec![Rope::from_json(&values, head_dim, max_position_embeddings, arch.partial_rotary)?];
        if arch.rope == RopeRule::Local {
            ropes.push(Rope::local_from_json(&values, head_dim, max_position_embeddings)?);
        }
        let experts = reader.experts(arch)?;
        let layers = reader.layers(arch, num_hidden_layers, experts.is_some())?;
        let qk_norm = match arch.qk_norm {
            QkNorm::LayerPerHead if !reader.flag("qk_layernorm")?.unwrap_or(false) => QkNorm::None,
            rule => rule,
        };

        Ok(Self {
            layers,
            ropes,
            // Only the mixture's key counts where every layer is sparse.
            intermediate_size: match (reader.optional_size("intermediate_size")?, &experts) {
                (Some(size), _) => size,
                (None, Some(experts)) => experts.intermediate_size,
                (None, None) => return Err(invalid("`intermediate_size` is missing")),
            },
            vocab_size: reader
                .optional_u64("vocab_size", 1 << 24)?
                .filter(|&v| v > 0)
                .ok_or_else(|| invalid("`vocab_size` is missing or 0"))? as usize,
            tie_word_embeddings: reader.flag("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: reader.bias(arch.qkv_bias)?,
            o_bias: reader.bias(arch.o_bias)?,
            mlp_bias: reader.bias(arch.mlp_bias)?,
            activation: reader.activation(arch)?,
            rms_norm_eps: eps as f32,
            embedding_multiplier: reader.factor(arch.embedding_factor, 1.0, hidden_size)? as f32,
            residual_multiplier: residual_multiplier as f32,
            attention_multiplier: reader.factor(arch.score_factor, 1.0 / (head_dim as f64).sqrt(), hidden_size)? as f32,
            attention_softcap: reader.positive("attn_logit_softcapping")?.map(|cap| cap as f32),
            logits_multiplier: 1.0 / reader.positive("logits_scaling")?.unwrap_or(1.0) as f32,
            logits_softcap: reader.positive("final_logit_softcapping")?.map(|cap| cap as f32),
            parallel_residual: match arch.parallel {
                Some(key) => reader.flag(key)?.unwrap_or(false),
                None => false,
            },
            architecture: arch.class().to_owned(),
            hidden_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            max_position_embeddings,
            experts,
            qk_norm,
            arch,
        })
    }

    /// Positions the model is meant for: more than it was trained for where its rotation grows with the length.
    pub fn positions(&self) -> usize {
        self.ropes[0].positions(self.max_position_embeddings)
    }

    /// Whether the rows of a position's rotation are the same in sequences of `a` and of `b` tokens.
    pub fn same_rope_rows(&self, a: usize, b: usize) -> bool {
        self.ropes.iter().all(|rope| rope.same_rows(a, b))
    }

    /// Whether a sequence that grows from `a` to `b` tokens needs its keys computed again.
    pub fn keys_change(&self, a: usize, b: usize) -> bool {
        self.ropes.iter().any(|rope| rope.must_agree() && !rope.same_rows(a, b))
    }

    /// Whether a layer is that of Llama with the options of Qwen: norms in front, gated SiLU, one rotation, biases or
    /// norms of heads, windows; what is computed elsewhere than in [`super::Model`] can rely on it.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] naming the first thing that is not.
    pub fn require_plain(&self) -> Result<()> {
        let plain = [
            (self.arch.norm == NormWeights::Rms, "its norms"),
            (self.arch.names.is_llama(), "its tensor names"),
            (matches!(self.qk_norm, QkNorm::None | QkNorm::Heads), "its norms of q and k"),
            (self.activation == Activation::Silu, "its activation"),
            (self.experts.is_none(), "its mixture of experts"),
            (self.ropes.len() == 1 && self.layers.iter().all(|layer| layer.rope == Some(0)), "its rotary embeddings"),
            (self.ropes[0].rotary_dim == self.head_dim, "its partial rotary embedding"),
            (!self.ropes[0].must_agree(), "its rotary scaling"),
            (self.embedding_multiplier == 1.0 && self.residual_multiplier == 1.0, "its multipliers"),
            (self.attention_multiplier == 1.0 / (self.head_dim as f32).sqrt(), "its factor of attention"),
            (self.attention_softcap.is_none() && self.logits_softcap.is_none(), "its bounded scores"),
            (self.logits_multiplier == 1.0, "its factor of logits"),
            (!self.parallel_residual, "its parallel layers"),
        ];
        match plain.iter().find(|(is_plain, _)| !is_plain) {
            Some((_, what)) => Err(unsupported(format!("architecture `{}` here: {what}", self.architecture))),
            None => Ok(()),
        }
    }
}

/// The architecture of a configuration and its values: those of the text part of a multimodal one, with the
/// architecture's defaults where keys are left out.
fn resolve(config: &Value) -> Result<(&'static Arch, Value)> {
    let model_type = |config: &Value| config.get("model_type").and_then(Value::as_str).map(str::to_owned);
    let mut values = config.clone();
    let arch = match config.get("architectures").and_then(Value::as_array).map(Vec::as_slice) {
        Some([Value::String(class)]) if arch::has_text_config(class) => {
            let text = config.get("text_config").filter(|text| text.is_object());
            let text = text.ok_or_else(|| invalid(format!("`{class}` has no `text_config`")))?;
            values = text.clone();
            // The outer one decides about the head, which is not part of the text model.
            if let (Some(tied), Some(values)) = (config.get("tie_word_embeddings"), values.as_object_mut()) {
                values.entry("tie_word_embeddings").or_insert_with(|| tied.clone());
            }
            let model_type = model_type(text).ok_or_else(|| invalid("`text_config` has no `model_type`"))?;
            arch::of_model_type(&model_type)?
        }
        Some([Value::String(class)]) => arch::of_class(class)?,
        Some([_, _, ..]) => return Err(invalid("`architectures` names more than one class")),
        _ => match model_type(config) {
            Some(model_type) => arch::of_model_type(&model_type)?,
            None => return Err(invalid("neither `architectures` nor `model_type` names the model")),
        },
    };
    let defaults = serde_json::from_str(arch.defaults).unwrap_or_default();
    if let (Value::Object(defaults), Some(values)) = (defaults, values.as_object_mut()) {
        for (key, value) in defaults {
            values.entry(key).or_insert(value);
        }
    }
    Ok((arch, values))
}

struct Reader<'a> {
    values: &'a Value,
}

impl Reader<'_> {
    fn optional_u64(&self, key: &str, max: u64) -> Result<Option<u64>> {
        match self.values.get(key) {
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
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(n) if n.is_finite() => Ok(Some(n)),
                _ => Err(invalid(format!("`{key}` must be a number, found {value}"))),
            },
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(value) => Err(invalid(format!("`{key}` must be true or false, found {value}"))),
        }
    }

    fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(n) if n <= 0.0 => Err(invalid(format!("`{key}` must be a number above 0, found {n}"))),
            n => Ok(n),
        }
    }

    fn bias(&self, rule: Bias) -> Result<bool> {
        match rule {
            Bias::Never => Ok(false),
            Bias::Always => Ok(true),
            Bias::Key(key) => Ok(self.flag(key)?.unwrap_or(false)),
        }
    }

    fn factor(&self, rule: Factor, usual: f64, hidden_size: usize) -> Result<f64> {
        match rule {
            Factor::Usual => Ok(usual),
            Factor::SqrtHidden => Ok((hidden_size as f64).sqrt()),
            Factor::Key(key) => Ok(self.positive(key)?.unwrap_or(1.0)),
            Factor::InverseSqrt(key) => Ok(self.positive(key)?.map_or(usual, |n| 1.0 / n.sqrt())),
        }
    }

    /// Refuses options that change what is computed in a way that is not implemented.
    fn check_options(&self, arch: &Arch) -> Result<()> {
        for key in arch.off {
            if self.flag(key)?.unwrap_or(false) {
                return Err(unsupported(format!("`{key}` of {}", arch.class())));
            }
        }
        // In the file of an architecture that does not have them they would be ignored without a word.
        for key in arch::EXTRAS.iter().filter(|key| !arch.extras.contains(key)) {
            let found = self.values.get(key).filter(|v| !v.is_null() && v.as_f64() != Some(1.0));
            if let Some(found) = found {
                return Err(unsupported(format!("`{key}` {found} of {}", arch.class())));
            }
        }
        Ok(())
    }

    fn activation(&self, arch: &Arch) -> Result<Activation> {
        let name = arch.activation.iter().find_map(|key| self.values.get(key).and_then(Value::as_str));
        match name {
            None | Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Activation::GeluTanh),
            Some("gelu") => Ok(Activation::Gelu),
            Some(name) => Err(unsupported(format!("activation `{name}` of {}", arch.class()))),
        }
    }

    fn experts(&self, arch: &Arch) -> Result<Option<ExpertConfig>> {
        let Some(rule) = arch.experts else { return Ok(None) };
        let count = self.size(rule.count)?;
        let per_token = self.size("num_experts_per_tok")?;
        if per_token > count {
            return Err(invalid(format!("`num_experts_per_tok` {per_token} is above `{}` {count}", rule.count)));
        }
        if per_token > MAX_EXPERTS_PER_TOKEN || count > MAX_EXPERTS {
            return Err(unsupported(format!(
                "{per_token} of {count} experts a token (at most {MAX_EXPERTS_PER_TOKEN} of {MAX_EXPERTS})"
            )));
        }
        Ok(Some(ExpertConfig {
            count,
            per_token,
            intermediate_size: self.size(rule.width)?,
            renormalise: match rule.renormalise {
                Some(renormalise) => renormalise,
                None => self.flag("norm_topk_prob")?.unwrap_or(false),
            },
            shared_intermediate_size: rule.shared_width.map(|key| self.size(key)).transpose()?,
        }))
    }

    /// A list with an entry a layer.
    fn list(&self, key: &str, layers: usize) -> Result<Option<&[Value]>> {
        match self.values.get(key).filter(|v| !v.is_null()) {
            None => Ok(None),
            Some(Value::Array(list)) if list.len() == layers => Ok(Some(list)),
            Some(Value::Array(list)) => Err(invalid(format!("`{key}` has {} entries for {layers} layers", list.len()))),
            Some(other) => Err(invalid(format!("`{key}` must be a list, found {other}"))),
        }
    }

    fn layers(&self, arch: &Arch, n: usize, experts: bool) -> Result<Vec<LayerConfig>> {
        let rotated: Vec<bool> = match arch.rope {
            RopeRule::One | RopeRule::Local => vec![true; n],
            RopeRule::Skipped => match self.list("no_rope_layers", n)? {
                Some(list) => list
                    .iter()
                    .map(|v| match v.as_u64().or_else(|| v.as_bool().map(u64::from)) {
                        Some(rotates @ 0..=1) => Ok(rotates == 1),
                        _ => Err(invalid(format!("`no_rope_layers` holds {v}, expected 0 or 1"))),
                    })
                    .collect::<Result<_>>()?,
                None => {
                    let interval = self.optional_size("no_rope_layer_interval")?.unwrap_or(4);
                    (1..=n).map(|layer| !layer.is_multiple_of(interval)).collect()
                }
            },
        };
        let windows = self.windows(arch, n, &rotated)?;
        let sparse = if experts { self.sparse_layers(n)? } else { vec![false; n] };
        let layers = windows.into_iter().zip(rotated).zip(sparse).map(|((window, rotated), sparse)| {
            let table = u32::from(arch.rope == RopeRule::Local && window.is_some());
            LayerConfig { window, rope: rotated.then_some(table), sparse }
        });
        Ok(layers.collect())
    }

    /// `decoder_sparse_step` and `mlp_only_layers`, which only some mixtures have.
    fn sparse_layers(&self, n: usize) -> Result<Vec<bool>> {
        let step = self.optional_size("decoder_sparse_step")?.unwrap_or(1);
        let dense = match self.values.get("mlp_only_layers").filter(|v| !v.is_null()) {
            None => Vec::new(),
            Some(value) => {
                let list = value.as_array().ok_or_else(|| invalid("`mlp_only_layers` must be a list"))?;
                let layer = |v: &Value| v.as_u64().ok_or_else(|| invalid(format!("`mlp_only_layers` holds {v}")));
                list.iter().map(layer).collect::<Result<Vec<_>>>()?
            }
        };
        Ok((0..n).map(|layer| (layer + 1).is_multiple_of(step) && !dense.contains(&(layer as u64))).collect())
    }

    /// `layer_types` of newer configurations decides where the architecture reads it, otherwise its older rule.
    fn windows(&self, arch: &Arch, layers: usize, rotated: &[bool]) -> Result<Vec<Option<u32>>> {
        let window = self.optional_u64("sliding_window", u64::from(u32::MAX))?.map(|w| w as u32);
        if window == Some(0) {
            return Err(invalid("`sliding_window` is 0"));
        }
        // The number alone means nothing where there is a switch: files carry it although the window is off.
        let on = match arch.window {
            Window::Never => false,
            Window::EveryLayer | Window::Pattern(_) => true,
            Window::Switched | Window::FromLayer | Window::WithoutRope => {
                self.flag("use_sliding_window")?.unwrap_or(false)
            }
        };
        if !on {
            return Ok(vec![None; layers]);
        }
        let reads_types = !matches!(arch.window, Window::EveryLayer | Window::Switched);
        if let Some(types) = self.list("layer_types", layers)?.filter(|_| reads_types) {
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
        let from = self.optional_u64("max_window_layers", MAX_SIZE)?.map_or(layers, |n| n as usize);
        let slides = |layer: usize| -> Result<bool> {
            Ok(match arch.window {
                Window::FromLayer => layer >= from,
                Window::WithoutRope => !rotated[layer],
                Window::Pattern(usual) => {
                    let pattern = self.optional_size("sliding_window_pattern")?.unwrap_or(usual);
                    !(layer + 1).is_multiple_of(pattern)
                }
                Window::Never | Window::EveryLayer | Window::Switched => true,
            })
        };
        (0..layers).map(|layer| Ok(if slides(layer)? { window } else { None })).collect()
    }
}

pub(super) fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidConfig, message)
}

pub(super) fn unsupported(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, message)
}

#[cfg(test)]
mod tests;
