//! Which bytes: a folder or file on disk as validated views of tensors.
//!
//! [`Checkpoint::open`] reads the headers of a Hugging Face style folder and checks everything that can be checked
//! without touching tensor data: after it, a [`TensorView`] has exactly the bytes that its dtype and shape ask for.
//! Files are hostile until proven otherwise; what the packed bits *mean* is the business of [`crate::quant`].
//!
//! A mapped file must not be truncated while it is open: the system then ends the process on the next access, which no
//! library can turn into an error. Writers that replace files by renaming (this project's, and `safetensors`) are safe.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

pub use ::safetensors::Dtype;
use serde_json::Value;

use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{Bytes, DenseMatrix, DenseType, GgmlType};

mod files;
mod gather;
pub mod gguf;
mod inspect;
mod safetensors;
mod shards;
pub mod source;
mod torch;

pub use files::map_file;
pub use gather::Piece;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub(crate) use gather::gather;
pub use inspect::{Inspection, TensorInfo, TensorKind, inspect};
pub use source::Source;

use source::Extent;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const TORCH_SINGLE: &str = "pytorch_model.bin";
const TORCH_INDEX: &str = "pytorch_model.bin.index.json";

/// One tensor of a checkpoint: its description, and where its bytes are.
#[derive(Debug, Clone)]
pub struct TensorView {
    /// Name in the file.
    pub name: String,
    /// Element type; U8 for blocks of a GGUF file.
    pub dtype: Dtype,
    /// Dimensions, outermost first; for blocks of a GGUF file rows and bytes of a row.
    pub shape: Vec<usize>,
    /// File that holds it.
    pub file: Arc<Path>,
    /// What the blocks of a GGUF file are.
    ggml: Option<GgmlType>,
    extent: Extent,
}

impl TensorView {
    /// Row-major little-endian elements, exactly as many as `shape` and `dtype` say; no alignment is promised. A view
    /// of the file where the source has one, else a copy.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] or [`ErrorKind::OutOfMemory`] where the source has to be read.
    pub fn bytes(&self) -> Result<Bytes> {
        self.extent.bytes().map_err(|error| error.in_tensor(&self.name))
    }

    /// Bytes of the tensor.
    pub fn byte_len(&self) -> usize {
        self.extent.len()
    }

    /// Where the bytes are, to read a part of them.
    pub fn extent(&self) -> &Extent {
        &self.extent
    }

    /// Tells the system that its pages will be read soon; see [`Bytes::prefetch`].
    pub fn prefetch(&self) {
        self.extent.prefetch();
    }

    /// Tells the system that its pages will not be read soon; see [`Bytes::release`].
    pub fn release(&self) {
        self.extent.release();
    }

    /// The elements `range` of dimension `axis` (0 or 1) of a matrix, as a tensor of its own; `None` where it is no
    /// such matrix, or would have to be read piece by piece.
    pub(crate) fn cut(&self, axis: usize, range: std::ops::Range<usize>) -> Option<Self> {
        let &[rows, columns] = self.shape.as_slice() else { return None };
        let row_bytes = self.byte_len().checked_div(rows)?;
        let element = row_bytes.checked_div(columns)?;
        if range.start > range.end || range.end > self.shape[axis] || element * columns != row_bytes {
            return None;
        }
        let mut cut = self.clone();
        cut.shape[axis] = range.len();
        cut.extent = match axis {
            0 => self.extent.slice(range.start * row_bytes..range.end * row_bytes)?,
            _ => {
                let view = self.extent.view()?;
                let mut bytes = Vec::new();
                bytes.try_reserve_exact(rows * range.len() * element).ok()?;
                for row in view.chunks_exact(row_bytes) {
                    bytes.extend_from_slice(&row[range.start * element..range.end * element]);
                }
                Extent::whole(Arc::new(Bytes::owned(bytes)), self.file.clone())
            }
        };
        Some(cut)
    }

