//! Checkpoints of real shapes with random weights, for measuring speed and memory where no model of that size is at
//! hand. They are complete checkpoints without a tokenizer; what they say means nothing.

use std::path::Path;

use awqua::checkpoint::Dtype;
use awqua::{Error, Result};
use serde_json::json;

use crate::write::{DEFAULT_SHARD_BYTES, FolderWriter, TensorSpec};

/// Sizes of a Llama-type model, or of one with experts in the place of its feed-forward networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward network, or of one expert.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Whether the output head is the embedding.
    pub tied: bool,
    /// Experts of a layer, two of which every token goes through; 0 for none.
    pub experts: usize,
}

impl Shape {
    /// Llama-2-7B.
    pub const B7: Self = Self {
        layers: 32,
        hidden: 4096,
        intermediate: 11008,
        heads: 32,
        kv_heads: 32,
        head_dim: 128,
        vocab: 32_000,
        tied: false,
        experts: 0,
    };
    /// Llama-3-8B.
    pub const B8: Self = Self { intermediate: 14_336, kv_heads: 8, vocab: 128_256, ..Self::B7 };
    /// Llama-3.2-1B.
    pub const B1: Self = Self {
        layers: 16,
        hidden: 2048,
        intermediate: 8192,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        vocab: 128_256,
        tied: true,
        experts: 0,
    };
    /// Mixtral-8x7B.
    pub const MIXTRAL: Self = Self { intermediate: 14_336, kv_heads: 8, experts: 8, ..Self::B7 };
}

/// How the linear modules of the decoder layers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weights {
    /// 4-bit codes as AutoAWQ `gemm`.
    AwqGemm,
    /// Half precision, for quantizing.
    F16,
}

/// Inputs that share a scale.
const GROUP: usize = 128;
/// Standard deviation of codes that are uniform in 0..=15, around the zero point of 8.
const CODE_DEVIATION: f32 = 4.64;

/// Writes the checkpoint to the new folder `out`. The same `seed` gives the same bytes. `progress` gets bytes done and
/// bytes in all; its error ends the call.
///
/// # Errors
/// As [`FolderWriter`], and those of `progress`.
pub fn synthesize(
    out: &Path,
    shape: &Shape,
    weights: Weights,
    seed: u64,
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<()> {
    let writer = FolderWriter::create(out)?;
    writer.write_json("config.json", &config(shape, weights))?;
    let tensors = tensors(shape, weights);
    let total = tensors.iter().map(TensorSpec::bytes).sum::<Result<u64>>()?;
    let mut done = 0;
    let mut random = Random(seed ^ 0x9e37_79b9_7f4a_7c15);
    writer.write_tensors(&tensors, DEFAULT_SHARD_BYTES, &mut |tensor, out| {
        let is_down = tensor.name.contains("down_proj") || tensor.name.contains(".w2.");
        let fan_in = if is_down { shape.intermediate } else { shape.hidden };
        let kind = Kind::of(&tensor.name, fan_in);
        let mut left = tensor.bytes()? as usize;
        let mut block = vec![0_u8; 1 << 20];
        while left > 0 {
            let part = &mut block[..left.min(1 << 20)];
            random.fill(part, kind);
            out.write_all(part).map_err(|e| Error::io(Path::new(&tensor.name), &e))?;
            left -= part.len();
            done += part.len() as u64;
            progress(done, total)?;
        }
        Ok(())
    })?;
    writer.finish()
}

fn config(shape: &Shape, weights: Weights) -> serde_json::Value {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "float16",
        "eos_token_id": 2,
        "bos_token_id": 1,
    });
    if shape.experts > 0 {
        config["architectures"] = json!(["MixtralForCausalLM"]);
        config["model_type"] = json!("mixtral");
        config["num_local_experts"] = json!(shape.experts);
        config["num_experts_per_tok"] = json!(2);
    }
    if weights == Weights::AwqGemm {
        config["quantization_config"] = json!({
            "quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": true
        });
        if shape.experts > 0 {
            config["quantization_config"]["modules_to_not_convert"] = json!(["gate"]);
        }
    }
    config
}

