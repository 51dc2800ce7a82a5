//! One decoder block at a time in f32: loading from a checkpoint, forward and backward passes.
//!
//! The runtime computes whole models on many devices; the quantizer needs the opposite, a single block of which every
//! intermediate value and gradient can be had. Activations are row-major, one row a token; a sequence is a run of rows
//! that attend to each other only.

use std::sync::OnceLock;

use awqua::backend::Resident;
use awqua::checkpoint::Checkpoint;
use awqua::quant::{self, LinearWeight, Quantization};
use awqua::{Error, ErrorKind, ModelConfig, Result};

use crate::device::{Accelerator, Compute};
use crate::math::Threads;

mod attention;
mod backward;
mod forward;
mod head;

pub use backward::Gradients;
pub(crate) use backward::Trace;
pub(crate) use forward::silu;
pub use head::Head;

/// The linear modules of a block, in the order of [`Block::linears`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names are the field's own")]
pub enum Slot {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Slot {
    /// Every slot.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Module name inside the layer.
    pub fn module(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }
}

/// Places whose activations enter linear modules, in the order they are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Site {
    /// Input of q, k and v.
    Attention,
    /// Input of o.
    Attended,
    /// Input of gate and up.
    Mlp,
    /// Input of down.
    Activated,
}

impl Site {
    /// Every site.
    pub const ALL: [Self; 4] = [Self::Attention, Self::Attended, Self::Mlp, Self::Activated];

    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::Attended => "attended",
            Self::Mlp => "mlp",
            Self::Activated => "activated",
        }
    }

    /// The linear modules that read it.
    pub fn slots(self) -> &'static [Slot] {
        match self {
            Self::Attention => &[Slot::Q, Slot::K, Slot::V],
            Self::Attended => &[Slot::O],
            Self::Mlp => &[Slot::Gate, Slot::Up],
            Self::Activated => &[Slot::Down],
        }
    }
}

/// What all blocks of a model have in common.
#[derive(Debug, Clone)]
pub struct Decoder {
    /// Hyper-parameters.
    pub config: ModelConfig,
    /// Threads of every pass.
    pub threads: Threads,
    /// Multiplies what is worth its way there.
    pub device: Option<Accelerator>,
    /// (cos, sin) of every position so far, (positions, rotary_dim / 2, 2).
    rope: Vec<f32>,
}

/// A linear module: y = W x + bias.
#[derive(Debug, Clone)]
pub struct Linear {
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// (n, k), row-major; empty in a module that only a device has.
    pub weight: Vec<f32>,
    /// (n).
    pub bias: Option<Vec<f32>>,
    /// The weight on the device, once it was needed there; `None` if it could not be brought there.
    resident: OnceLock<Option<Resident>>,
}

impl Linear {
    /// A module of these weights (n, k).
    pub fn new(n: usize, k: usize, weight: Vec<f32>, bias: Option<Vec<f32>>) -> Self {
        Self { n, k, weight, bias, resident: OnceLock::new() }
    }

    /// A module whose weight is on the device only.
    pub(crate) fn on_device(resident: Resident, bias: Option<Vec<f32>>) -> Self {
        let (n, k) = (resident.n, resident.k);
        Self { n, k, weight: Vec::new(), bias, resident: Some(resident).into() }
    }

    /// The weight on the device.
    pub(crate) fn resident(&self, device: &Accelerator) -> Option<&Resident> {
        self.resident.get_or_init(|| device.upload(&self.weight, self.k)).as_ref()
    }
}

/// The weights of one block in f32.
#[derive(Debug, Clone)]
pub struct Block {
    /// Index of the layer.
    pub layer: usize,
    /// (hidden).
    pub input_norm: Vec<f32>,
    /// (hidden).
    pub post_norm: Vec<f32>,
    /// (head_dim), where the architecture has it.
    pub q_norm: Option<Vec<f32>>,
    /// (head_dim).
    pub k_norm: Option<Vec<f32>>,
    /// In the order of [`Slot::ALL`].
    pub linears: Vec<Linear>,
}

