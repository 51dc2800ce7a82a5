//! Architectures as data: what distinguishes one decoder from another beyond the numbers of its configuration.
//!
//! A new architecture is an [`Arch`]; its tensor names are [`Names`], which often exist already. What no field here can
//! say is a field of [`super::ModelConfig`], or an operation of [`crate::backend::Op`].

use super::config::unsupported;
use crate::error::Result;

/// When a layer's attention is limited to a sliding window of `sliding_window` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Window {
    /// Whatever the configuration says.
    Never,
    /// Every layer, if `sliding_window` is a number.
    EveryLayer,
    /// Every layer if `use_sliding_window` is true.
    Switched,
    /// Layers from `max_window_layers` on if `use_sliding_window` is true, unless `layer_types` says otherwise.
    FromLayer,
    /// Layers without rotation if `use_sliding_window` is true, unless `layer_types` says otherwise.
    WithoutRope,
    /// All but every `sliding_window_pattern`th layer (or every one of the given number), unless `layer_types` says
    /// otherwise.
    Pattern(usize),
}

/// Which rotation a layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RopeRule {
    /// The same in every layer.
    One,
    /// One with the base `rope_local_base_freq` and no scaling in layers with a window, another one in the others.
    Local,
    /// None where `no_rope_layers` holds a 0, or in every `no_rope_layer_interval`th layer.
    Skipped,
}

/// How much of q and k is normalised before the rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum QkNorm {
    /// Nothing.
    None,
    /// Each head, with one weight for all.
    Heads,
    /// All heads together.
    Whole,
    /// Each head, with weights of its own and the mean subtracted, if `qk_layernorm` is true.
    LayerPerHead,
}

/// What the weights of norms mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NormWeights {
    /// Factors of a root mean square norm.
    Rms,
    /// Factors of a root mean square norm, less one.
    RmsPlusOne,
    /// Factors and biases of a layer norm.
    Layer,
}

/// Where a factor comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Factor {
    /// The usual one: 1, or 1 / sqrt(head_dim) for scores.
    Usual,
    /// sqrt(hidden_size)
    SqrtHidden,
    /// The value of this key.
    Key(&'static str),
    /// 1 / sqrt of the value of this key.
    InverseSqrt(&'static str),
}

/// Which projections have biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bias {
    Never,
    Always,
    /// If the value of this key is true.
    Key(&'static str),
}

/// A mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Experts {
    /// Key of their number.
    pub(super) count: &'static str,
    /// Key of the width of one.
    pub(super) width: &'static str,
    /// Whether the weights of the chosen ones are made to add up to 1; `None` is up to `norm_topk_prob`.
    pub(super) renormalise: Option<bool>,
    /// Key of the width of the expert that every token goes through, if there is one.
    pub(super) shared_width: Option<&'static str>,
}

/// Names of a layer's norms; those an architecture does not have are `None`.
#[derive(Debug)]
pub(super) struct NormNames {
    /// In front of attention.
    pub(super) attention_in: Option<&'static str>,
    /// Behind attention, before its result is added.
    pub(super) attention_out: Option<&'static str>,
    /// In front of the MLP.
    pub(super) mlp_in: Option<&'static str>,
    /// Behind the MLP, before its result is added.
    pub(super) mlp_out: Option<&'static str>,
}

