//! Every weight of a decoder: first a list of what goes to the backend, made from headers alone; then its rows, a
//! bounded number at a time.

use std::ops::Range;

use super::config::ModelConfig;
use crate::backend::{Backend, ROW_STEP, WeightId};
use crate::checkpoint::Checkpoint;
use crate::checksum::Checksum;
use crate::error::{Error, ErrorKind, Result};
use crate::quant::{self, Quantization};
use crate::tensor::{Weight, WeightShape};

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
}

/// Lists the weights of the whole model and checks their shapes; no tensor is read.
pub(super) fn plan(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<(UploadPlan, ModelWeights)> {
    let quantization = Quantization::of(checkpoint)?;
    let mut planner = Planner { checkpoint, quantization, config, items: Vec::new() };
    let embedding = planner.dense("model.embed_tokens.weight", config.vocab_size, config.hidden_size)?;
    let layers = (0..config.num_hidden_layers).map(|layer| planner.layer(layer)).collect::<Result<Vec<_>>>()?;
    let norm = planner.vector("model.norm.weight", config.hidden_size)?;
    let head = if config.tie_word_embeddings {
        embedding
    } else {
        planner.linear("lm_head", config.vocab_size, config.hidden_size, false)?.weight
    };
    let Planner { quantization, items, .. } = planner;
    Ok((UploadPlan { quantization, items }, ModelWeights { embedding, layers, norm, head }))
}

struct Planner<'a> {
    checkpoint: &'a Checkpoint,
    quantization: Option<Quantization>,
    config: &'a ModelConfig,
    items: Vec<Item>,
}

impl Planner<'_> {
    fn layer(&mut self, layer: usize) -> Result<LayerWeights> {
        let c = self.config;
        let (hidden, inter) = (c.hidden_size, c.intermediate_size);
        let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let name = |rest: &str| format!("model.layers.{layer}.{rest}");
        let qk_norm = |planner: &mut Self, rest: &str| match c.arch.qk_norm {
            true => planner.vector(&name(rest), c.head_dim).map(Some),
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

    fn dense(&mut self, name: &str, n: usize, k: usize) -> Result<WeightId> {
        let dtype = self.checkpoint.require(name, &[n, k])?.dense_type()?;
        let tensor = name.to_owned();
        let part = Part::new(name, n, move |input, rows| {
            input.checkpoint.dense_rows(&tensor, n, k, rows).map(|matrix| Some(Weight::Dense(matrix)))
        });
        Ok(self.push(name, WeightShape::Dense { n, k, dtype }, vec![part]))
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
        Ok(self.project(prefix, shape, vec![linear_part(prefix, n, k)], bias.into_iter().collect(), 0))
    }

    fn project(
        &mut self,
        prefix: &str,
        shape: WeightShape,
        parts: Vec<Part>,
        bias: Vec<Part>,
        offset: usize,
    ) -> Projection {
        let weight = self.push(prefix, shape, parts);
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

    /// Projections of one input, stacked along their outputs if all are 4-bit of the same kind: one launch instead of
    /// several. Others stay apart; stacking them would copy what is mapped.
    fn stacked(&mut self, parts: &[(String, usize)], k: usize, bias: bool) -> Result<Vec<Projection>> {
        let mut shapes = Vec::with_capacity(parts.len());
        let mut biases = Vec::with_capacity(parts.len());
        for (prefix, n) in parts {
            shapes.push(quant::linear_shape(self.checkpoint, self.quantization.as_ref(), prefix, *n, k)?);
            biases.push(self.bias(prefix, *n, bias)?);
        }
        if let Some(shape) = stack(&shapes) {
            let prefix = parts.iter().map(|(prefix, _)| prefix.as_str()).collect::<Vec<_>>().join(" + ");
            let parts = parts.iter().map(|(prefix, n)| linear_part(prefix, *n, k)).collect();
            return Ok(vec![self.project(&prefix, shape, parts, biases.into_iter().flatten().collect(), 0)]);
        }
        let mut offset = 0;
        let mut projections = Vec::with_capacity(parts.len());
        for (((prefix, n), shape), bias) in parts.iter().zip(shapes).zip(biases) {
            let part = vec![linear_part(prefix, *n, k)];
            projections.push(self.project(prefix, shape, part, bias.into_iter().collect(), offset));
            offset += n;
        }
        Ok(projections)
    }

    fn push(&mut self, name: &str, shape: WeightShape, parts: Vec<Part>) -> WeightId {
        self.items.push(Item { name: name.to_owned(), shape, parts });
        WeightId(self.items.len() as u32 - 1)
    }
}

fn linear_part(prefix: &str, n: usize, k: usize) -> Part {
    let module = prefix.to_owned();
    Part::new(prefix, n, move |input, rows| {
        quant::load_rows(input.checkpoint, input.quantization, &module, (n, k), rows)
    })
}

/// The shape of one matrix with the rows of all, if they are packed in the same way.
fn stack(shapes: &[WeightShape]) -> Option<WeightShape> {
    let first = shapes.first().filter(|shape| matches!(shape, WeightShape::W4 { .. }))?;
    let same = shapes.iter().all(|shape| shape.with_rows(0) == first.with_rows(0));
    same.then(|| first.with_rows(shapes.iter().map(WeightShape::rows).sum()))
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
    /// In the order of their rows.
    parts: Vec<Part>,
}

impl Item {
    /// Whether a host computes with it where a file has it.
    fn is_view(&self, checkpoint: &Checkpoint) -> bool {
        let [part] = self.parts.as_slice() else { return false };
        matches!(self.shape, WeightShape::Dense { .. })
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
        Self { prefix: prefix.to_owned(), rows, read: Box::new(read) }
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
                *self.id.insert(backend.reserve(&item.name, &item.shape)?)
            }
        };
        let Some(part) = item.parts.get(self.part) else {
            return Err(Error::new(ErrorKind::InvalidTensor, "the weight has no rows"));
        };
        // What is computed with in place is not cut up.
        let whole = backend.is_host() && item.is_view(checkpoint);
        let step = (most / item.shape.bytes(1).max(1)) as usize / ROW_STEP * ROW_STEP;
        let end = if whole { part.rows } else { part.rows.min(self.row.saturating_add(step.max(ROW_STEP))) };
        let (rows, end) = match (part.read)(&input, self.row..end)? {
            Some(rows) => (rows, end),
            None => {
                let all = (part.read)(&input, self.row..part.rows)?;
                (all.ok_or_else(|| Error::new(ErrorKind::Unsupported, "the rows can not be read"))?, part.rows)
            }
        };
        self.row = end;
        if self.row == part.rows {
            (self.part, self.row) = (self.part + 1, 0);
        }
        let last = self.part == item.parts.len();
        let rows = match self.held.take() {
            None => rows,
            Some(mut held) => {
                held.append(rows)?;
                held
            }
        };
        let count = rows.shape().rows();
        if !last && !matches!(rows, Weight::Vector(_)) && !count.is_multiple_of(ROW_STEP) {
            self.held = Some(rows);
            return Ok(0);
        }
        backend.fill(id, rows)?;
        if last {
            *self = Self { item: self.item + 1, ..Self::default() };
        }
        Ok(item.shape.bytes(count))
    }
}

fn tensors<'a>(checkpoint: &'a Checkpoint, part: &'a Part) -> impl Iterator<Item = &'a crate::checkpoint::TensorView> {
    checkpoint.tensors_of(&part.prefix)
}

fn prefetch(checkpoint: &Checkpoint, item: &Item) {
    item.parts.iter().flat_map(|part| tensors(checkpoint, part)).for_each(|tensor| tensor.prefetch());
}
