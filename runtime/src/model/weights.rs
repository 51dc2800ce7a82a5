//! Every weight of a decoder: first a list of what goes to the backend, made from headers alone; then its rows, a
//! bounded number at a time.

use std::collections::HashMap;
use std::ops::Range;

use super::arch::{ExpertNames, NormWeights, QkNorm, Stacked};
use super::config::{ExpertConfig, ModelConfig};
use super::head::{self, HeadBits, Plane};
use crate::backend::{Backend, INPUT_STEP, ROW_STEP, WeightId};
use crate::checkpoint::Checkpoint;
use crate::checksum::Checksum;
use crate::error::{Error, ErrorKind, Result};
use crate::quant::awq::StoredGemm;
use crate::quant::{self, InputTransform, LinearShape, Quantization};
use crate::tensor::{Offset, Weight, WeightShape};

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
    pub(super) mlp: Mlp,
    pub(super) mlp_out: Option<Norm>,
}

/// Weights of what follows attention.
#[derive(Debug, Clone)]
pub(super) enum Mlp {
    Dense(GatedWeights),
    Sparse(ExpertWeights),
}

/// Weights of a mixture of experts; the offsets of projections are columns of an expert's row.
#[derive(Debug, Clone)]
pub(super) struct ExpertWeights {
    pub(super) router: Projection,
    /// The first expert's gate and up, the others follow: one projection where they could be stacked.
    pub(super) gate_up: Vec<Projection>,
    /// The first expert's.
    pub(super) down: Projection,
    /// The expert that every token goes through, and its gate.
    pub(super) shared: Option<(GatedWeights, Projection)>,
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
    /// Matrices whose products are added up.
    pub(super) head: Vec<WeightId>,
    /// What has to be done to the inputs of a matrix before it.
    pub(super) inputs: HashMap<WeightId, InputIds>,
}

/// Order and factors of the input columns of a matrix, on the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct InputIds {
    pub(super) order: Option<WeightId>,
    pub(super) factors: Option<WeightId>,
}

/// Lists the weights of the whole model and checks their shapes; no tensor is read.
pub(super) fn plan(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    head_bits: HeadBits,
) -> Result<(UploadPlan, ModelWeights)> {
    let quantization = Quantization::of(checkpoint)?;
    let names = &config.arch.names;
    let root = root(checkpoint, names.embedding);
    let mut planner = Planner { checkpoint, quantization, config, root, items: Vec::new(), inputs: HashMap::new() };
    let table = format!("{root}{}", names.embedding);
    let embedding = planner.table(&table, config.vocab_size, config.hidden_size)?;
    let layers = (0..config.num_hidden_layers).map(|layer| planner.layer(layer)).collect::<Result<Vec<_>>>()?;
    let norm = planner.norm(&format!("{root}{}", names.final_norm))?;
    let module = if config.tie_word_embeddings { table } else { planner.head(names.head) };
    let head = match planner.rounded_head(&module, head_bits)? {
        Some(planes) => planes,
        None if config.tie_word_embeddings => vec![embedding],
        None => vec![planner.linear(&module, config.vocab_size, config.hidden_size, false)?.weight],
    };
    let Planner { quantization, items, inputs, .. } = planner;
    Ok((UploadPlan { quantization, items }, ModelWeights { embedding, layers, norm, head, inputs }))
}

/// What stands in front of the names of the decoder's tensors: multimodal files keep it at different depths.
fn root(checkpoint: &Checkpoint, embedding: &str) -> &'static str {
    let roots = ["model.", "language_model.model.", "model.language_model."];
    let has = |root: &&&str| checkpoint.tensor(&format!("{root}{embedding}.weight")).is_some();
    roots.iter().find(has).copied().unwrap_or(roots[0])
}

struct Planner<'a> {
    checkpoint: &'a Checkpoint,
    quantization: Option<Quantization>,
    config: &'a ModelConfig,
    root: &'static str,
    items: Vec<Item>,
    inputs: HashMap<WeightId, InputIds>,
}