/// Names of several matrices with one input.
#[derive(Debug)]
pub(super) enum Stacked {
    /// A module each.
    Apart(&'static [&'static str]),
    /// One module with the rows of all, one behind the other.
    Fused(&'static str),
    /// q, k and v in one module: the query heads of a key/value head, that head of k, that head of v, and so on.
    Grouped(&'static str),
}

/// Names of a mixture's modules inside a layer.
#[derive(Debug)]
pub(super) struct ExpertNames {
    /// The choice among experts.
    pub(super) router: &'static str,
    /// What stands in front of the number of an expert.
    pub(super) prefix: &'static str,
    /// gate, up, down of an expert.
    pub(super) projections: [&'static str; 3],
    /// What stands in front of the shared expert's gate, up and down, and the module of its own gate.
    pub(super) shared: [&'static str; 2],
}

/// Tensor names. Where the model proper begins (`model.` or deeper) is found in the file.
#[derive(Debug)]
pub(super) struct Names {
    pub(super) embedding: &'static str,
    pub(super) head: &'static str,
    pub(super) final_norm: &'static str,
    pub(super) norms: NormNames,
    pub(super) qkv: Stacked,
    pub(super) attention_out: &'static str,
    /// Norms of q and k.
    pub(super) qk_norms: [&'static str; 2],
    pub(super) gate_up: Stacked,
    pub(super) down: &'static str,
    pub(super) experts: Option<ExpertNames>,
}

impl Names {
    /// Whether they are those of Llama, norms aside.
    pub(super) fn is_llama(&self) -> bool {
        matches!(self.qkv, Stacked::Apart(_))
            && self.down == LLAMA_NAMES.down
            && self.norms.attention_in.is_some()
            && self.norms.attention_out.is_none()
    }
}

const PRE_NORMS: NormNames = NormNames {
    attention_in: Some("input_layernorm"),
    attention_out: None,
    mlp_in: Some("post_attention_layernorm"),
    mlp_out: None,
};

const LLAMA_NAMES: Names = Names {
    embedding: "embed_tokens",
    head: "lm_head",
    final_norm: "norm",
    norms: PRE_NORMS,
    qkv: Stacked::Apart(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    attention_out: "self_attn.o_proj",
    qk_norms: ["self_attn.q_norm", "self_attn.k_norm"],
    gate_up: Stacked::Apart(&["mlp.gate_proj", "mlp.up_proj"]),
    down: "mlp.down_proj",
    experts: None,
};

const GEMMA2_NORMS: NormNames = NormNames {
    attention_in: Some("input_layernorm"),
    attention_out: Some("post_attention_layernorm"),
    mlp_in: Some("pre_feedforward_layernorm"),
    mlp_out: Some("post_feedforward_layernorm"),
};

const GEMMA_ACTIVATION: &[&str] = &["hidden_activation", "hidden_act"];

const QWEN_EXPERTS: ExpertNames = ExpertNames {
    router: "mlp.gate",
    prefix: "mlp.experts",
    projections: ["gate_proj", "up_proj", "down_proj"],
    shared: ["mlp.shared_expert", "mlp.shared_expert_gate"],
};

/// Keys that change what is computed and that few architectures have.
pub(super) const EXTRAS: &[&str] = &[
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
];

/// One architecture.
#[derive(Debug)]
pub(super) struct Arch {
    /// Class names in `architectures`.
    classes: &'static [&'static str],
    /// `model_type`, for configurations without `architectures` and for the text part of others.
    model_types: &'static [&'static str],
    /// JSON object: values of keys that a file may leave out, where they differ from everybody's.
    pub(super) defaults: &'static str,
    /// Keys of the activation, the first one that is there decides.
    pub(super) activation: &'static [&'static str],
    /// Those of [`EXTRAS`] that count.
    pub(super) extras: &'static [&'static str],
    /// Keys that have to be false, if they are there: what they switch on is not implemented.
    pub(super) off: &'static [&'static str],
    pub(super) names: Names,
    pub(super) norm: NormWeights,
    pub(super) qkv_bias: Bias,
    pub(super) o_bias: Bias,
    pub(super) mlp_bias: Bias,
    pub(super) qk_norm: QkNorm,
    pub(super) window: Window,
    pub(super) rope: RopeRule,
    /// `partial_rotary_factor` counts.
    pub(super) partial_rotary: bool,
    /// Attention and MLP read the same norm if this key is true.
    pub(super) parallel: Option<&'static str>,
    pub(super) embedding_factor: Factor,
    pub(super) score_factor: Factor,
    pub(super) experts: Option<Experts>,
}

