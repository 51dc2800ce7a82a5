//! Reads every weight of a decoder, checks its shape and hands it to the backend, one tensor at a time.

use std::ops::ControlFlow;

use super::LoadProgress;
use super::arch::{NormWeights, QkNorm, Stacked};
use super::config::ModelConfig;
use crate::backend::{Backend, WeightId};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::quant::{self, Quantization};
use crate::tensor::{W4Matrix, Weight};

/// A linear layer on the backend.
#[derive(Debug, Clone, Copy)]
pub(super) struct Projection {
    pub(super) weight: WeightId,
    pub(super) bias: Option<WeightId>,
    /// First output column in the buffer that collects several projections.
    pub(super) offset: u32,
}

/// A norm on the backend.
#[derive(Debug, Clone, Copy)]
pub(super) struct Norm {
    pub(super) weight: WeightId,
    pub(super) bias: Option<WeightId>,
}

/// Weights of one decoder layer.
#[derive(Debug, Clone)]
pub(super) struct LayerWeights {
    pub(super) attention_in: Option<Norm>,
    /// q, k, v: one projection where they are or could be stacked.
    pub(super) qkv: Vec<Projection>,
    pub(super) qk_norms: Option<[WeightId; 2]>,
    pub(super) o: Projection,
    pub(super) attention_out: Option<Norm>,
    pub(super) mlp_in: Option<Norm>,
    pub(super) mlp: GatedWeights,
    pub(super) mlp_out: Option<Norm>,
}

/// Weights of a gated MLP.
#[derive(Debug, Clone)]
pub(super) struct GatedWeights {
    /// gate, up: one projection where they are or could be stacked.
    pub(super) gate_up: Vec<Projection>,
    pub(super) down: Projection,
}

/// Weights of a model.
#[derive(Debug, Clone)]
pub(super) struct ModelWeights {
    pub(super) embedding: WeightId,
    pub(super) layers: Vec<LayerWeights>,
    pub(super) norm: Norm,
    pub(super) head: WeightId,
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
    let names = &config.arch.names;
    let mut loader = Loader { checkpoint, quantization, config, backend, root: root(checkpoint, names.embedding) };
    let mut report = |done: u64| match progress(LoadProgress { done, total }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::new(ErrorKind::Cancelled, "loading was cancelled")),
    };
    report(0)?;
    let table = format!("{}{}.weight", loader.root, names.embedding);
    let embedding = loader.dense(&table, config.vocab_size, config.hidden_size)?;
    report(1)?;
    let layers = (0..config.num_hidden_layers)
        .map(|layer| {
            let weights = loader.layer(layer)?;
            report(layer as u64 + 2)?;
            Ok(weights)
        })
        .collect::<Result<Vec<_>>>()?;
    let norm = loader.norm(&format!("{}{}", loader.root, names.final_norm))?;
    let head = if config.tie_word_embeddings {
        embedding
    } else {
        let head = loader.head(names.head);
        loader.linear(&head, config.vocab_size, config.hidden_size, false)?.weight
    };
    report(total)?;
    Ok(ModelWeights { embedding, layers, norm, head })
}

/// What stands in front of the names of the decoder's tensors: multimodal files keep it at different depths.
fn root(checkpoint: &Checkpoint, embedding: &str) -> &'static str {
    let roots = ["model.", "language_model.model.", "model.language_model."];
    let has = |root: &&&str| checkpoint.tensor(&format!("{root}{embedding}.weight")).is_some();
    roots.iter().find(has).copied().unwrap_or(roots[0])
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    quantization: Option<Quantization>,
    config: &'a ModelConfig,
    backend: &'a mut dyn Backend,
    root: &'static str,
}

