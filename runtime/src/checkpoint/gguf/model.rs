//! A GGUF model under the names and in the configuration of a Hugging Face folder.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde_json::Value as Json;

use super::config::{self, Config};
use super::{GgmlType, Gguf, GgufTensor, tokenizer};
use crate::error::{Error, ErrorKind, Result};

/// One model: the metadata of the first part and the tensors of all parts.
#[derive(Debug)]
pub struct GgufModel {
    parts: Vec<Gguf>,
    /// Part and place in it, by name.
    index: HashMap<String, (usize, usize)>,
}

/// What a Hugging Face folder of the model would hold.
#[derive(Debug)]
pub struct HfForm<'a> {
    /// Class name in `config` (`LlamaForCausalLM`).
    pub architecture: &'static str,
    /// Whether the head shares the embedding.
    pub tied_embeddings: bool,
    /// Content of `config.json`.
    pub config: Json,
    /// Content of `generation_config.json`.
    pub generation_config: Json,
    /// Content of `tokenizer.json`.
    pub tokenizer: Json,
    /// Content of `tokenizer_config.json`, the chat template included.
    pub tokenizer_config: Json,
    /// Every tensor but those that the configuration stands for.
    pub tensors: Vec<NamedTensor<'a>>,
}

/// A tensor with its Hugging Face name.
#[derive(Debug)]
pub struct NamedTensor<'a> {
    /// Hugging Face name (`model.layers.0.self_attn.q_proj.weight`).
    pub name: String,
    /// Number of the part that holds it.
    pub part: usize,
    /// The tensor; rows of q and k may be in another order than [`Self::expand_row`] gives them.
    pub tensor: &'a GgufTensor,
    /// Heads whose rows are to be put back in order.
    permuted_heads: Option<usize>,
}

impl GgufModel {
    /// The model that `parts` make together.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`] if two parts hold the same tensor, [`ErrorKind::InvalidFile`] if they are not all the
    /// parts of one model in their order, [`ErrorKind::InvalidInput`] if there is none.
    pub fn new(parts: Vec<Gguf>) -> Result<Self> {
        if parts.is_empty() {
            return Err(Error::new(ErrorKind::InvalidInput, "no file of a model"));
        }
        check_split(&parts)?;
        let mut index = HashMap::new();
        for (number, part) in parts.iter().enumerate() {
            for (place, tensor) in part.tensors().iter().enumerate() {
                if index.insert(tensor.name.clone(), (number, place)).is_some() {
                    let error = Error::new(ErrorKind::InvalidTensor, "two parts hold it");
                    return Err(error.in_tensor(&tensor.name).in_file(part.path()));
                }
            }
        }
        Ok(Self { parts, index })
    }

    /// The part with the metadata.
    pub fn metadata(&self) -> &Gguf {
        &self.parts[0]
    }

    /// The parts, in order.
    pub fn parts(&self) -> &[Gguf] {
        &self.parts
    }

    /// How many tensors there are of each type, in the order of [`GgmlType::ALL`].
    pub fn type_counts(&self) -> Vec<(GgmlType, usize)> {
        let tensors = || self.parts.iter().flat_map(|part| part.tensors());
        let count = |t: GgmlType| tensors().filter(|tensor| tensor.ggml_type == t).count();
        GgmlType::ALL.into_iter().map(|t| (t, count(t))).filter(|(_, n)| *n > 0).collect()
    }