/// What most have in common.
const LLAMA: Arch = Arch {
    classes: &["LlamaForCausalLM", "LLaMAForCausalLM", "YiForCausalLM"],
    model_types: &["llama", "Yi"],
    defaults: "{}",
    activation: &["hidden_act"],
    extras: &[],
    off: &[],
    names: LLAMA_NAMES,
    norm: NormWeights::Rms,
    qkv_bias: Bias::Key("attention_bias"),
    o_bias: Bias::Key("attention_bias"),
    mlp_bias: Bias::Key("mlp_bias"),
    qk_norm: QkNorm::None,
    window: Window::Never,
    rope: RopeRule::One,
    partial_rotary: false,
    parallel: None,
    embedding_factor: Factor::Usual,
    score_factor: Factor::Usual,
    experts: None,
};

/// Llama without the options of biases.
const NO_BIAS: Arch = Arch { qkv_bias: Bias::Never, o_bias: Bias::Never, mlp_bias: Bias::Never, ..LLAMA };

/// Every architecture this build runs.
const ARCHS: &[Arch] = &[
    // Also Code Llama, SmolLM2, Yi, DeepSeek-R1-Distill-Llama and other models saved as Llama.
    LLAMA,
    // Also Mistral-Nemo and Ministral-8B.
    Arch {
        classes: &["MistralForCausalLM"],
        model_types: &["mistral"],
        defaults: r#"{"num_key_value_heads": 8, "sliding_window": 4096}"#,
        window: Window::EveryLayer,
        ..NO_BIAS
    },
    Arch {
        classes: &["MinistralForCausalLM"],
        model_types: &["ministral"],
        defaults: r#"{"num_key_value_heads": 8, "sliding_window": 4096}"#,
        window: Window::Pattern(usize::MAX),
        ..NO_BIAS
    },
    // Also Qwen2.5, Qwen2.5-Coder and DeepSeek-R1-Distill-Qwen.
    Arch {
        classes: &["Qwen2ForCausalLM"],
        model_types: &["qwen2"],
        qkv_bias: Bias::Always,
        window: Window::FromLayer,
        ..NO_BIAS
    },
    Arch {
        classes: &["Qwen3ForCausalLM"],
        model_types: &["qwen3"],
        defaults: r#"{"head_dim": 128, "num_key_value_heads": 32}"#,
        mlp_bias: Bias::Never,
        qk_norm: QkNorm::Heads,
        window: Window::FromLayer,
        ..LLAMA
    },
    Arch {
        classes: &["GemmaForCausalLM"],
        model_types: &["gemma"],
        defaults: r#"{"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": true}"#,
        activation: GEMMA_ACTIVATION,
        norm: NormWeights::RmsPlusOne,
        mlp_bias: Bias::Never,
        embedding_factor: Factor::SqrtHidden,
        ..LLAMA
    },
    Arch {
        classes: &["Gemma2ForCausalLM"],
        model_types: &["gemma2"],
        defaults: r#"{"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": true,
            "query_pre_attn_scalar": 256, "sliding_window": 4096, "num_key_value_heads": 4,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}"#,
        activation: GEMMA_ACTIVATION,
        extras: &["attn_logit_softcapping", "final_logit_softcapping"],
        off: &["use_bidirectional_attention"],
        names: Names { norms: GEMMA2_NORMS, ..LLAMA_NAMES },
        norm: NormWeights::RmsPlusOne,
        mlp_bias: Bias::Never,
        window: Window::Pattern(2),
        embedding_factor: Factor::SqrtHidden,
        score_factor: Factor::InverseSqrt("query_pre_attn_scalar"),
        ..LLAMA
    },
    Arch {
        classes: &["Gemma3ForCausalLM"],
        model_types: &["gemma3_text"],
        // The text part of a multimodal configuration leaves out whatever has its default.
        defaults: r#"{"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rope_theta": 1000000.0,
            "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131072, "tie_word_embeddings": true,
            "query_pre_attn_scalar": 256, "sliding_window": 4096, "rope_local_base_freq": 10000.0}"#,
        activation: GEMMA_ACTIVATION,
        extras: &["final_logit_softcapping"],
        off: &["use_bidirectional_attention"],
        names: Names { norms: GEMMA2_NORMS, ..LLAMA_NAMES },
        norm: NormWeights::RmsPlusOne,
        mlp_bias: Bias::Never,
        qk_norm: QkNorm::Heads,
        window: Window::Pattern(6),
        rope: RopeRule::Local,
        embedding_factor: Factor::SqrtHidden,
        score_factor: Factor::InverseSqrt("query_pre_attn_scalar"),
        ..LLAMA
    },
    // Also Phi-3.5-mini and Phi-4.
    Arch {
        classes: &["Phi3ForCausalLM"],
        model_types: &["phi3"],
        defaults: r#"{"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}"#,
        names: Names {
            qkv: Stacked::Fused("self_attn.qkv_proj"),
            gate_up: Stacked::Fused("mlp.gate_up_proj"),
            ..LLAMA_NAMES
        },
        window: Window::EveryLayer,
        partial_rotary: true,
        ..NO_BIAS
    },
    Arch {
        classes: &["Olmo2ForCausalLM"],
        model_types: &["olmo2"],
        defaults: r#"{"rms_norm_eps": 1e-5}"#,
        names: Names {
            norms: NormNames {
                attention_in: None,
                attention_out: Some("post_attention_layernorm"),
                mlp_in: None,
                mlp_out: Some("post_feedforward_layernorm"),
            },
            ..LLAMA_NAMES
        },
        mlp_bias: Bias::Never,
        qk_norm: QkNorm::Whole,
        ..LLAMA
    },
    Arch {
        classes: &["GraniteForCausalLM"],
        model_types: &["granite"],
        defaults: r#"{"attention_multiplier": 1.0}"#,
        extras: &["embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"],
        embedding_factor: Factor::Key("embedding_multiplier"),
        score_factor: Factor::Key("attention_multiplier"),
        ..LLAMA
    },
    Arch {
        classes: &["SmolLM3ForCausalLM"],
        model_types: &["smollm3"],
        defaults: r#"{"num_key_value_heads": 4, "rope_theta": 2000000.0, "tie_word_embeddings": true}"#,
        window: Window::WithoutRope,
        rope: RopeRule::Skipped,
        ..LLAMA
    },
    Arch {
        classes: &["StableLmForCausalLM", "StableLMEpochForCausalLM"],
        model_types: &["stablelm", "stablelm_epoch"],
        defaults: r#"{"partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5}"#,
        names: Names { qk_norms: ["self_attn.q_layernorm", "self_attn.k_layernorm"], ..LLAMA_NAMES },
        norm: NormWeights::Layer,
        qkv_bias: Bias::Key("use_qkv_bias"),
        qk_norm: QkNorm::LayerPerHead,
        partial_rotary: true,
        parallel: Some("use_parallel_residual"),
        ..NO_BIAS
    },
    Arch {
        classes: &["InternLM2ForCausalLM"],
        model_types: &["internlm2"],
        defaults: r#"{"bias": true}"#,
        names: Names {
            embedding: "tok_embeddings",
            head: "output",
            norms: NormNames {
                attention_in: Some("attention_norm"),
                attention_out: None,
                mlp_in: Some("ffn_norm"),
                mlp_out: None,
            },
            qkv: Stacked::Grouped("attention.wqkv"),
            attention_out: "attention.wo",
            gate_up: Stacked::Apart(&["feed_forward.w1", "feed_forward.w3"]),
            down: "feed_forward.w2",
            ..LLAMA_NAMES
        },
        qkv_bias: Bias::Key("bias"),
        o_bias: Bias::Key("bias"),
        ..NO_BIAS
    },
    Arch {
        classes: &["InternLM3ForCausalLM"],
        model_types: &["internlm3"],
        qkv_bias: Bias::Key("qkv_bias"),
        o_bias: Bias::Key("bias"),
        mlp_bias: Bias::Key("bias"),
        ..LLAMA
    },
];