impl Planner<'_> {
    fn layer(&mut self, layer: usize) -> Result<LayerWeights> {
        let c = self.config;
        let names = &c.arch.names;
        let (hidden, inter) = (c.hidden_size, c.intermediate_size);
        let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let root = self.root;
        let name = |rest: &str| format!("{root}layers.{layer}.{rest}");
        let attention_in = self.optional_norm(names.norms.attention_in.map(name))?;
        let qkv = self.stacked(&names.qkv, &name, &[q, kv, kv], hidden, c.qkv_bias)?;
        let [q_norm, k_norm] = names.qk_norms.map(name);
        let qk_norms = match c.qk_norm {
            QkNorm::None => None,
            QkNorm::Heads => Some([self.norm_weight(&q_norm, c.head_dim)?, self.norm_weight(&k_norm, c.head_dim)?]),
            QkNorm::Whole => Some([self.norm_weight(&q_norm, q)?, self.norm_weight(&k_norm, kv)?]),
            QkNorm::LayerPerHead => Some([
                self.norm_per_head(&q_norm, c.num_attention_heads)?,
                self.norm_per_head(&k_norm, c.num_key_value_heads)?,
            ]),
        };
        let o = self.linear(&name(names.attention_out), hidden, q, c.o_bias)?;
        let attention_out = self.optional_norm(names.norms.attention_out.map(name))?;
        let mlp_in = if c.parallel_residual { None } else { names.norms.mlp_in };
        let mlp_in = self.optional_norm(mlp_in.map(name))?;
        let mlp = match (&c.experts, &names.experts) {
            (Some(experts), Some(names)) if c.layers[layer].sparse => Mlp::Sparse(self.experts(experts, names, &name)?),
            _ => Mlp::Dense(GatedWeights {
                gate_up: self.stacked(&names.gate_up, &name, &[inter, inter], hidden, c.mlp_bias)?,
                down: self.linear(&name(names.down), hidden, inter, c.mlp_bias)?,
            }),
        };
        let mlp_out = self.optional_norm(names.norms.mlp_out.map(name))?;
        Ok(LayerWeights { attention_in, qkv, qk_norms, o, attention_out, mlp_in, mlp, mlp_out })
    }

    fn experts(
        &mut self,
        experts: &ExpertConfig,
        names: &ExpertNames,
        name: &dyn Fn(&str) -> String,
    ) -> Result<ExpertWeights> {
        let (hidden, inter) = (self.config.hidden_size, experts.intermediate_size);
        let router = self.linear(&name(names.router), experts.count, hidden, false)?;
        let [gate, up, down] = names.projections;
        let module = |expert: usize, rest: &str| name(&format!("{}.{expert}.{rest}", names.prefix));
        let modules = |rest: &str| (0..experts.count).map(|expert| module(expert, rest)).collect::<Vec<_>>();
        let pairs: Vec<_> = modules(gate).into_iter().zip(modules(up)).map(|(gate, up)| [gate, up]).collect();
        let gate_up = match self.expert_stack(&pairs, inter, hidden)? {
            Some(both) => vec![both],
            None => {
                let mut apart = Vec::new();
                for (i, rest) in [gate, up].into_iter().enumerate() {
                    let alone: Vec<_> = modules(rest).into_iter().map(|module| [module]).collect();
                    let one = self.expert_stack(&alone, inter, hidden)?;
                    apart.extend(one.map(|one| Projection { offset: (i * inter) as u32, ..one }));
                }
                apart
            }
        };
        let downs: Vec<_> = modules(down).into_iter().map(|module| [module]).collect();
        let down = self.expert_stack(&downs, hidden, inter)?;
        let down = down.ok_or_else(|| Error::new(ErrorKind::InvalidConfig, "a layer has no experts"))?;
        let shared = match experts.shared_intermediate_size {
            None => None,
            Some(inter) => {
                let [prefix, gate] = names.shared;
                let module = |rest: &str| name(&format!("{prefix}.{rest}"));
                let gate_up = Stacked::Apart(&["gate_proj", "up_proj"]);
                let weights = GatedWeights {
                    gate_up: self.stacked(&gate_up, &module, &[inter, inter], hidden, false)?,
                    down: self.linear(&module("down_proj"), hidden, inter, false)?,
                };
                Some((weights, self.linear(&name(gate), 1, hidden, false)?))
            }
        };
        Ok(ExpertWeights { router, gate_up, down, shared })
    }

    /// Lists a matrix for every expert, of the modules that belong to it stacked along their `n` outputs each; the first
    /// of them, or `None` where several modules can not be stacked.
    fn expert_stack<const M: usize>(
        &mut self,
        modules: &[[String; M]],
        n: usize,
        k: usize,
    ) -> Result<Option<Projection>> {
        let mut shapes = Vec::with_capacity(modules.len());
        for parts in modules {
            let mut own = Vec::with_capacity(M);
            for prefix in parts {
                own.push(quant::linear_shape(self.checkpoint, self.quantization.as_ref(), prefix, n, k)?);
                self.bias(prefix, n, false)?;
            }
            match (own.first(), stack(&own)) {
                (Some(shape), _) if M == 1 => shapes.push((shape.clone(), own)),
                (_, Some(shape)) => shapes.push((shape, own)),
                _ => return Ok(None),
            }
        }
        let mut first = None;
        for (index, (parts, (shape, own))) in modules.iter().zip(shapes).enumerate() {
            let name = parts.join(" + ");
            if shape.input != InputTransform::default() {
                let message = "experts whose inputs are reordered or scaled one by one";
                return Err(Error::new(ErrorKind::Unsupported, message).in_tensor(name));
            }
            let parts = parts.iter().zip(&own).map(|(prefix, own)| self.linear_part(prefix, own.weight, k));
            let parts = parts.collect::<Result<_>>()?;
            let id = self.push(&name, shape.weight, parts);
            if let Some(item) = self.items.last_mut() {
                item.stack = Some((index, modules.len()));
            }
            first.get_or_insert(id);
        }
        Ok(first.map(|weight| Projection { weight, bias: None, offset: 0 }))
    }

    /// Name of the output head: beside the decoder, or beside the language model that it is a part of.
    fn head(&self, name: &str) -> String {
        let nested = format!("language_model.{name}");
        let has = |module: &str| self.checkpoint.tensors_of(&format!("{module}.")).next().is_some();
        if !has(name) && has(&nested) { nested } else { name.to_owned() }
    }

    /// The head in fewer bits; `None` where it stays as it is stored.
    fn rounded_head(&mut self, module: &str, bits: HeadBits) -> Result<Option<Vec<WeightId>>> {
        let (n, k) = (self.config.vocab_size, self.config.hidden_size);
        let Some((planes, group_size)) = bits.planes(k) else { return Ok(None) };
        let shape = match self.config.tie_word_embeddings {
            true => quant::table_shape(self.checkpoint, self.quantization.as_ref(), module, n, k)?,
            false => {
                let shape = quant::linear_shape(self.checkpoint, self.quantization.as_ref(), module, n, k)?;
                self.bias(module, n, false)?;
                match shape.input == InputTransform::default() {
                    true => shape.weight,
                    false => return Ok(None),
                }
            }
        };
        if !matches!(shape, WeightShape::Dense { .. }) {
            return Ok(None);
        }
        let plane = |&plane: &Plane| {
            let part = self.linear_part(module, shape, k)?;
            let read = part.read;
            let read = move |input: &Input<'_>, rows| {
                read(input, rows)?.map(|rows| head::round(rows, plane, group_size)).transpose()
            };
            let name = format!("{module}, {plane:?} codes");
            Ok((name, Part { read: Box::new(read), ..part }))
        };
        let shape = head::shape(n, k, group_size);
        let parts = planes.iter().map(plane).collect::<Result<Vec<_>>>()?;
        Ok(Some(parts.into_iter().map(|(name, part)| self.push(&name, shape, vec![part])).collect()))
    }

    fn optional_norm(&mut self, name: Option<String>) -> Result<Option<Norm>> {
        name.map(|name| self.norm(&name)).transpose()
    }

    /// The norm `name` of the residual stream.
    fn norm(&mut self, name: &str) -> Result<Norm> {
        let hidden = self.config.hidden_size;
        let weight = self.norm_weight(name, hidden)?;
        let bias = match self.config.arch.norm {
            NormWeights::Layer => Some(self.vector(&format!("{name}.bias"), hidden)?),
            NormWeights::Rms | NormWeights::RmsPlusOne => None,
        };
        Ok(Norm { weight, bias })
    }

    fn norm_weight(&mut self, name: &str, len: usize) -> Result<WeightId> {
        let name = format!("{name}.weight");
        if self.config.arch.norm != NormWeights::RmsPlusOne {
            return self.vector(&name, len);
        }
        let mut part = self.vector_part(&name, len)?;
        let read = part.read;
        part.read = Box::new(move |input, rows| {
            let mut weight = read(input, rows)?;
            if let Some(Weight::Vector(weight)) = &mut weight {
                weight.iter_mut().for_each(|w| *w += 1.0);
            }
            Ok(weight)
        });
        Ok(self.push(&name, WeightShape::Vector { len }, vec![part]))
    }

    /// The weights of a module with a norm for each head, one behind the other.
    fn norm_per_head(&mut self, name: &str, heads: usize) -> Result<WeightId> {
        let dim = self.config.head_dim;
        let part = |head| self.vector_part(&format!("{name}.norms.{head}.weight"), dim);
        let parts = (0..heads).map(part).collect::<Result<Vec<_>>>()?;
        Ok(self.push(name, WeightShape::Vector { len: heads * dim }, parts))
    }

    /// An embedding table, packed or not.
    fn table(&mut self, prefix: &str, n: usize, k: usize) -> Result<WeightId> {
        let shape = quant::table_shape(self.checkpoint, self.quantization.as_ref(), prefix, n, k)?;
        let part = self.linear_part(prefix, shape, k)?;
        Ok(self.push(prefix, shape, vec![part]))
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<WeightId> {
        let part = self.vector_part(name, len)?;
        Ok(self.push(name, WeightShape::Vector { len }, vec![part]))
    }

    fn vector_part(&self, name: &str, len: usize) -> Result<Part> {
        self.checkpoint.require(name, &[len])?.dense_type()?;
        let tensor = name.to_owned();
        Ok(Part::new(name, len, move |input, rows| match rows.len() == len {
            true => input.checkpoint.vector(&tensor, len).map(|vector| Some(Weight::Vector(vector))),
            false => Ok(None),
        }))
    }

    fn linear(&mut self, prefix: &str, n: usize, k: usize, bias: bool) -> Result<Projection> {
        let shape = quant::linear_shape(self.checkpoint, self.quantization.as_ref(), prefix, n, k)?;
        let bias = self.bias(prefix, n, bias)?;
        let part = self.linear_part(prefix, shape.weight, k)?;
        Ok(self.project(prefix, shape, vec![part], bias.into_iter().collect(), 0))
    }

    fn project(
        &mut self,
        prefix: &str,
        shape: LinearShape,
        parts: Vec<Part>,
        bias: Vec<Part>,
        offset: usize,
    ) -> Projection {
        let weight = self.push(prefix, shape.weight, parts);
        let InputTransform { order, factors } = shape.input;
        if order.is_some() || factors.is_some() {
            let order = order.map(|order| {
                let (len, name) = (order.len(), format!("{prefix}, order of inputs"));
                self.push(&name, WeightShape::Order { len }, vec![kept_part(len, Weight::Order(order))])
            });
            let factors = factors.map(|factors| {
                let (len, name) = (factors.len(), format!("{prefix}, factors of inputs"));
                self.push(&name, WeightShape::Vector { len }, vec![kept_part(len, Weight::Vector(factors))])
            });
            self.inputs.insert(weight, InputIds { order, factors });
        }
        let len = bias.iter().map(|part| part.rows).sum();
        let bias = (len > 0).then(|| self.push(&format!("{prefix}.bias"), WeightShape::Vector { len }, bias));
        Projection { weight, bias, offset: offset as u32 }
    }

    fn bias(&self, prefix: &str, n: usize, expected: bool) -> Result<Option<Part>> {
        let name = format!("{prefix}.bias");
        if expected {
            return self.vector_part(&name, n).map(Some);
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
            Stacked::Grouped(module) => return Ok(vec![self.grouped(&name(module), n, k, bias)?]),
        };
        let parts: Vec<_> = modules.iter().zip(sizes).map(|(module, &n)| (name(module), n)).collect();
        let mut shapes = Vec::with_capacity(parts.len());
        let mut biases = Vec::with_capacity(parts.len());
        for (prefix, n) in &parts {
            shapes.push(quant::linear_shape(self.checkpoint, self.quantization.as_ref(), prefix, *n, k)?);
            biases.push(self.bias(prefix, *n, bias)?);
        }
        if let Some(shape) = stack(&shapes) {
            let prefix = parts.iter().map(|(prefix, _)| prefix.as_str()).collect::<Vec<_>>().join(" + ");
            let parts = parts.iter().zip(&shapes).map(|((prefix, _), shape)| self.linear_part(prefix, shape.weight, k));
            let parts = parts.collect::<Result<_>>()?;
            return Ok(vec![self.project(&prefix, shape, parts, biases.into_iter().flatten().collect(), 0)]);
        }
        let mut offset = 0;
        let mut projections = Vec::with_capacity(parts.len());
        for (((prefix, n), shape), bias) in parts.iter().zip(shapes).zip(biases) {
            let part = vec![self.linear_part(prefix, shape.weight, k)?];
            projections.push(self.project(prefix, shape, part, bias.into_iter().collect(), offset));
            offset += n;
        }
        Ok(projections)
    }

    /// A module of [`Stacked::Grouped`], its rows in the order of all q, all k, all v.
    fn grouped(&mut self, prefix: &str, n: usize, k: usize, bias: bool) -> Result<Projection> {
        let c = self.config;
        let (heads, groups, dim) = (c.num_attention_heads, c.num_key_value_heads, c.head_dim);
        let queries = heads / groups;
        let head_of = |group: usize, place: usize| group * (queries + 2) + place;
        let q = (0..heads).map(|head| head_of(head / queries, head % queries));
        let k_and_v = (0..2).flat_map(|i| (0..groups).map(move |group| head_of(group, queries + i)));
        let order: Vec<usize> = q.chain(k_and_v).flat_map(|head| head * dim..(head + 1) * dim).collect();

        let shape = quant::linear_shape(self.checkpoint, self.quantization.as_ref(), prefix, n, k)?;
        let bias = self.bias(prefix, n, bias)?.map(|part| part.in_order(order.clone()));
        let part = self.linear_part(prefix, shape.weight, k)?.in_order(order);
        Ok(self.project(prefix, shape, vec![part], bias.into_iter().collect(), 0))
    }

    /// The rows of a module, in the form that was planned.
    fn linear_part(&self, prefix: &str, shape: WeightShape, k: usize) -> Result<Part> {
        let (module, n) = (prefix.to_owned(), shape.rows());
        let stored = match shape {
            WeightShape::W4 { offset: Offset::Zero, .. } => {
                StoredGemm::of(self.checkpoint, self.quantization.as_ref(), prefix, n, k)?
            }
            _ => None,
        };
        let part = Part::new(prefix, n, move |input, rows| {
            let rows = quant::load_rows(input.checkpoint, input.quantization, &module, (n, k), rows)?;
            Ok(rows.map(|rows| rows.widened(&shape)))
        });
        Ok(Part { stored, ..part })
    }

    fn push(&mut self, name: &str, shape: WeightShape, parts: Vec<Part>) -> WeightId {
        self.items.push(Item { name: name.to_owned(), shape, stack: None, parts });
        WeightId(self.items.len() as u32 - 1)
    }
}