    /// An [`ErrorKind::InvalidTensor`] error about this tensor.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::new(ErrorKind::InvalidTensor, message).in_file(&self.file).in_tensor(&self.name)
    }

    /// Checks the shape.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`] with expected and found shape.
    pub fn expect_shape(&self, shape: &[usize]) -> Result<()> {
        if self.shape != shape {
            return Err(self.error(format!("expected shape {shape:?}, found {:?}", self.shape)));
        }
        Ok(())
    }

    /// Checks the element type.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`] with expected and found type.
    pub fn expect_dtype(&self, dtype: Dtype) -> Result<()> {
        if self.dtype != dtype {
            return Err(self.error(format!("expected dtype {dtype}, found {}", self.dtype)));
        }
        Ok(())
    }

    /// The type of its blocks, if it is a packed tensor of a GGUF file.
    pub fn ggml_type(&self) -> Option<GgmlType> {
        self.ggml
    }

    /// Dimensions in elements: what `shape` is for all but blocks.
    pub fn elements(&self) -> Vec<usize> {
        match (self.ggml, &self.shape[..]) {
            (Some(ggml), [rows, bytes]) => vec![*rows, bytes / ggml.block_bytes() * ggml.block_len()],
            _ => self.shape.clone(),
        }
    }

    /// Checks that its blocks make (n, k) elements.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`] with expected and found shape.
    pub fn expect_blocks(&self, n: usize, k: usize) -> Result<()> {
        let found = self.elements();
        if self.ggml.is_none() || found != [n, k] {
            return Err(self.error(format!("expected shape [{n}, {k}], found {found:?}")));
        }
        Ok(())
    }

    /// Element type for dense computation.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`] if it is not F16, BF16 or F32.
    pub fn dense_type(&self) -> Result<DenseType> {
        match self.dtype {
            Dtype::F16 => Ok(DenseType::F16),
            Dtype::BF16 => Ok(DenseType::BF16),
            Dtype::F32 => Ok(DenseType::F32),
            other => {
                let found = self.ggml.map_or(other.to_string(), |ggml| ggml.name().to_owned());
                Err(self.error(format!("expected dtype F16, BF16 or F32, found {found}")))
            }
        }
    }

    /// All elements widened to f32, in file order.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`] if the type is not F16, BF16 or F32, [`ErrorKind::OutOfMemory`], [`ErrorKind::Io`].
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let dtype = self.dense_type()?;
        let len = self.byte_len() / dtype.size();
        let mut values = self.reserve(len)?;
        values.resize(len, 0.0);
        dtype.widen(&self.bytes()?, &mut values);
        Ok(values)
    }

    /// An empty vector with room for `len` elements made from this tensor. Sparse files are larger than any memory, so
    /// a size that the file confirms can still be absurd.
    pub(crate) fn reserve<T>(&self, len: usize) -> Result<Vec<T>> {
        let mut values = Vec::new();
        values.try_reserve_exact(len).map_err(|_| {
            let message = format!("{len} elements of {} bytes do not fit memory", size_of::<T>());
            Error::new(ErrorKind::OutOfMemory, message).in_file(&self.file).in_tensor(&self.name)
        })?;
        Ok(values)
    }
}

/// An open checkpoint: configuration and tensors. Cheap to keep; tensor data stays where it is.
#[derive(Debug)]
pub struct Checkpoint {
    source: Source,
    config: Value,
    tensors: BTreeMap<String, TensorView>,
    unlisted: Vec<String>,
    bytes_on_disk: u64,
    is_gguf: bool,
}

