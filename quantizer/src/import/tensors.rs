//! Tensors under their Hugging Face names, written one at a time.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;

use awqua::checkpoint::gguf::{GgmlType, Gguf, GgufTensor};
use awqua::{Error, ErrorKind, Result};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensorError, View};

use super::config::Config;
use super::source::Assembled;
use super::{ImportDtype, ImportProgress, ImportStage};

/// The metadata of the first part and the tensors of all parts.
pub(super) struct Model<'a> {
    metadata: &'a Gguf,
    tensors: HashMap<&'a str, (&'a GgufTensor, &'a Path)>,
}

impl<'a> Model<'a> {
    pub(super) fn new(assembled: &'a Assembled) -> Result<Self> {
        let Some(metadata) = assembled.ggufs.first() else {
            return Err(Error::new(ErrorKind::InvalidInput, "no file to import"));
        };
        let mut tensors = HashMap::new();
        for gguf in &assembled.ggufs {
            for tensor in gguf.tensors() {
                if tensors.insert(tensor.name.as_str(), (tensor, gguf.path())).is_some() {
                    return Err(Error::new(ErrorKind::InvalidTensor, "two parts hold it")
                        .in_tensor(&tensor.name)
                        .in_file(gguf.path()));
                }
            }
        }
        Ok(Self { metadata, tensors })
    }

    pub(super) fn metadata(&self) -> &'a Gguf {
        self.metadata
    }

    pub(super) fn tensor(&self, name: &str) -> Option<&'a GgufTensor> {
        self.tensors.get(name).map(|(tensor, _)| *tensor)
    }

    pub(super) fn n_tensors(&self) -> usize {
        self.tensors.len()
    }

    /// How many tensors there are of each type, in the order of [`GgmlType::ALL`].
    pub(super) fn type_counts(&self) -> Vec<(GgmlType, usize)> {
        let count = |t: GgmlType| self.tensors.values().filter(|(tensor, _)| tensor.ggml_type == t).count();
        GgmlType::ALL.into_iter().map(|t| (t, count(t))).filter(|(_, n)| *n > 0).collect()
    }
}

/// Sizes of what was written.
pub(super) struct Written {
    pub(super) n_tensors: usize,
    pub(super) n_parameters: u64,
    pub(super) n_bytes: u64,
}

/// A tensor with the name and shape it gets.
struct Mapped<'a> {
    name: String,
    shape: Vec<usize>,
    /// Heads whose rows are to be put back in order.
    permuted_heads: Option<usize>,
    tensor: &'a GgufTensor,
}

/// Writes all tensors of `model` to `path` in the order and format of `safetensors`.
pub(super) fn write(
    model: &Model,
    config: &Config,
    dtype: ImportDtype,
    path: &Path,
    progress: &mut dyn FnMut(ImportProgress),
) -> Result<Written> {
    let mapped = map_tensors(model, config)?;
    let n_tensors = mapped.len();
    let n_parameters = mapped.iter().map(|m| m.shape.iter().product::<usize>() as u64).sum::<u64>();
    let shared = Shared {
        dtype,
        done: Cell::new(0),
        total: n_parameters * 2,
        progress: RefCell::new(progress),
        failure: RefCell::new(None),
    };
    let views = mapped.iter().map(|m| (m.name.as_str(), Converted { mapped: m, shared: &shared }));
    let header = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(views, Some(header), path).map_err(|e| match e {
        SafeTensorError::IoError(e) => Error::io(path, &e),
        other => Error::new(ErrorKind::InvalidTensor, other.to_string()).in_file(path),
    })?;
    if let Some(failure) = shared.failure.into_inner() {
        let name = failure.tensor().unwrap_or_default();
        let file = model.tensors.get(name).map_or(model.metadata.path(), |(_, file)| file);
        return Err(failure.in_file(file));
    }
    // The writer makes a private temporary file; a model is as public as the files beside it.
    if let Ok(beside) = fs::metadata(path.with_file_name("config.json")) {
        fs::set_permissions(path, beside.permissions()).map_err(|e| Error::io(path, &e))?;
    }
    let n_bytes = fs::metadata(path).map_err(|e| Error::io(path, &e))?.len();
    Ok(Written { n_tensors, n_parameters, n_bytes })
}

/// Finds every tensor the configuration asks for, checks its shape, and refuses what is left over.
fn map_tensors<'a>(model: &Model<'a>, config: &Config) -> Result<Vec<Mapped<'a>>> {
    let mut mapper = Mapper { model, mapped: Vec::new(), used: HashSet::from(["rope_freqs.weight".to_owned()]) };
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
    let mut left: Vec<&str> = model.tensors.keys().copied().filter(|name| !mapper.used.contains(*name)).collect();
    left.sort_unstable();
    if let Some(name) = left.first() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("{} has no place for this tensor", config.architecture),
        )
        .in_tensor(*name)
        .in_file(model.tensors[name].1));
    }
    Ok(mapper.mapped)
}