    pub(super) fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.index.get(name).map(|&(part, place)| &self.parts[part].tensors()[place])
    }

    /// The file that holds the tensor `name`; that of the metadata if there is none.
    pub fn file_of(&self, name: &str) -> &Path {
        self.parts[self.index.get(name).map_or(0, |&(part, _)| part)].path()
    }

    pub(super) fn n_tensors(&self) -> usize {
        self.index.len()
    }

    /// Translates everything; weights are said to have the type `torch_dtype`.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for architectures, tokenizers and rope scalings without an equivalent;
    /// [`ErrorKind::InvalidConfig`] and [`ErrorKind::InvalidTensor`] if metadata and tensors contradict each other.
    pub fn hf_form(&self, torch_dtype: &str) -> Result<HfForm<'_>> {
        let config = config::read(self)?;
        let vocabulary = tokenizer::read(self, config.vocab_size)?;
        Ok(HfForm {
            architecture: config.architecture,
            tied_embeddings: config.tie_word_embeddings,
            config: config.to_json(torch_dtype, &vocabulary),
            generation_config: vocabulary.generation_config_json(),
            tokenizer: vocabulary.tokenizer_json(),
            tokenizer_config: vocabulary.tokenizer_config_json(config.max_position_embeddings),
            tensors: name_tensors(self, &config)?,
        })
    }
}

impl NamedTensor<'_> {
    /// Elements between the first ones of neighbouring rows of a head of a permuted tensor, the head's own: `None` where
    /// rows are in order.
    pub(crate) fn head_rows(&self) -> Option<usize> {
        let elements = match self.tensor.shape[..] {
            [rows, _] => rows,
            _ => self.tensor.row_len(),
        };
        self.permuted_heads.map(|heads| elements / heads)
    }

    /// Expands row `row` of the tensor as Hugging Face orders them.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if the row does not exist or `out` has another length.
    pub fn expand_row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        match self.head_rows() {
            Some(head) if self.tensor.shape.len() > 1 => self.tensor.dequantize_row(permuted_row(row, head), out),
            // A permuted bias has its rows, of one element each, in a single row of the file.
            Some(head) => {
                let mut stored = vec![0.0; out.len()];
                self.tensor.dequantize_row(row, &mut stored)?;
                out.iter_mut().enumerate().for_each(|(to, value)| *value = stored[permuted_row(to, head)]);
                Ok(())
            }
            None => self.tensor.dequantize_row(row, out),
        }
    }
}

/// Finds every tensor the configuration asks for, checks its shape, and refuses what is left over.
fn name_tensors<'a>(model: &'a GgufModel, config: &Config) -> Result<Vec<NamedTensor<'a>>> {
    let mut mapper = Mapper { model, named: Vec::new(), used: HashSet::from(["rope_freqs.weight".to_owned()]) };
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let q_rows = checked_rows(config.num_attention_heads, config.head_dim)?;
    let kv_rows = checked_rows(config.num_key_value_heads, config.head_dim)?;
    let q_heads = config.permuted.then_some(config.num_attention_heads);
    let kv_heads = config.permuted.then_some(config.num_key_value_heads);
    mapper.add("token_embd.weight", "model.embed_tokens.weight".to_owned(), &[config.vocab_size, hidden], None)?;
    for layer in 0..config.num_hidden_layers {
        let mut add = |from: &str, to: &str, shape: &[usize], heads: Option<usize>| {
            mapper.add(&format!("blk.{layer}.{from}"), format!("model.layers.{layer}.{to}"), shape, heads)
        };
        add("attn_norm.weight", "input_layernorm.weight", &[hidden], None)?;
        add("attn_q.weight", "self_attn.q_proj.weight", &[q_rows, hidden], q_heads)?;
        add("attn_k.weight", "self_attn.k_proj.weight", &[kv_rows, hidden], kv_heads)?;
        add("attn_v.weight", "self_attn.v_proj.weight", &[kv_rows, hidden], None)?;
        add("attn_output.weight", "self_attn.o_proj.weight", &[hidden, q_rows], None)?;
        if config.qkv_bias {
            add("attn_q.bias", "self_attn.q_proj.bias", &[q_rows], q_heads)?;
            add("attn_k.bias", "self_attn.k_proj.bias", &[kv_rows], kv_heads)?;
            add("attn_v.bias", "self_attn.v_proj.bias", &[kv_rows], None)?;
        }
        if config.output_bias {
            add("attn_output.bias", "self_attn.o_proj.bias", &[hidden], None)?;
        }
        if config.qk_norm {
            add("attn_q_norm.weight", "self_attn.q_norm.weight", &[config.head_dim], None)?;
            add("attn_k_norm.weight", "self_attn.k_norm.weight", &[config.head_dim], None)?;
        }
        add("ffn_norm.weight", "post_attention_layernorm.weight", &[hidden], None)?;
        add("ffn_gate.weight", "mlp.gate_proj.weight", &[inner, hidden], None)?;
        add("ffn_up.weight", "mlp.up_proj.weight", &[inner, hidden], None)?;
        add("ffn_down.weight", "mlp.down_proj.weight", &[hidden, inner], None)?;
    }
    mapper.add("output_norm.weight", "model.norm.weight".to_owned(), &[hidden], None)?;
    if !config.tie_word_embeddings {
        mapper.add("output.weight", "lm_head.weight".to_owned(), &[config.vocab_size, hidden], None)?;
    }
    let left = model.index.keys().map(String::as_str).filter(|name| !mapper.used.contains(*name));
    let mut left: Vec<&str> = left.collect();
    left.sort_unstable();
    if let Some(name) = left.first() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("{} has no place for this tensor", config.architecture),
        )
        .in_tensor(*name)
        .in_file(model.file_of(name)));
    }
    Ok(mapper.named)
}