impl Decoder {
    /// The decoder of a checkpoint, for sequences of at most `length` tokens.
    ///
    /// # Errors
    /// Those of [`ModelConfig::from_json`] and [`ModelConfig::require_plain`].
    pub fn new(checkpoint: &Checkpoint, length: usize, compute: impl Into<Compute>) -> Result<Self> {
        let Compute { threads, device } = compute.into();
        let config = ModelConfig::from_json(checkpoint.config())
            .and_then(|config| config.require_plain().map(|()| config))
            .map_err(|error| error.in_file(checkpoint.dir().join("config.json")))?;
        let rope = config.ropes[0].rows(0, length, length);
        Ok(Self { config, threads, device, rope })
    }

    /// The same without the device.
    #[must_use]
    pub fn without_device(self) -> Self {
        Self { device: None, ..self }
    }

    /// Features of a query row: heads * head_dim.
    pub fn q_width(&self) -> usize {
        self.config.num_attention_heads * self.config.head_dim
    }

    /// Features of a key row: kv_heads * head_dim.
    pub fn kv_width(&self) -> usize {
        self.config.num_key_value_heads * self.config.head_dim
    }

    /// Output and input features of a linear module.
    pub fn shape(&self, slot: Slot) -> (usize, usize) {
        let (hidden, inter) = (self.config.hidden_size, self.config.intermediate_size);
        match slot {
            Slot::Q => (self.q_width(), hidden),
            Slot::K | Slot::V => (self.kv_width(), hidden),
            Slot::O => (hidden, self.q_width()),
            Slot::Gate | Slot::Up => (inter, hidden),
            Slot::Down => (hidden, inter),
        }
    }

    /// Features at a site.
    pub fn width(&self, site: Site) -> usize {
        self.shape(site.slots()[0]).1
    }

    /// Whether a linear module has a bias.
    fn has_bias(&self, slot: Slot) -> bool {
        match slot {
            Slot::Q | Slot::K | Slot::V => self.config.qkv_bias,
            Slot::O => self.config.o_bias,
            Slot::Gate | Slot::Up | Slot::Down => self.config.mlp_bias,
        }
    }

    /// Name of a tensor or module of a layer.
    pub fn name(&self, layer: usize, rest: &str) -> String {
        format!("model.layers.{layer}.{rest}")
    }

    /// Reads layer `layer`, packed or not, and gives its file pages back.
    ///
    /// # Errors
    /// As [`quant::load_linear`], and [`ErrorKind::InvalidTensor`] naming a weight that is not finite.
    pub fn load(&self, checkpoint: &Checkpoint, quantization: Option<&Quantization>, layer: usize) -> Result<Block> {
        let hidden = self.config.hidden_size;
        let vector = |rest: &str, len: usize| checkpoint.vector(&self.name(layer, rest), len);
        let head_norm = |rest: &str| {
            let name = self.name(layer, rest);
            checkpoint.tensor(&name).map(|_| checkpoint.vector(&name, self.config.head_dim)).transpose()
        };
        let linears = Slot::ALL.iter().map(|&slot| {
            let (n, k) = self.shape(slot);
            let module = self.name(layer, slot.module());
            let weight = quant::load_linear(checkpoint, quantization, &module, n, k)?;
            let weight = self.widen(&weight).map_err(|error| error.in_file(checkpoint.dir()).in_tensor(&module))?;
            let bias = self.has_bias(slot).then(|| checkpoint.vector(&format!("{module}.bias"), n)).transpose()?;
            Ok(Linear::new(n, k, weight, bias))
        });
        Ok(Block {
            layer,
            input_norm: vector("input_layernorm.weight", hidden)?,
            post_norm: vector("post_attention_layernorm.weight", hidden)?,
            q_norm: head_norm("self_attn.q_norm.weight")?,
            k_norm: head_norm("self_attn.k_norm.weight")?,
            linears: linears.collect::<Result<_>>()?,
        })
    }

