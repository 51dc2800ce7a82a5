//! A GGUF file opened as a checkpoint: the files of a folder made from its metadata, and its tensors as they are.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value as Json;

use super::model::permuted_row;
use super::{GgmlType, Gguf, GgufModel, MAGIC, NamedTensor};
use crate::checkpoint::source::{Extent, ReadAt};
use crate::checkpoint::{Dtype, Source, TensorView};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::Bytes;

/// Most parts of a split model.
const MAX_PARTS: u64 = 1000;

/// What a checkpoint is made of.
pub(in crate::checkpoint) struct Opened {
    /// A folder with `tokenizer.json` and the other files, called by the name of the GGUF file.
    pub(in crate::checkpoint) source: Source,
    pub(in crate::checkpoint) config: Json,
    pub(in crate::checkpoint) tensors: BTreeMap<String, TensorView>,
    pub(in crate::checkpoint) bytes_on_disk: u64,
}

/// Opens a GGUF file, `None` if it is none; the other parts of a split model are found beside it.
pub(in crate::checkpoint) fn open(file: &Extent) -> Result<Option<Opened>> {
    let mut magic = [0; 4];
    if file.len() < magic.len() {
        return Ok(None);
    }
    file.read(0, &mut magic)?;
    if &magic != MAGIC {
        return Ok(None);
    }
    let first = Gguf::parse(file.bytes()?, file.path())?;
    let mut files = vec![file.clone()];
    let mut parts = Vec::new();
    match first.uint("split.count")?.unwrap_or(1) {
        0 | 1 => parts.push(first),
        count if count <= MAX_PARTS => {
            files.clear();
            for number in 1..=count {
                let path = sibling(file.path(), number, count)?;
                let whole = Source::path(&path)?.whole().ok_or_else(|| {
                    Error::new(ErrorKind::InvalidFile, "a part of a split model is a folder").in_file(&path)
                })?;
                parts.push(Gguf::parse(whole.bytes()?, &path)?);
                files.push(whole);
            }
        }
        count => {
            return Err(Error::new(ErrorKind::InvalidFile, format!("a model in {count} parts")).in_file(file.path()));
        }
    }
    let model = GgufModel::new(parts)?;
    let form = model.hf_form("float32")?;
    let mut tensors = BTreeMap::new();
    for tensor in &form.tensors {
        tensors.insert(tensor.name.clone(), view(tensor, &files[tensor.part])?);
    }
    let json = |value: &Json| Bytes::owned(value.to_string().into_bytes());
    let made = BTreeMap::from([
        ("generation_config.json".to_owned(), json(&form.generation_config)),
        ("tokenizer.json".to_owned(), json(&form.tokenizer)),
        ("tokenizer_config.json".to_owned(), json(&form.tokenizer_config)),
    ]);
    Ok(Some(Opened {
        source: Source::memory(file.path(), made),
        config: form.config,
        tensors,
        bytes_on_disk: files.iter().map(|file| file.len() as u64).sum(),
    }))
}

/// The file of part `number`, from the name of any part: `NAME-00001-of-00003.gguf`.
fn sibling(path: &Path, number: u64, count: u64) -> Result<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.strip_suffix(&format!("-of-{count:05}.gguf")).and_then(|rest| rest.rsplit_once('-'));
    match stem {
        Some((stem, digits)) if digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit()) => {
            Ok(path.with_file_name(format!("{stem}-{number:05}-of-{count:05}.gguf")))
        }
        _ => {
            let message = format!("one of {count} parts, but the name does not say which (-00001-of-{count:05}.gguf)");
            Err(Error::new(ErrorKind::InvalidFile, message).in_file(path))
        }
    }
}

fn view(named: &NamedTensor<'_>, file: &Extent) -> Result<TensorView> {
    let tensor = named.tensor;
    let outside = || Error::new(ErrorKind::InvalidTensor, "its data leaves the file").in_tensor(&tensor.name);
    let stored = file.slice(tensor.offset..tensor.offset + tensor.bytes.len()).ok_or_else(outside)?;
    let (dtype, ggml) = match tensor.ggml_type {
        GgmlType::F32 => (Dtype::F32, None),
        GgmlType::F16 => (Dtype::F16, None),
        GgmlType::BF16 => (Dtype::BF16, None),
        blocks => (Dtype::U8, Some(blocks)),
    };
    let row_bytes = tensor.bytes.len() / tensor.rows();
    let extent = match named.head_rows() {
        None => stored,
        Some(head) => {
            // Rows of a matrix, or the elements of a bias.
            let row_bytes = if tensor.shape.len() > 1 { row_bytes } else { tensor.bytes.len() / tensor.row_len() };
            let path = stored.path().clone();
            Extent::whole(Arc::new(InOrder { stored, row_bytes, head }), path)
        }
    };
    let shape = match (ggml, &tensor.shape[..]) {
        (Some(_), [rows, _]) => vec![*rows, row_bytes],
        (Some(_), shape) => {
            let message = format!("blocks of {} in shape {shape:?}", tensor.ggml_type.name());
            return Err(Error::new(ErrorKind::Unsupported, message).in_tensor(&tensor.name));
        }
        (None, shape) => shape.to_vec(),
    };
    Ok(TensorView { name: named.name.clone(), dtype, ggml, shape, file: extent.path().clone(), extent })
}

/// The rows of q or k, which the file has with the halves of each head interleaved, in the order of Hugging Face.
struct InOrder {
    stored: Extent,
    row_bytes: usize,
    /// Rows of a head.
    head: usize,
}

impl ReadAt for InOrder {
    fn size(&self) -> u64 {
        self.stored.len() as u64
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let failed = |error: Error| io::Error::other(error.to_string());
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        if start.checked_add(out.len()).is_none_or(|end| end > self.stored.len()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (mut at, mut out) = (start, out);
        while !out.is_empty() {
            let (row, within) = (at / self.row_bytes, at % self.row_bytes);
            let (piece, rest) = out.split_at_mut((self.row_bytes - within).min(out.len()));
            self.stored.read(permuted_row(row, self.head) * self.row_bytes + within, piece).map_err(failed)?;
            at += piece.len();
            out = rest;
        }
        Ok(())
    }
}