/// The mixtures of experts.
const MIXTURES: &[Arch] = &[
    Arch {
        classes: &["MixtralForCausalLM"],
        model_types: &["mixtral"],
        defaults: r#"{"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
            "num_experts_per_tok": 2, "num_local_experts": 8}"#,
        names: Names {
            experts: Some(ExpertNames {
                router: "block_sparse_moe.gate",
                prefix: "block_sparse_moe.experts",
                projections: ["w1", "w3", "w2"],
                shared: ["", ""],
            }),
            ..LLAMA_NAMES
        },
        window: Window::EveryLayer,
        experts: Some(Experts {
            count: "num_local_experts",
            width: "intermediate_size",
            renormalise: Some(true),
            shared_width: None,
        }),
        ..NO_BIAS
    },
    Arch {
        classes: &["Qwen2MoeForCausalLM"],
        model_types: &["qwen2_moe"],
        defaults: r#"{"num_key_value_heads": 16, "qkv_bias": true, "num_experts": 60, "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}"#,
        names: Names { experts: Some(QWEN_EXPERTS), ..LLAMA_NAMES },
        qkv_bias: Bias::Key("qkv_bias"),
        window: Window::FromLayer,
        experts: Some(Experts {
            count: "num_experts",
            width: "moe_intermediate_size",
            renormalise: None,
            shared_width: Some("shared_expert_intermediate_size"),
        }),
        ..NO_BIAS
    },
    Arch {
        classes: &["Qwen3MoeForCausalLM"],
        model_types: &["qwen3_moe"],
        defaults: r#"{"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
            "moe_intermediate_size": 768}"#,
        names: Names { experts: Some(QWEN_EXPERTS), ..LLAMA_NAMES },
        mlp_bias: Bias::Never,
        qk_norm: QkNorm::Heads,
        window: Window::Switched,
        experts: Some(Experts {
            count: "num_experts",
            width: "moe_intermediate_size",
            renormalise: None,
            shared_width: None,
        }),
        ..LLAMA
    },
];