/// What is known already.
fn kept_part(len: usize, weight: Weight) -> Part {
    let read: ReadRows = Box::new(move |_, _| Ok(Some(weight.clone())));
    Part { prefix: String::new(), rows: len, read, stored: None, is_whole: true }
}

/// The shape of one matrix with the rows of all, if they are 4-bit, packed in the same way, and do the same to their
/// inputs.
fn stack(shapes: &[LinearShape]) -> Option<LinearShape> {
    let first = shapes.first().filter(|shape| matches!(shape.weight, WeightShape::W4 { .. }))?;
    let alike =
        |shape: &LinearShape| shape.weight.with_rows(0) == first.weight.with_rows(0) && shape.input == first.input;
    let rows = shapes.iter().map(|shape| shape.weight.rows()).sum();
    let whole = || LinearShape { weight: first.weight.with_rows(rows), input: first.input.clone() };
    shapes.iter().all(alike).then(whole)
}

/// The weights of a model in the order of their ids, and how to read them. Used again when weights come back.
pub(super) struct UploadPlan {
    quantization: Option<Quantization>,
    items: Vec<Item>,
}

/// One weight.
struct Item {
    name: String,
    shape: WeightShape,
    /// Which one of how many matrices of experts it is.
    stack: Option<(usize, usize)>,
    /// In the order of their rows.
    parts: Vec<Part>,
}