    fn widen(&self, linear: &LinearWeight) -> Result<Vec<f32>> {
        let (n, k) = linear.weight.dims();
        let mut out = vec![0.0; n * k];
        self.threads.rows(&mut out, k, |first, rows| {
            for (i, row) in rows.chunks_exact_mut(k).enumerate() {
                linear.expand_row(first + i, row);
            }
        });
        linear.weight.release();
        match out.iter().position(|w| !w.is_finite()) {
            Some(i) => {
                let message = format!("weight {i} is {}, expected finite weights", out[i]);
                Err(Error::new(ErrorKind::InvalidTensor, message))
            }
            None => Ok(out),
        }
    }

    /// The embedded tokens, (ids, hidden).
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`], or [`ErrorKind::InvalidInput`] for an id outside the vocabulary.
    pub fn embed(&self, checkpoint: &Checkpoint, ids: &[u32]) -> Result<Vec<f32>> {
        let (vocab, hidden) = (self.config.vocab_size, self.config.hidden_size);
        let quantization = Quantization::of(checkpoint)?;
        let table = quant::load_table(checkpoint, quantization.as_ref(), "model.embed_tokens", vocab, hidden)?;
        let mut out = vec![0.0; ids.len() * hidden];
        for (&id, row) in ids.iter().zip(out.chunks_exact_mut(hidden)) {
            if id as usize >= vocab {
                let message = format!("token id {id} is not below the vocabulary size {vocab}");
                return Err(Error::new(ErrorKind::InvalidInput, message));
            }
            table.expand_row(id as usize, row);
        }
        table.release();
        Ok(out)
    }
}

impl Block {
    /// Everything but the linear modules.
    pub(crate) fn without_linears(&self) -> Self {
        Self {
            layer: self.layer,
            input_norm: self.input_norm.clone(),
            post_norm: self.post_norm.clone(),
            q_norm: self.q_norm.clone(),
            k_norm: self.k_norm.clone(),
            linears: Vec::new(),
        }
    }

    /// The linear module in a slot.
    pub fn linear(&self, slot: Slot) -> &Linear {
        &self.linears[slot as usize]
    }

    /// The linear module in a slot.
    pub fn linear_mut(&mut self, slot: Slot) -> &mut Linear {
        let linear = &mut self.linears[slot as usize];
        // What the device has is about to be out of date.
        linear.resident = OnceLock::new();
        linear
    }
}

/// A block of random weights, for tests: 64 features, 4 heads of 16 on 2 key/value heads, biases on q, k and v, and
/// norms of the heads if `head_norms`.
#[cfg(test)]
pub(crate) fn tiny(seed: u64, head_norms: bool) -> (Decoder, Block) {
    use crate::random::Random;
    let config = serde_json::json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32, "rms_norm_eps": 1e-6,
    });
    let config = ModelConfig::from_json(&config).expect("a valid configuration");
    let rope = config.ropes[0].rows(0, 64, 64);
    let decoder = Decoder { config, threads: Threads::new(2), device: None, rope };
    let mut random = Random::new(seed);
    let mut around_one = |n: usize| random.normals(n).iter().map(|v| 1.0 + 0.2 * v).collect::<Vec<f32>>();
    let (input_norm, post_norm, q_norm, k_norm) = (around_one(64), around_one(64), around_one(16), around_one(16));
    let linears = Slot::ALL.iter().map(|&slot| {
        let (n, k) = decoder.shape(slot);
        let weight = random.normals(n * k).iter().map(|v| v / (k as f32).sqrt()).collect();
        let bias = decoder.has_bias(slot).then(|| random.normals(n));
        Linear::new(n, k, weight, bias)
    });
    let linears = linears.collect();
    let norm = |norm: Vec<f32>| Some(norm).filter(|_| head_norms);
    let block = Block { layer: 0, input_norm, post_norm, q_norm: norm(q_norm), k_norm: norm(k_norm), linears };
    (decoder, block)
}