impl Checkpoint {
    /// Opens the folder `dir`: `config.json`, and `model.safetensors` or the shards of `model.safetensors.index.json`,
    /// or else the same of `pytorch_model.bin`. A GGUF file is opened as the folder that its metadata describe, see
    /// [`gguf::GgufModel::hf_form`]; a file of `torch.save`, such as llm-awq's `.pt`, as the weights of its own folder.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if a file is missing or unreadable, [`ErrorKind::InvalidFile`] if one breaks its format,
    /// [`ErrorKind::Unsupported`] if the weights are there in a format that is not read.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_source(Source::path(dir)?)
    }

    /// As [`Self::open`], from anywhere.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_source(source: Source) -> Result<Self> {
        if let Some(file) = source.whole() {
            if let Some(folder) = source.around().filter(|_| torch::is_archive(&file).unwrap_or(false)) {
                let mut checkpoint = Self::without_tensors(folder)?;
                checkpoint.add_entries(&file, torch::read)?;
                return Ok(checkpoint);
            }
            let Some(opened) = gguf::open(&file)? else {
                let message = "expected a checkpoint folder or a GGUF file, found another file";
                return Err(Error::new(ErrorKind::Unsupported, message).in_file(file.path()));
            };
            let gguf::Opened { source, config, tensors, bytes_on_disk } = opened;
            return Ok(Self { source, config, tensors, unlisted: Vec::new(), bytes_on_disk, is_gguf: true });
        }
        let mut checkpoint = Self::without_tensors(source)?;
        let added = checkpoint.add_file(SINGLE, safetensors::read_header)?
            || checkpoint.add_shards(INDEX, safetensors::read_header)?
            || checkpoint.add_file(TORCH_SINGLE, torch::read)?
            || checkpoint.add_shards(TORCH_INDEX, torch::read)?;
        if added { Ok(checkpoint) } else { Err(checkpoint.no_weights()) }
    }

    /// The folder `source` with its configuration only.
    fn without_tensors(source: Source) -> Result<Self> {
        let config_path = source.place().join("config.json");
        let config = source.json("config.json")?.ok_or_else(|| missing(&config_path))?;
        if !config.is_object() {
            return Err(Error::new(ErrorKind::InvalidFile, "expected a JSON object").in_file(&config_path));
        }
        let tensors = BTreeMap::new();
        Ok(Self { source, config, tensors, unlisted: Vec::new(), bytes_on_disk: 0, is_gguf: false })
    }

    /// Where it was opened, as messages call it.
    pub fn dir(&self) -> &Path {
        self.source.place()
    }

    /// Whether it is a GGUF file.
    pub fn is_gguf(&self) -> bool {
        self.is_gguf
    }

    /// `config.json` as it is, or as the metadata of a GGUF file make it.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The tensor `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorView> {
        self.tensors.get(name)
    }

    /// Every tensor, sorted by name.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorView> {
        self.tensors.values()
    }

    /// The tensors whose names begin with `prefix`, sorted.
    pub(crate) fn tensors_of<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a TensorView> {
        let from = self.tensors.range::<str, _>((std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded));
        from.map(|(_, tensor)| tensor).take_while(move |tensor| tensor.name.starts_with(prefix))
    }

    /// Tensors that are in a shard although the index does not list them, sorted.
    pub fn unlisted(&self) -> &[String] {
        &self.unlisted
    }

    /// Bytes of the weight files.
    pub fn bytes_on_disk(&self) -> u64 {
        self.bytes_on_disk
    }

    /// The tensor `name`, which has to exist.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`].
    pub fn get(&self, name: &str) -> Result<&TensorView> {
        self.tensor(name).ok_or_else(|| {
            Error::new(ErrorKind::InvalidTensor, "missing from the checkpoint").in_file(self.dir()).in_tensor(name)
        })
    }

    /// The tensor `name`, which has to exist with this shape.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`].
    pub fn require(&self, name: &str, shape: &[usize]) -> Result<&TensorView> {
        let tensor = self.get(name)?;
        tensor.expect_shape(shape)?;
        Ok(tensor)
    }

    /// The floating-point matrix `name` of shape (n, k), without copying where the source offers views.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`] if it is missing or has another shape or type; [`ErrorKind::Io`]. Values are not
    /// looked at.
    pub fn dense_matrix(&self, name: &str, n: usize, k: usize) -> Result<DenseMatrix> {
        let tensor = self.require(name, &[n, k])?;
        DenseMatrix::new(n, k, tensor.dense_type()?, tensor.bytes()?)
            .map_err(|error| error.in_file(&tensor.file).in_tensor(name))
    }

    /// Rows `rows` of the floating-point matrix `name` of shape (n, k), as [`Self::dense_matrix`].
    ///
    /// # Errors
    /// As [`Self::dense_matrix`], and [`ErrorKind::InvalidInput`] for rows that are not there.
    pub fn dense_rows(&self, name: &str, n: usize, k: usize, rows: std::ops::Range<usize>) -> Result<DenseMatrix> {
        let tensor = self.require(name, &[n, k])?;
        let part = tensor.cut(0, rows.clone()).ok_or_else(|| {
            Error::new(ErrorKind::InvalidInput, format!("rows {rows:?} of {n}")).in_file(&tensor.file).in_tensor(name)
        })?;
        DenseMatrix::new(rows.len(), k, tensor.dense_type()?, part.bytes()?)
            .map_err(|error| error.in_file(&tensor.file).in_tensor(name))
    }

    /// The same checkpoint with no other tensors than `tensors`.
    pub(crate) fn with_tensors(&self, tensors: Vec<TensorView>) -> Self {
        Self {
            source: self.source.clone(),
            config: Value::Null,
            tensors: tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect(),
            unlisted: Vec::new(),
            bytes_on_disk: 0,
            is_gguf: self.is_gguf,
        }
    }

    /// The floating-point vector `name` of `len` elements, widened to f32.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`] if it is missing, has another shape or type, or holds a NaN or an infinity.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let tensor = self.require(name, &[len])?;
        let values = tensor.to_f32()?;
        if let Some(i) = values.iter().position(|v| !v.is_finite()) {
            return Err(tensor.error(format!("element {i} is {}", values[i])));
        }
        Ok(values)
    }

    /// The JSON file `file_name` of the folder, or `None` if there is none.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] or [`ErrorKind::InvalidFile`].
    pub fn json(&self, file_name: &str) -> Result<Option<Value>> {
        self.source.json(file_name)
    }

    /// The content of the file `file_name` of the folder if it has at most `limit` bytes, or `None` if there is none.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] or [`ErrorKind::InvalidFile`].
    pub fn read(&self, file_name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        self.source.read(file_name, limit)
    }

    /// Adds the tensors of the shards that the index `index_name` lists; `false` if it does not exist.
    fn add_shards(&mut self, index_name: &str, read: ReadEntries) -> Result<bool> {
        let index_path = self.dir().join(index_name);
        let Some(bytes) = self.source.read(index_name, shards::MAX_INDEX)? else { return Ok(false) };
        let index = shards::Index::parse(&bytes).map_err(|error| error.in_file(&index_path))?;
        for file in index.files() {
            if !self.add_file(file, read)? {
                return Err(missing(&self.dir().join(file)));
            }
        }
        for (name, file) in &index.weight_map {
            let found = self.tensors.get(name).and_then(|tensor| tensor.file.file_name());
            if found != Some(file.as_ref()) {
                let found = found.map_or("no shard".into(), |name| name.to_string_lossy());
                let message = format!("the index says {file}, found in {found}");
                return Err(Error::new(ErrorKind::InvalidFile, message).in_file(&index_path).in_tensor(name));
            }
        }
        self.unlisted = self.tensors.keys().filter(|name| !index.weight_map.contains_key(*name)).cloned().collect();
        Ok(true)
    }

    /// Adds the tensors of the weight file `name`; `false` if it does not exist.
    fn add_file(&mut self, name: &str, read: ReadEntries) -> Result<bool> {
        let Some(whole) = self.source.open(name)? else { return Ok(false) };
        self.add_entries(&whole, read).map(|()| true)
    }

    fn add_entries(&mut self, whole: &Extent, read: ReadEntries) -> Result<()> {
        let path = whole.path();
        for (name, entry) in read(whole).map_err(|error| error.in_file(path))? {
            if let Some(other) = self.tensors.get(&name) {
                let message = format!("also in {}", other.file.display());
                return Err(Error::new(ErrorKind::InvalidFile, message).in_file(path).in_tensor(name));
            }
            let extent = whole.slice(entry.range).ok_or_else(|| {
                Error::new(ErrorKind::InvalidFile, "range leaves the file").in_file(path).in_tensor(&name)
            })?;
            let view = TensorView {
                name: name.clone(),
                dtype: entry.dtype,
                shape: entry.shape,
                file: path.clone(),
                ggml: None,
                extent,
            };
            self.tensors.insert(name, view);
        }
        self.bytes_on_disk += whole.len() as u64;
        Ok(())
    }

    /// Why there is nothing to open, naming what the folder has instead.
    fn no_weights(&self) -> Error {
        let consolidated = "consolidated.safetensors";
        if matches!(self.source.open(consolidated), Ok(Some(_))) {
            let message = "consolidated weights are not read; use the Hugging Face form";
            return Error::new(ErrorKind::Unsupported, message).in_file(self.dir().join(consolidated));
        }
        let message = format!("found neither {SINGLE} nor {INDEX} (other weight files are opened by their own path)");
        Error::new(ErrorKind::Io, message).in_file(self.dir())
    }
}

/// Reads what tensors a weight file has.
type ReadEntries = fn(&Extent) -> Result<BTreeMap<String, safetensors::Entry>>;

fn missing(path: &Path) -> Error {
    Error::new(ErrorKind::Io, "file not found").in_file(path)
}