impl Item {
    /// Whether a host computes with it where a file has it.
    fn is_view(&self, checkpoint: &Checkpoint) -> bool {
        let [part] = self.parts.as_slice() else { return false };
        matches!(self.shape, WeightShape::Dense { .. } | WeightShape::Blocks { .. })
            && tensors(checkpoint, part).any(|tensor| {
                tensor.byte_len() as u64 == self.shape.bytes(self.shape.rows()) && tensor.extent().view().is_some()
            })
    }
}

/// Rows of a weight that are stored together.
struct Part {
    /// The tensors they are stored in begin with it.
    prefix: String,
    rows: usize,
    read: ReadRows,
    /// The same rows for backends that take them as they are stored.
    stored: Option<StoredGemm>,
    /// Whether it is read in one piece.
    is_whole: bool,
}

/// What rows are read from.
struct Input<'a> {
    checkpoint: &'a Checkpoint,
    quantization: Option<&'a Quantization>,
}

/// Reads some rows of a part; `None` where it can only be read as a whole.
type ReadRows = Box<dyn Fn(&Input<'_>, Range<usize>) -> Result<Option<Weight>> + Send + Sync>;

impl Part {
    fn new(
        prefix: &str,
        rows: usize,
        read: impl Fn(&Input<'_>, Range<usize>) -> Result<Option<Weight>> + Send + Sync + 'static,
    ) -> Self {
        Self { prefix: prefix.to_owned(), rows, read: Box::new(read), stored: None, is_whole: false }
    }

    /// The same rows in the order of `order`.
    fn in_order(self, order: Vec<usize>) -> Self {
        let Self { prefix, rows: n, read, .. } = self;
        let read = move |input: &Input<'_>, rows: Range<usize>| match rows == (0..n) {
            true => Ok(read(input, rows)?.map(|weight| weight.select_rows(&order))),
            false => Ok(None),
        };
        Self { prefix, rows: n, read: Box::new(read), stored: None, is_whole: false }
    }
}

impl UploadPlan {
    /// Form and size of every weight.
    pub(super) fn shapes(&self) -> impl Iterator<Item = &WeightShape> {
        self.items.iter().map(|item| &item.shape)
    }

    /// Bytes of all weights as they are handed over.
    pub(super) fn bytes(&self) -> u64 {
        self.shapes().map(|shape| shape.bytes(shape.rows())).sum()
    }

    /// Sum of `bytes` over the weights that are not computed with where a file has them.
    pub(super) fn copied_bytes(&self, checkpoint: &Checkpoint, bytes: impl Fn(&WeightShape) -> u64) -> u64 {
        let copied = self.items.iter().filter(|item| !item.is_view(checkpoint));
        copied.map(|item| bytes(&item.shape)).sum()
    }

    /// A number that tells these weights from others: of the names, types and shapes of all tensors, and of a part of
    /// their values.
    pub(super) fn identity(&self, checkpoint: &Checkpoint) -> Result<u64> {
        /// Bytes looked at in the middle of a tensor, where no padding is.
        const SAMPLE: usize = 64;
        let mut sum = Checksum::default();
        sum.add(checkpoint.config().to_string().as_bytes());
        let mut sample = [0; SAMPLE];
        for tensor in checkpoint.tensors() {
            sum.add(tensor.name.as_bytes());
            sum.add(format!("{} {:?}", tensor.dtype, tensor.shape).as_bytes());
            let len = SAMPLE.min(tensor.byte_len());
            tensor.extent().read((tensor.byte_len() - len) / 2, &mut sample[..len])?;
            sum.add(&sample[..len]);
        }
        Ok(sum.finish())
    }
}

/// How far the weights of a plan are on their way to a backend.
#[derive(Default)]
pub(super) struct Upload {
    item: usize,
    part: usize,
    /// Next row of the part.
    row: usize,
    /// Next input of the part, where it is taken as it is stored.
    input: usize,
    id: Option<WeightId>,
    /// Rows that do not fill a step yet, because the next ones are stored elsewhere.
    held: Option<Weight>,
}

impl Upload {
    /// Whether everything has been handed over.
    pub(super) fn is_complete(&self, plan: &UploadPlan) -> bool {
        self.item == plan.items.len()
    }

    /// Hands over about `most` bytes (at least [`ROW_STEP`] rows) of the next weight; returns how many bytes
    /// those were.
    ///
    /// # Errors
    /// Those of reading the tensors and of the backend, naming the tensor.
    pub(super) fn advance(
        &mut self,
        plan: &UploadPlan,
        checkpoint: &Checkpoint,
        backend: &mut dyn Backend,
        most: u64,
    ) -> Result<u64> {
        let Some(item) = plan.items.get(self.item) else { return Ok(0) };
        let done = self.advance_item(item, plan, checkpoint, backend, most);
        done.map_err(|e| e.in_file(checkpoint.dir()).in_tensor(&item.name))
    }

    fn advance_item(
        &mut self,
        item: &Item,
        plan: &UploadPlan,
        checkpoint: &Checkpoint,
        backend: &mut dyn Backend,
        most: u64,
    ) -> Result<u64> {
        let input = Input { checkpoint, quantization: plan.quantization.as_ref() };
        let id = match self.id {
            Some(id) => id,
            None => {
                if let Some(next) = plan.items.get(self.item + 1) {
                    prefetch(checkpoint, next);
                }
                let id = match item.stack {
                    Some((index, count)) => backend.reserve_in_stack(&item.name, &item.shape, index, count)?,
                    None => backend.reserve(&item.name, &item.shape)?,
                };
                *self.id.insert(id)
            }
        };
        let Some(part) = item.parts.get(self.part) else {
            return Err(Error::new(ErrorKind::InvalidTensor, "the weight has no rows"));
        };
        if let Some(stored) = &part.stored
            && self.held.is_none()
            && backend.takes_stored(id, stored)
        {
            let bytes = item.shape.bytes(part.rows);
            let step = (most.saturating_mul(stored.k as u64) / bytes.max(1)) as usize / INPUT_STEP * INPUT_STEP;
            let inputs = self.input..stored.k.min(self.input.saturating_add(step.max(INPUT_STEP)));
            // At most `bytes`; the product alone may not fit 64 bits.
            let before = |input: usize| (u128::from(bytes) * input as u128 / stored.k as u128) as u64;
            let brought = before(inputs.end) - before(inputs.start);
            self.input = inputs.end;
            backend.fill_stored(id, stored, inputs)?;
            if self.input == stored.k {
                (self.part, self.input) = (self.part + 1, 0);
                self.end_item(item, checkpoint, backend);
            }
            return Ok(brought);
        }
        // What is computed with in place is not cut up.
        let is_view = item.is_view(checkpoint);
        let whole = part.is_whole || backend.is_host() && is_view;
        let step = (most / item.shape.bytes(1).max(1)) as usize / ROW_STEP * ROW_STEP;
        let end = if whole { part.rows } else { part.rows.min(self.row.saturating_add(step.max(ROW_STEP))) };
        // Views are made at once; the backend reads them.
        let ranges = shares(self.row..end, if whole || is_view { 0 } else { item.shape.bytes(1) });
        let (part_number, is_last_part) = (self.part, self.part + 1 == item.parts.len());
        let mut bytes = 0;
        read_side_by_side(part, &input, ranges, |rows, range| {
            let (rows, end) = match rows? {
                Some(rows) => (rows, range.end),
                // What was read of later rows is not needed then.
                None if self.part != part_number => return Ok(()),
                None => {
                    let all = (part.read)(&input, range.start..part.rows)?;
                    (all.ok_or_else(|| Error::new(ErrorKind::Unsupported, "the rows can not be read"))?, part.rows)
                }
            };
            self.row = end;
            if self.row == part.rows {
                (self.part, self.row) = (self.part + 1, 0);
            }
            let last = is_last_part && self.part != part_number;
            let rows = match self.held.take() {
                None => rows,
                Some(mut held) => {
                    held.append(rows)?;
                    held
                }
            };
            let count = rows.shape().rows();
            if !last && !rows.shape().is_vector() && !count.is_multiple_of(ROW_STEP) {
                self.held = Some(rows);
                return Ok(());
            }
            backend.fill(id, rows)?;
            bytes += item.shape.bytes(count);
            Ok(())
        })?;
        self.end_item(item, checkpoint, backend);
        Ok(bytes)
    }

    /// Goes on to the next weight behind the last part of this one.
    fn end_item(&mut self, item: &Item, checkpoint: &Checkpoint, backend: &dyn Backend) {
        if self.part < item.parts.len() {
            return;
        }
        if !backend.is_host() || !item.is_view(checkpoint) {
            // The device has them now, or the host a copy.
            item.parts.iter().flat_map(|part| tensors(checkpoint, part)).for_each(|tensor| tensor.release());
        }
        *self = Self { item: self.item + 1, ..Self::default() };
    }
}

/// Rows in shares of about a megabyte or more, at most one for each processor, so that decoding them keeps up with the
/// bus; one share where there are few.
fn shares(rows: Range<usize>, row_bytes: u64) -> Vec<Range<usize>> {
    const LEAST: u64 = 1 << 20;
    const MOST: usize = 16;
    let processors = crate::processors::processors().min(MOST);
    let wanted = (rows.len() as u64).saturating_mul(row_bytes) / LEAST;
    let number = (wanted as usize).clamp(1, processors);
    if number == 1 {
        return vec![rows];
    }
    let share = rows.len().div_ceil(number).next_multiple_of(ROW_STEP);
    rows.clone().step_by(share).map(|first| first..rows.end.min(first + share)).collect()
}

/// Reads `ranges` of a part on threads of their own and hands them to `take` in order, each as soon as it is there.
fn read_side_by_side(
    part: &Part,
    input: &Input<'_>,
    ranges: Vec<Range<usize>>,
    mut take: impl FnMut(Result<Option<Weight>>, Range<usize>) -> Result<()>,
) -> Result<()> {
    std::thread::scope(|scope| {
        let start = |range: Range<usize>| {
            let rows = range.clone();
            // The last one, and whatever has no thread, is read here.
            let thread = std::thread::Builder::new().spawn_scoped(scope, move || (part.read)(input, rows)).ok();
            (range, thread)
        };
        let (last, others) = match ranges.split_last() {
            Some((last, others)) => (last.clone(), others.to_vec()),
            None => return Ok(()),
        };
        let others: Vec<_> = others.into_iter().map(start).collect();
        for (range, thread) in others {
            let rows = match thread.map(std::thread::ScopedJoinHandle::join) {
                Some(Ok(rows)) => rows,
                Some(Err(panic)) => std::panic::resume_unwind(panic),
                None => (part.read)(input, range.clone()),
            };
            take(rows, range)?;
        }
        take((part.read)(input, last.clone()), last)
    })
}

fn tensors<'a>(checkpoint: &'a Checkpoint, part: &'a Part) -> impl Iterator<Item = &'a crate::checkpoint::TensorView> {
    let prefix = (!part.prefix.is_empty()).then_some(part.prefix.as_str());
    prefix.into_iter().flat_map(|prefix| checkpoint.tensors_of(prefix))
}

fn prefetch(checkpoint: &Checkpoint, item: &Item) {
    item.parts.iter().flat_map(|part| tensors(checkpoint, part)).for_each(|tensor| tensor.prefetch());
}