fn checked_rows(heads: usize, head_dim: usize) -> Result<usize> {
    heads
        .checked_mul(head_dim)
        .ok_or_else(|| Error::new(ErrorKind::InvalidConfig, format!("{heads} heads of width {head_dim}")))
}

struct Mapper<'a> {
    model: &'a GgufModel,
    named: Vec<NamedTensor<'a>>,
    used: HashSet<String>,
}

impl Mapper<'_> {
    fn add(&mut self, from: &str, to: String, shape: &[usize], permuted_heads: Option<usize>) -> Result<()> {
        let file = self.model.file_of(from);
        let Some(tensor) = self.model.tensor(from) else {
            return Err(Error::new(ErrorKind::InvalidTensor, "missing").in_tensor(from).in_file(file));
        };
        if tensor.shape != shape {
            return Err(Error::new(
                ErrorKind::InvalidTensor,
                format!("expected shape {shape:?}, found {:?}", tensor.shape),
            )
            .in_tensor(from)
            .in_file(file));
        }
        self.used.insert(from.to_owned());
        let part = self.model.index[from].0;
        self.named.push(NamedTensor { name: to, part, permuted_heads, tensor });
        Ok(())
    }
}

/// The row of the file that holds row `row` of q or k: the file views each head as (d / 2, 2), the result as
/// (2, d / 2).
pub(super) fn permuted_row(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
    head * head_dim + 2 * pair + half
}

/// Checks that self-contained parts are all parts of one model, in order.
fn check_split(ggufs: &[Gguf]) -> Result<()> {
    let Some(first) = ggufs.first() else { return Ok(()) };
    let count = first.uint("split.count")?.unwrap_or(1);
    if count.max(1) != ggufs.len() as u64 {
        return Err(Error::new(
            ErrorKind::InvalidFile,
            format!("the model is split in {count} parts, {} given", ggufs.len()),
        )
        .in_file(first.path()));
    }
    for (index, gguf) in ggufs.iter().enumerate() {
        let number = gguf.uint("split.no")?.unwrap_or(0);
        if number != index as u64 || gguf.uint("split.count")?.unwrap_or(1) != count {
            return Err(Error::new(
                ErrorKind::InvalidFile,
                format!("expected part {index} of {count}, found part {number}"),
            )
            .in_file(gguf.path()));
        }
    }
    let expected = first.uint("split.tensors.count")?;
    let found: u64 = ggufs.iter().map(|gguf| gguf.tensors().len() as u64).sum();
    if expected.is_some_and(|expected| expected != found) {
        return Err(Error::new(
            ErrorKind::InvalidFile,
            format!("the parts hold {found} tensors, the first one promises {}", expected.unwrap_or(0)),
        )
        .in_file(first.path()));
    }
    Ok(())
}
