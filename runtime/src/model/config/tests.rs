//! Configurations of the kinds that files have.

use super::*;
use serde_json::json;

/// A small configuration of a class with further values.
fn config(class: &str, more: &Value) -> Result<ModelConfig> {
    let mut values = json!({
        "architectures": [class], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 128,
    });
    if let (Some(values), Some(more)) = (values.as_object_mut(), more.as_object()) {
        values.extend(more.clone());
    }
    ModelConfig::from_json(&values)
}

fn layers(config: &ModelConfig) -> Vec<(Option<u32>, Option<u32>)> {
    config.layers.iter().map(|layer| (layer.window, layer.rope)).collect()
}

#[test]
fn old_and_new_keys_of_gemma_3_say_the_same() {
    let old = json!({
        "sliding_window": 8, "sliding_window_pattern": 2, "rope_theta": 1e6, "rope_local_base_freq": 5000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "head_dim": 16,
    });
    let new = json!({
        "sliding_window": 8, "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
    });
    let (old, new) = (config("Gemma3ForCausalLM", &old).unwrap(), config("Gemma3ForCausalLM", &new).unwrap());
    assert_eq!(old.ropes, new.ropes);
    assert_eq!(layers(&old), layers(&new));
    let (local, global) = ((Some(8), Some(1)), (None, Some(0)));
    assert_eq!(layers(&old), [local, global, local, global]);
    assert!(old.tie_word_embeddings && old.activation == Activation::GeluTanh);
}

#[test]
fn the_text_part_of_a_multimodal_file_has_its_own_defaults() {
    let text = json!({"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
        "num_hidden_layers": 34, "sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}});
    let whole = json!({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
        "text_config": text, "vision_config": {"hidden_size": 1152}});
    let config = ModelConfig::from_json(&whole).unwrap();
    assert_eq!((config.num_attention_heads, config.num_key_value_heads, config.head_dim), (8, 4, 256));
    assert_eq!((config.vocab_size, config.attention_multiplier), (262_208, 1.0 / 16.0));
    assert_eq!(config.layers.iter().filter(|layer| layer.window.is_none()).count(), 5);
    assert_eq!(config.architecture, "Gemma3ForCausalLM");
}

#[test]
fn layers_differ_as_their_keys_say() {
    let windows = |class: &str, more: Value| -> Vec<_> {
        config(class, &more).unwrap().layers.iter().map(|layer| layer.window.is_some()).collect()
    };
    let (on, off) = (true, false);
    assert_eq!(windows("Gemma2ForCausalLM", json!({"sliding_window": 8})), [on, off, on, off]);
    assert_eq!(windows("MistralForCausalLM", json!({})), [on; 4]);
    assert_eq!(windows("MistralForCausalLM", json!({"sliding_window": null})), [off; 4]);
    assert_eq!(windows("Qwen2ForCausalLM", json!({"sliding_window": 8})), [off; 4]);
    let from = json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 3});
    assert_eq!(windows("Qwen2ForCausalLM", from.clone()), [off, off, off, on]);
    assert_eq!(windows("Qwen3MoeForCausalLM", from), [on; 4]);

    let rotated = |more: Value| -> Vec<_> {
        config("SmolLM3ForCausalLM", &more).unwrap().layers.iter().map(|layer| layer.rope.is_some()).collect()
    };
    assert_eq!(rotated(json!({})), [on, on, on, off]);
    assert_eq!(rotated(json!({"no_rope_layer_interval": 2})), [on, off, on, off]);
    assert_eq!(rotated(json!({"no_rope_layers": [0, 1, 1, 0]})), [off, on, on, off]);

    let sparse = |more: Value| -> Vec<_> {
        config("Qwen2MoeForCausalLM", &more).unwrap().layers.iter().map(|layer| layer.sparse).collect()
    };
    assert_eq!(sparse(json!({})), [on; 4]);
    assert_eq!(sparse(json!({"decoder_sparse_step": 2, "mlp_only_layers": [3]})), [off, on, off, off]);
}

#[test]
fn what_is_not_implemented_is_refused_by_name() {
    let refused = |class: &str, kind: ErrorKind, name: &str, more: Value| {
        let error = config(class, &more).expect_err(name);
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.message().contains(name), "{error}");
    };
    let unsupported = |class: &str, name: &str, more: Value| refused(class, ErrorKind::Unsupported, name, more);
    unsupported("LlamaForSequenceClassification", "LlamaForSequenceClassification", json!({}));
    unsupported("LlamaForCausalLM", "relu2", json!({"hidden_act": "relu2"}));
    unsupported("LlamaForCausalLM", "partial_rotary_factor", json!({"partial_rotary_factor": 0.5}));
    unsupported("LlamaForCausalLM", "final_logit_softcapping", json!({"final_logit_softcapping": 30.0}));
    unsupported("LlamaForCausalLM", "residual_multiplier", json!({"residual_multiplier": 0.2}));
    unsupported("GemmaForCausalLM", "attn_logit_softcapping", json!({"attn_logit_softcapping": 50.0}));
    unsupported("Gemma3ForCausalLM", "use_bidirectional_attention", json!({"use_bidirectional_attention": true}));
    unsupported("Gemma2ForCausalLM", "chunked_attention", json!({"layer_types": vec!["chunked_attention"; 4]}));
    unsupported("MixtralForCausalLM", "experts a token", json!({"num_local_experts": 5000}));
    unsupported("StableLmForCausalLM", "partial_rotary_factor", json!({"partial_rotary_factor": 0.2}));

    let invalid = |class: &str, name: &str, more: Value| refused(class, ErrorKind::InvalidConfig, name, more);
    invalid("MixtralForCausalLM", "num_experts_per_tok", json!({"num_experts_per_tok": 9}));
    invalid("SmolLM3ForCausalLM", "no_rope_layers", json!({"no_rope_layers": [1, 0]}));
    invalid("SmolLM3ForCausalLM", "no_rope_layers", json!({"no_rope_layers": [1, 0, 2, 1]}));
    invalid("GraniteForCausalLM", "logits_scaling", json!({"logits_scaling": 0.0}));
    let long = json!({"type": "longrope", "short_factor": [1.0], "long_factor": vec![1.0; 8]});
    invalid("Phi3ForCausalLM", "short_factor", json!({"rope_scaling": long}));
    let unnamed = json!({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]});
    assert!(ModelConfig::from_json(&unnamed).unwrap_err().message().contains("text_config"));
}