fn checked_rows(heads: usize, head_dim: usize) -> Result<usize> {
    heads
        .checked_mul(head_dim)
        .ok_or_else(|| Error::new(ErrorKind::InvalidConfig, format!("{heads} heads of width {head_dim}")))
}

struct Mapper<'m, 'a> {
    model: &'m Model<'a>,
    mapped: Vec<Mapped<'a>>,
    used: HashSet<String>,
}

impl Mapper<'_, '_> {
    fn add(&mut self, from: &str, to: String, shape: &[usize], permuted_heads: Option<usize>) -> Result<()> {
        let Some((tensor, file)) = self.model.tensors.get(from) else {
            return Err(Error::new(ErrorKind::InvalidTensor, "missing")
                .in_tensor(from)
                .in_file(self.model.metadata.path()));
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
        self.mapped.push(Mapped { name: to, shape: shape.to_vec(), permuted_heads, tensor });
        Ok(())
    }
}

/// What the views of one write share. The writer asks views for their bytes and takes no errors from them, so the
/// first failure waits here.
struct Shared<'p> {
    dtype: ImportDtype,
    done: Cell<u64>,
    total: u64,
    progress: RefCell<&'p mut dyn FnMut(ImportProgress)>,
    failure: RefCell<Option<Error>>,
}

/// A tensor that is expanded when the writer asks for its bytes.
struct Converted<'a, 'p> {
    mapped: &'a Mapped<'a>,
    shared: &'a Shared<'p>,
}

impl View for Converted<'_, '_> {
    fn dtype(&self) -> Dtype {
        match self.shared.dtype {
            ImportDtype::F16 => Dtype::F16,
            ImportDtype::BF16 => Dtype::BF16,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.mapped.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let shared = self.shared;
        let bytes = if shared.failure.borrow().is_some() {
            // Nothing of this file will be kept: do not spend time on it.
            vec![0; self.data_len()]
        } else {
            convert(self.mapped, shared.dtype).unwrap_or_else(|e| {
                *shared.failure.borrow_mut() = Some(e);
                vec![0; self.data_len()]
            })
        };
        self.mapped.tensor.bytes.release();
        shared.done.set(shared.done.get() + bytes.len() as u64);
        (shared.progress.borrow_mut())(ImportProgress {
            stage: ImportStage::Write,
            done: shared.done.get(),
            total: shared.total,
        });
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.mapped.shape.iter().product::<usize>() * 2
    }
}

/// Expands a tensor and rounds it, with the rows of each head back in the order of `rotate_half`.
fn convert(mapped: &Mapped, dtype: ImportDtype) -> Result<Vec<u8>> {
    let tensor = mapped.tensor;
    let is_matrix = mapped.shape.len() > 1;
    // A permuted bias has its rows, of one element each, in a single row of the file.
    let (rows, row_len) = (tensor.rows(), tensor.row_len());
    let mut values = vec![0.0f32; row_len];
    let mut bytes = Vec::with_capacity(rows * row_len * 2);
    for row in 0..rows {
        let source = match mapped.permuted_heads {
            Some(heads) if is_matrix => permuted_row(row, rows / heads),
            _ => row,
        };
        tensor.dequantize_row(source, &mut values)?;
        if let (Some(heads), false) = (mapped.permuted_heads, is_matrix) {
            let stored = values.clone();
            for (to, value) in values.iter_mut().enumerate() {
                *value = stored[permuted_row(to, row_len / heads)];
            }
        }
        for value in &values {
            let rounded = match dtype {
                ImportDtype::F16 => f16::from_f32(*value).to_bits(),
                ImportDtype::BF16 => bf16::from_f32(*value).to_bits(),
            };
            let finite = match dtype {
                ImportDtype::F16 => f16::from_bits(rounded).is_finite(),
                ImportDtype::BF16 => bf16::from_bits(rounded).is_finite(),
            };
            if !finite {
                return Err(Error::new(
                    ErrorKind::InvalidTensor,
                    format!("row {source} holds {value}, which has no finite {dtype:?} form"),
                )
                .in_tensor(&tensor.name));
            }
            bytes.extend_from_slice(&rounded.to_le_bytes());
        }
    }
    Ok(bytes)
}

/// The row of the file that holds row `row` of q or k: the file views each head as (d / 2, 2), the result as
/// (2, d / 2).
fn permuted_row(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
    head * head_dim + 2 * pair + half
}