fn tensors(shape: &Shape, weights: Weights) -> Vec<TensorSpec> {
    let spec = |name: String, dtype, shape: &[usize]| TensorSpec { name, dtype, shape: shape.to_vec() };
    let mut all = vec![spec("model.embed_tokens.weight".into(), Dtype::F16, &[shape.vocab, shape.hidden])];
    let (q, kv) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    for layer in 0..shape.layers {
        let name = |rest: &str| format!("model.layers.{layer}.{rest}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            all.push(spec(name(&format!("{norm}.weight")), Dtype::F16, &[shape.hidden]));
        }
        let mut linears = [
            ("self_attn.q_proj", shape.hidden, q),
            ("self_attn.k_proj", shape.hidden, kv),
            ("self_attn.v_proj", shape.hidden, kv),
            ("self_attn.o_proj", q, shape.hidden),
        ]
        .map(|(name, k, n)| (name.to_owned(), k, n))
        .to_vec();
        let mut feed_forward = |prefix: &str, [gate, up, down]: [&str; 3]| {
            for (linear, k, n) in [
                (gate, shape.hidden, shape.intermediate),
                (up, shape.hidden, shape.intermediate),
                (down, shape.intermediate, shape.hidden),
            ] {
                linears.push((format!("{prefix}.{linear}"), k, n));
            }
        };
        match shape.experts {
            0 => feed_forward("mlp", ["gate_proj", "up_proj", "down_proj"]),
            experts => {
                let router = name("block_sparse_moe.gate.weight");
                all.push(spec(router, Dtype::F16, &[experts, shape.hidden]));
                for expert in 0..experts {
                    feed_forward(&format!("block_sparse_moe.experts.{expert}"), ["w1", "w3", "w2"]);
                }
            }
        }
        for (linear, k, n) in linears {
            if weights == Weights::F16 {
                all.push(spec(name(&format!("{linear}.weight")), Dtype::F16, &[n, k]));
                continue;
            }
            all.push(spec(name(&format!("{linear}.qweight")), Dtype::I32, &[k, n / 8]));
            all.push(spec(name(&format!("{linear}.qzeros")), Dtype::I32, &[k / GROUP, n / 8]));
            all.push(spec(name(&format!("{linear}.scales")), Dtype::F16, &[k / GROUP, n]));
        }
    }
    all.push(spec("model.norm.weight".into(), Dtype::F16, &[shape.hidden]));
    if !shape.tied {
        all.push(spec("lm_head.weight".into(), Dtype::F16, &[shape.vocab, shape.hidden]));
    }
    all
}

/// What the words of a tensor look like.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// Any bits.
    Codes,
    /// Every nibble 8.
    Zeros,
    /// Positive f16 near a value.
    Near(u16),
    /// f16 of either sign with magnitudes from half a value to the value, a power of two.
    Spread(u16),
}

impl Kind {
    /// Magnitudes keep the variance of activations about the same through every layer.
    fn of(name: &str, fan_in: usize) -> Self {
        let bits = |value: f32| half::f16::from_f32(value).to_bits();
        let root = (fan_in as f32).sqrt();
        match name.rsplit('.').next() {
            Some("qweight") => Self::Codes,
            Some("qzeros") => Self::Zeros,
            Some("scales") => Self::Near(bits(1.0 / (CODE_DEVIATION * root))),
            _ if name.contains("norm") => Self::Near(bits(1.0)),
            _ if name.contains("_proj") || name.contains("block_sparse_moe") => Self::Spread(bits(1.0 / root)),
            _ if name.starts_with("lm_head") => Self::Spread(bits(2.0 / root)),
            _ => Self::Spread(bits(1.0)),
        }
    }
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn fill(&mut self, bytes: &mut [u8], kind: Kind) {
        let every_half = |bits: u16| 0x0001_0001_0001_0001 * u64::from(bits);
        let (keep, set) = match kind {
            Kind::Codes => (u64::MAX, 0),
            Kind::Zeros => (0, 0x8888_8888_8888_8888),
            Kind::Near(bits) => (every_half(0x003f), every_half(bits & !0x003f)),
            Kind::Spread(bits) => (every_half(0x83ff), every_half((bits & 0x7c00) - 0x0400)),
        };
        for word in bytes.chunks_mut(8) {
            let value = (self.next() & keep | set).to_le_bytes();
            word.copy_from_slice(&value[..word.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use awqua::{BackendChoice, CancelToken, LoadOptions, Model, Session, SessionOptions};

    use super::*;

    #[test]
    fn checkpoints_load_and_compute_numbers() {
        let base = Shape {
            layers: 2,
            hidden: 256,
            intermediate: 384,
            heads: 4,
            kv_heads: 2,
            head_dim: 64,
            vocab: 320,
            tied: false,
            experts: 0,
        };
        for (experts, weights) in [(0, Weights::AwqGemm), (4, Weights::AwqGemm), (4, Weights::F16)] {
            let name = format!("awqua-synth-{}-{experts}-{weights:?}", std::process::id());
            let folder = std::env::temp_dir().join(name);
            synthesize(&folder, &Shape { experts, ..base }, weights, 3, &mut |done, total| {
                assert!(done <= total);
                Ok(())
            })
            .unwrap();
            let options = LoadOptions { backend: BackendChoice::Cpu, ..Default::default() };
            let model = Model::open(&folder, &options).unwrap();
            let mut session = Session::new(&model, &SessionOptions { threads: Some(1), ..Default::default() }).unwrap();
            let mut rows = Vec::new();
            let ids = [1, 50, 300, 7];
            session.score(&ids, &CancelToken::default(), &mut |_, logits| rows.push(logits.to_vec())).unwrap();
            assert!(rows.len() == 4 && rows.iter().flatten().all(|logit| logit.is_finite()));
            let spread = rows[3].iter().fold(0.0f32, |m, v| m.max(v.abs()));
            assert!((0.5..50.0).contains(&spread) && rows[0] != rows[3], "{experts} experts: {spread}");
            drop((session, model));
            std::fs::remove_dir_all(&folder).unwrap();
        }
    }
}
