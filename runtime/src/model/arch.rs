//! Architectures as data: what distinguishes one decoder from another beyond the numbers of its configuration.

use super::config::unsupported;
use crate::error::Result;

/// When a layer's attention is limited to a sliding window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Window {
    /// Whatever the configuration says.
    Never,
    /// Every layer, if `sliding_window` is a number.
    EveryLayer,
    /// Layers from `max_window_layers` on, if `use_sliding_window` is true.
    FromLayer,
}

/// One architecture. Tensor names are those of Hugging Face decoders: `model.layers.N.self_attn.q_proj` and so on.
#[derive(Debug)]
pub(super) struct Arch {
    /// Class name in `architectures`.
    class: &'static str,
    /// `model_type`, for configurations without `architectures`.
    model_type: &'static str,
    /// q, k and v projections always have biases.
    pub(super) qkv_bias: bool,
    /// `attention_bias` and `mlp_bias` of the configuration add biases.
    pub(super) config_bias: bool,
    /// RMSNorm over each head of q and k (`q_norm`, `k_norm`) before the rotation.
    pub(super) qk_norm: bool,
    pub(super) window: Window,
}

/// Every architecture this build runs. Llama also covers Code Llama, SmolLM2 and other models saved as Llama.
const ARCHS: &[Arch] = &[
    Arch {
        class: "LlamaForCausalLM",
        model_type: "llama",
        qkv_bias: false,
        config_bias: true,
        qk_norm: false,
        window: Window::Never,
    },
    Arch {
        class: "MistralForCausalLM",
        model_type: "mistral",
        qkv_bias: false,
        config_bias: false,
        qk_norm: false,
        window: Window::EveryLayer,
    },
    Arch {
        class: "Qwen2ForCausalLM",
        model_type: "qwen2",
        qkv_bias: true,
        config_bias: false,
        qk_norm: false,
        window: Window::FromLayer,
    },
    Arch {
        class: "Qwen3ForCausalLM",
        model_type: "qwen3",
        qkv_bias: false,
        config_bias: true,
        qk_norm: true,
        window: Window::FromLayer,
    },
];

pub(super) fn find(class: &str) -> Result<&'static Arch> {
    ARCHS.iter().find(|arch| arch.class == class).ok_or_else(|| {
        let known: Vec<_> = ARCHS.iter().map(|arch| arch.class).collect();
        unsupported(format!("architecture `{class}` (this build runs {})", known.join(", ")))
    })
}

pub(super) fn class_of_model_type(model_type: &str) -> Result<&'static str> {
    ARCHS
        .iter()
        .find(|arch| arch.model_type == model_type)
        .map(|arch| arch.class)
        .ok_or_else(|| unsupported(format!("model type `{model_type}`")))
}
