//! Reads every weight of a decoder, checks its shape and hands it to the backend, one tensor at a time.

use std::collections::HashMap;
use std::ops::ControlFlow;

use super::LoadProgress;
use super::config::ModelConfig;
use crate::backend::{Backend, WeightId};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::quant::{self, InputTransform, LinearWeight, Quantization};
use crate::tensor::{W4Matrix, Weight};

/// A linear layer on the backend.
#[derive(Debug, Clone, Copy)]
pub(super) struct Projection {
    pub(super) weight: WeightId,
    pub(super) bias: Option<WeightId>,
    /// First output column in the buffer that collects several projections.
    pub(super) offset: u32,
}

/// Weights of one decoder layer.
#[derive(Debug, Clone)]
pub(super) struct LayerWeights {
    pub(super) input_norm: WeightId,
    /// q, k, v: one projection where they could be stacked.
    pub(super) qkv: Vec<Projection>,
    pub(super) q_norm: Option<WeightId>,
    pub(super) k_norm: Option<WeightId>,
    pub(super) o: Projection,
    pub(super) post_attention_norm: WeightId,
    /// gate, up: one projection where they could be stacked.
    pub(super) gate_up: Vec<Projection>,
    pub(super) down: Projection,
}

/// Weights of a model.
#[derive(Debug, Clone)]
pub(super) struct ModelWeights {
    pub(super) embedding: WeightId,
    pub(super) layers: Vec<LayerWeights>,
    pub(super) norm: WeightId,
    pub(super) head: WeightId,
    /// What has to be done to the inputs of a matrix before it.
    pub(super) inputs: HashMap<WeightId, InputIds>,
}

/// Order and factors of the input columns of a matrix, on the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct InputIds {
    pub(super) order: Option<WeightId>,
    pub(super) factors: Option<WeightId>,
}

/// Uploads the whole model.
pub(super) fn load(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    backend: &mut dyn Backend,
    progress: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
) -> Result<ModelWeights> {
    let quantization = Quantization::of(checkpoint)?;
    let total = config.num_hidden_layers as u64 + 2;
    let mut loader = Loader { checkpoint, quantization, config, backend, inputs: HashMap::new() };
    let mut report = |done: u64| match progress(LoadProgress { done, total }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::new(ErrorKind::Cancelled, "loading was cancelled")),
    };
    report(0)?;
    let embedding = loader.table("model.embed_tokens", config.vocab_size, config.hidden_size)?;
    report(1)?;
    let layers = (0..config.num_hidden_layers)
        .map(|layer| {
            let weights = loader.layer(layer)?;
            report(layer as u64 + 2)?;
            Ok(weights)
        })
        .collect::<Result<Vec<_>>>()?;
    let norm = loader.vector("model.norm.weight", config.hidden_size)?;
    let head = if config.tie_word_embeddings {
        embedding
    } else {
        loader.linear("lm_head", config.vocab_size, config.hidden_size, false)?.weight
    };
    report(total)?;
    let inputs = loader.inputs;
    Ok(ModelWeights { embedding, layers, norm, head, inputs })
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    quantization: Option<Quantization>,
    config: &'a ModelConfig,
    backend: &'a mut dyn Backend,
    inputs: HashMap<WeightId, InputIds>,
}