fn all() -> impl Iterator<Item = &'static Arch> {
    ARCHS.iter().chain(MIXTURES)
}

/// The architecture of a class in `architectures`.
pub(super) fn of_class(class: &str) -> Result<&'static Arch> {
    all().find(|arch| arch.classes.contains(&class)).ok_or_else(|| {
        let known: Vec<_> = all().map(|arch| arch.classes[0]).collect();
        unsupported(format!("architecture `{class}` (this build runs {})", known.join(", ")))
    })
}

/// The architecture of a `model_type`.
pub(super) fn of_model_type(model_type: &str) -> Result<&'static Arch> {
    all()
        .find(|arch| arch.model_types.contains(&model_type))
        .ok_or_else(|| unsupported(format!("model type `{model_type}`")))
}

/// Whether the text part of a multimodal class is a model of its own, whose `text_config` is its configuration.
pub(super) fn has_text_config(class: &str) -> bool {
    ["Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration"].contains(&class)
}

impl Arch {
    /// Class name of models that are nothing else.
    pub(super) fn class(&self) -> &'static str {
        self.classes[0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_json_and_names_are_unique() {
        let mut seen: Vec<&str> = Vec::new();
        for arch in all() {
            assert!(serde_json::from_str::<serde_json::Value>(arch.defaults).unwrap().is_object(), "{}", arch.class());
            seen.extend(arch.classes.iter().chain(arch.model_types));
            assert_eq!(arch.experts.is_some(), arch.names.experts.is_some(), "{}", arch.class());
        }
        let n = seen.len();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), n);
    }
}