impl Loader<'_> {
    fn layer(&mut self, layer: usize) -> Result<LayerWeights> {
        let c = self.config;
        let names = &c.arch.names;
        let (hidden, inter) = (c.hidden_size, c.intermediate_size);
        let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let root = self.root;
        let name = |rest: &str| format!("{root}layers.{layer}.{rest}");
        let attention_in = self.optional_norm(names.norms.attention_in.map(name))?;
        let qkv = self.stacked(&names.qkv, &name, &[q, kv, kv], hidden, c.qkv_bias)?;
        let qk_norms = match c.qk_norm {
            QkNorm::None => None,
            QkNorm::Heads => Some(self.qk_norms(&names.qk_norms.map(name), [c.head_dim; 2])?),
            QkNorm::Whole => Some(self.qk_norms(&names.qk_norms.map(name), [q, kv])?),
            QkNorm::LayerPerHead => {
                let heads = [c.num_attention_heads, c.num_key_value_heads];
                let [q_norm, k_norm] = names.qk_norms.map(name);
                Some([self.norm_per_head(&q_norm, heads[0])?, self.norm_per_head(&k_norm, heads[1])?])
            }
        };
        let o = self.linear(&name(names.attention_out), hidden, q, c.o_bias)?;
        let attention_out = self.optional_norm(names.norms.attention_out.map(name))?;
        let mlp_in = if c.parallel_residual { None } else { names.norms.mlp_in };
        let mlp_in = self.optional_norm(mlp_in.map(name))?;
        let mlp = GatedWeights {
            gate_up: self.stacked(&names.gate_up, &name, &[inter, inter], hidden, c.mlp_bias)?,
            down: self.linear(&name(names.down), hidden, inter, c.mlp_bias)?,
        };
        let mlp_out = self.optional_norm(names.norms.mlp_out.map(name))?;
        Ok(LayerWeights { attention_in, qkv, qk_norms, o, attention_out, mlp_in, mlp, mlp_out })
    }

    /// Name of the output head: beside the decoder, or beside the language model that it is a part of.
    fn head(&self, name: &str) -> String {
        let nested = format!("language_model.{name}");
        let has = |module: &str| {
            let tensors = self.checkpoint.tensors();
            let mut parts = tensors.filter_map(|t| t.name.strip_prefix(module));
            parts.any(|rest| rest.starts_with('.'))
        };
        if !has(name) && has(&nested) { nested } else { name.to_owned() }
    }

    fn dense(&mut self, name: &str, n: usize, k: usize) -> Result<WeightId> {
        let matrix = self.checkpoint.dense_matrix(name, n, k)?;
        self.upload(name, Weight::Dense(matrix))
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<WeightId> {
        let vector = self.checkpoint.vector(name, len)?;
        self.upload(name, Weight::Vector(vector))
    }

    fn optional_norm(&mut self, name: Option<String>) -> Result<Option<Norm>> {
        name.map(|name| self.norm(&name)).transpose()
    }

    /// The norm `name` of the residual stream.
    fn norm(&mut self, name: &str) -> Result<Norm> {
        let hidden = self.config.hidden_size;
        let weight = self.norm_weight(&format!("{name}.weight"), hidden)?;
        let bias = match self.config.arch.norm {
            NormWeights::Layer => Some(self.vector(&format!("{name}.bias"), hidden)?),
            NormWeights::Rms | NormWeights::RmsPlusOne => None,
        };
        Ok(Norm { weight, bias })
    }

    fn norm_weight(&mut self, name: &str, len: usize) -> Result<WeightId> {
        let mut weight = self.checkpoint.vector(name, len)?;
        if self.config.arch.norm == NormWeights::RmsPlusOne {
            weight.iter_mut().for_each(|w| *w += 1.0);
        }
        self.upload(name, Weight::Vector(weight))
    }

    fn qk_norms(&mut self, names: &[String; 2], lens: [usize; 2]) -> Result<[WeightId; 2]> {
        let [q, k] = names;
        Ok([self.norm_weight(&format!("{q}.weight"), lens[0])?, self.norm_weight(&format!("{k}.weight"), lens[1])?])
    }

    /// The weights of a module with a norm for each head, one behind the other.
    fn norm_per_head(&mut self, name: &str, heads: usize) -> Result<WeightId> {
        let mut all = Vec::with_capacity(heads * self.config.head_dim);
        for head in 0..heads {
            all.extend(self.checkpoint.vector(&format!("{name}.norms.{head}.weight"), self.config.head_dim)?);
        }
        self.upload(name, Weight::Vector(all))
    }

    fn load_linear(&self, prefix: &str, n: usize, k: usize) -> Result<Weight> {
        quant::load_linear(self.checkpoint, self.quantization.as_ref(), prefix, n, k)
    }

    fn linear(&mut self, prefix: &str, n: usize, k: usize, bias: bool) -> Result<Projection> {
        let weight = self.load_linear(prefix, n, k)?;
        let bias = self.bias(prefix, n, bias)?;
        self.project(prefix, weight, bias, 0)
    }

    fn project(&mut self, prefix: &str, weight: Weight, bias: Option<Vec<f32>>, offset: usize) -> Result<Projection> {
        let weight = self.upload(prefix, weight)?;
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

    /// Projections of one input with `sizes` outputs, stacked along their outputs if the file stacks them or all are
    /// 4-bit of the same kind: one launch instead of several. Others stay apart; stacking them would copy what is
    /// mapped.
    fn stacked(
        &mut self,
        names: &Stacked,
        name: &dyn Fn(&str) -> String,
        sizes: &[usize],
        k: usize,
        bias: bool,
    ) -> Result<Vec<Projection>> {
        let n = sizes.iter().sum();
        let modules = match names {
            Stacked::Apart(modules) => modules,
            Stacked::Fused(module) => return Ok(vec![self.linear(&name(module), n, k, bias)?]),
            Stacked::Grouped(module) => {
                let prefix = name(module);
                let order = self.grouped_rows();
                let weight = self.load_linear(&prefix, n, k)?.select_rows(&order);
                let bias = self.bias(&prefix, n, bias)?;
                let bias = bias.map(|bias| order.iter().map(|&row| bias[row]).collect());
                return Ok(vec![self.project(&prefix, weight, bias, 0)?]);
            }
        };
        let parts: Vec<_> = modules.iter().zip(sizes).map(|(module, &n)| (name(module), n)).collect();
        let mut weights = Vec::with_capacity(parts.len());
        let mut biases = Vec::with_capacity(parts.len());
        for (prefix, n) in &parts {
            weights.push(self.load_linear(prefix, *n, k)?);
            biases.push(self.bias(prefix, *n, bias)?);
        }
        match stack(weights) {
            Ok(stacked) => {
                let bias: Vec<f32> = biases.into_iter().flatten().flatten().collect();
                let bias = Some(bias).filter(|b| !b.is_empty());
                let prefix = parts.iter().map(|(prefix, _)| prefix.as_str()).collect::<Vec<_>>().join(" + ");
                Ok(vec![self.project(&prefix, Weight::W4(stacked), bias, 0)?])
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

    /// Rows of a module of [`Stacked::Grouped`] in the order of all q, all k, all v.
    fn grouped_rows(&self) -> Vec<usize> {
        let (heads, groups, dim) =
            (self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim);
        let queries = heads / groups;
        let head_of = |group: usize, place: usize| group * (queries + 2) + place;
        let q = (0..heads).map(|head| head_of(head / queries, head % queries));
        let k = (0..groups).map(|group| head_of(group, queries));
        let v = (0..groups).map(|group| head_of(group, queries + 1));
        q.chain(k).chain(v).flat_map(|head| head * dim..(head + 1) * dim).collect()
    }

    fn upload(&mut self, name: &str, weight: Weight) -> Result<WeightId> {
        self.backend.upload(name, weight).map_err(|e| e.in_file(self.checkpoint.dir()).in_tensor(name))
    }
}

/// One matrix with the rows of all, or the matrices back if they differ in kind.
fn stack(weights: Vec<Weight>) -> Result<W4Matrix, Vec<Weight>> {
    let Some(Weight::W4(first)) = weights.first() else { return Err(weights) };
    let (group_size, offset) = (first.group_size, first.offset);
    if !weights.iter().all(|w| matches!(w, Weight::W4(m) if m.group_size == group_size && m.offset == offset)) {
        return Err(weights);
    }
    let mut parts = weights.into_iter().filter_map(|w| if let Weight::W4(m) = w { Some(m) } else { None });
    let Some(mut all) = parts.next() else { return Err(Vec::new()) };
    for part in parts {
        all.n += part.n;
        all.qweight.extend_from_slice(&part.qweight);
        all.group_params.extend_from_slice(&part.group_params);
    }
    Ok(all)
}