impl Loader<'_> {
    fn layer(&mut self, layer: usize) -> Result<LayerWeights> {
        let c = self.config;
        let (hidden, inter) = (c.hidden_size, c.intermediate_size);
        let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let name = |rest: &str| format!("model.layers.{layer}.{rest}");
        let qk_norm = |loader: &mut Self, rest: &str| match c.arch.qk_norm {
            true => loader.vector(&name(rest), c.head_dim).map(Some),
            false => Ok(None),
        };
        Ok(LayerWeights {
            input_norm: self.vector(&name("input_layernorm.weight"), hidden)?,
            qkv: self.stacked(
                &[(name("self_attn.q_proj"), q), (name("self_attn.k_proj"), kv), (name("self_attn.v_proj"), kv)],
                hidden,
                c.qkv_bias,
            )?,
            q_norm: qk_norm(self, "self_attn.q_norm.weight")?,
            k_norm: qk_norm(self, "self_attn.k_norm.weight")?,
            o: self.linear(&name("self_attn.o_proj"), hidden, q, c.o_bias)?,
            post_attention_norm: self.vector(&name("post_attention_layernorm.weight"), hidden)?,
            gate_up: self.stacked(
                &[(name("mlp.gate_proj"), inter), (name("mlp.up_proj"), inter)],
                hidden,
                c.mlp_bias,
            )?,
            down: self.linear(&name("mlp.down_proj"), hidden, inter, c.mlp_bias)?,
        })
    }

    /// An embedding table, packed or not.
    fn table(&mut self, prefix: &str, n: usize, k: usize) -> Result<WeightId> {
        let table = quant::load_table(self.checkpoint, self.quantization.as_ref(), prefix, n, k)?;
        self.upload(prefix, table)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<WeightId> {
        let vector = self.checkpoint.vector(name, len)?;
        self.upload(name, Weight::Vector(vector))
    }

    fn linear(&mut self, prefix: &str, n: usize, k: usize, bias: bool) -> Result<Projection> {
        let weight = quant::load_linear(self.checkpoint, self.quantization.as_ref(), prefix, n, k)?;
        let bias = self.bias(prefix, n, bias)?;
        self.project(prefix, weight, bias, 0)
    }

    fn project(
        &mut self,
        prefix: &str,
        linear: LinearWeight,
        bias: Option<Vec<f32>>,
        offset: usize,
    ) -> Result<Projection> {
        let weight = self.upload(prefix, linear.weight)?;
        let InputTransform { order, factors } = linear.input;
        if order.is_some() || factors.is_some() {
            let order = order.map(|order| self.upload(prefix, Weight::Order(order))).transpose()?;
            let factors = factors.map(|factors| self.upload(prefix, Weight::Vector(factors))).transpose()?;
            self.inputs.insert(weight, InputIds { order, factors });
        }
        let bias = bias.map(|bias| self.upload(&format!("{prefix}.bias"), Weight::Vector(bias))).transpose()?;
        Ok(Projection { weight, bias, offset: offset as u32 })
    }

    fn bias(&self, prefix: &str, n: usize, expected: bool) -> Result<Option<Vec<f32>>> {
        let name = format!("{prefix}.bias");
        if expected {
            return self.checkpoint.vector(&name, n).map(Some);
        }
        match self.checkpoint.tensor(&name) {
            None => Ok(None),
            Some(view) => Err(view.error("the configuration says that this layer has no bias")),
        }
    }

    /// Projections of one input, stacked along their outputs if all are 4-bit of the same kind: one launch instead of
    /// several. Others stay apart; stacking them would copy what is mapped.
    fn stacked(&mut self, parts: &[(String, usize)], k: usize, bias: bool) -> Result<Vec<Projection>> {
        let mut weights = Vec::with_capacity(parts.len());
        let mut biases = Vec::with_capacity(parts.len());
        for (prefix, n) in parts {
            weights.push(quant::load_linear(self.checkpoint, self.quantization.as_ref(), prefix, *n, k)?);
            biases.push(self.bias(prefix, *n, bias)?);
        }
        match stack(weights) {
            Ok(stacked) => {
                let bias: Vec<f32> = biases.into_iter().flatten().flatten().collect();
                let bias = Some(bias).filter(|b| !b.is_empty());
                let prefix = parts.iter().map(|(prefix, _)| prefix.as_str()).collect::<Vec<_>>().join(" + ");
                Ok(vec![self.project(&prefix, stacked, bias, 0)?])
            }
            Err(weights) => {
                let mut offset = 0;
                let mut projections = Vec::with_capacity(parts.len());
                for (((prefix, n), weight), bias) in parts.iter().zip(weights).zip(biases) {
                    projections.push(self.project(prefix, weight, bias, offset)?);
                    offset += n;
                }
                Ok(projections)
            }
        }
    }

    fn upload(&mut self, name: &str, weight: Weight) -> Result<WeightId> {
        self.backend.upload(name, weight).map_err(|e| e.in_file(self.checkpoint.dir()).in_tensor(name))
    }
}

/// One matrix with the rows of all, or the matrices back if they differ in kind or in what they do to their inputs.
fn stack(weights: Vec<LinearWeight>) -> Result<LinearWeight, Vec<LinearWeight>> {
    let Some(LinearWeight { weight: Weight::W4(first), input }) = weights.first() else { return Err(weights) };
    let (group_size, offset) = (first.group_size, first.offset);
    let alike = |m: &W4Matrix| m.group_size == group_size && m.offset == offset;
    if !weights.iter().all(|w| matches!(&w.weight, Weight::W4(m) if alike(m)) && w.input == *input) {
        return Err(weights);
    }
    let input = input.clone();
    let mut parts = weights.into_iter().filter_map(|w| if let Weight::W4(m) = w.weight { Some(m) } else { None });
    let Some(mut all) = parts.next() else { return Err(Vec::new()) };
    for part in parts {
        all.n += part.n;
        all.qweight.extend_from_slice(&part.qweight);
        all.group_params.extend_from_slice(&part.group_params);
    }
    Ok(LinearWeight { weight: Weight::W4(all), input })
}
