//! GGUF files: metadata and tensors, read from mapped bytes and checked before use.
//!
//! Versions 2 and 3, little-endian. The whole header is validated when a file is opened: afterwards every tensor is
//! a byte range of the right size inside the file.

mod config;
mod folder;
mod model;
mod reader;
mod spm;
mod tokenizer;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

pub(super) use folder::{Opened, open};
pub use model::{GgufModel, HfForm, NamedTensor};
use reader::Reader;

use crate::error::{Error, ErrorKind, Result};
use crate::tensor::Bytes;
pub use crate::tensor::{GgmlType, dequantize_row};

const MAGIC: &[u8; 4] = b"GGUF";
/// Dimensions that a tensor may have, the format's own limit.
const MAX_DIMS: u32 = 4;
/// Largest alignment of tensor data, in bytes; files in use have 32.
const MAX_ALIGNMENT: u64 = 1 << 20;
/// Bytes of the shortest metadata entry (empty key, one-byte value) and of the shortest tensor entry (empty name,
/// no dimensions): what a count in the header promises at least.
const MIN_ENTRY: usize = 8 + 4 + 1;
const MIN_TENSOR: usize = 8 + 4 + 4 + 8;

/// An open GGUF file.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    version: u32,
    metadata: BTreeMap<String, Value>,
    tensors: Vec<GgufTensor>,
}

/// A metadata value; integers and floats of all widths are widened.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    Uint(u64),
    /// Any signed integer.
    Int(i64),
    /// Single or double precision.
    Float(f64),
    /// Boolean.
    Bool(bool),
    /// UTF-8 text.
    String(String),
    /// Elements of one type.
    Array(Array),
}

/// An array value; arrays of arrays are refused at open.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Any unsigned integers.
    Uint(Vec<u64>),
    /// Any signed integers.
    Int(Vec<i64>),
    /// Single or double precision.
    Float(Vec<f64>),
    /// Booleans.
    Bool(Vec<bool>),
    /// UTF-8 texts.
    String(Vec<String>),
}

/// A tensor of the file.
#[derive(Debug, Clone)]
pub struct GgufTensor {
    /// Name as in the file (`blk.0.attn_q.weight`).
    pub name: String,
    /// Dimensions, outermost first (the reverse of the file's order), none of them 0; the last is the row length.
    pub shape: Vec<usize>,
    /// Element type.
    pub ggml_type: GgmlType,
    /// Row-major blocks; exactly the size that type and shape ask for.
    pub bytes: Bytes,
    /// Where they begin in the file.
    offset: usize,
}

impl GgufTensor {
    /// Elements of one row.
    pub fn row_len(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Rows: the product of all dimensions but the last.
    pub fn rows(&self) -> usize {
        self.shape[..self.shape.len().saturating_sub(1)].iter().product()
    }

    /// Expands row `row` to `out`, which has [`Self::row_len`] elements.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if the row does not exist or `out` has another length.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        let row_bytes = self.bytes.len() / self.rows();
        let bytes = row.checked_mul(row_bytes).and_then(|start| self.bytes.get(start..start + row_bytes));
        let Some(bytes) = bytes else {
            return Err(
                Error::new(ErrorKind::InvalidInput, format!("row {row} of {}", self.rows())).in_tensor(&self.name)
            );
        };
        dequantize_row(self.ggml_type, bytes, out).map_err(|e| e.in_tensor(&self.name))
    }
}

impl Gguf {
    /// Maps and reads the file at `path`.
    ///
    /// # Errors
    /// As [`Self::parse`], and [`ErrorKind::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(super::map_file(path)?, path)
    }

    /// Reads a file from its bytes; `path` is for messages only.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidFile`] if the bytes break the format, [`ErrorKind::InvalidTensor`] if a tensor's shape
    /// or place is impossible, [`ErrorKind::Unsupported`] for other versions, big-endian files, nested arrays and
    /// tensor types without a dequantizer. Each names the file and, where there is one, the tensor.
    pub fn parse(bytes: Bytes, path: &Path) -> Result<Self> {
        Self::parse_inner(&bytes, path).map_err(|e| e.in_file(path))
    }

    fn parse_inner(bytes: &Bytes, path: &Path) -> Result<Self> {
        if bytes.get(..4) != Some(MAGIC.as_slice()) {
            return Err(Error::new(ErrorKind::InvalidFile, "not a GGUF file: it does not begin with `GGUF`"));
        }
        let mut reader = Reader::new(bytes);
        reader.u32()?;
        let version = reader.u32()?;
        if version.swap_bytes() <= 3 && version > 3 {
            return Err(Error::new(ErrorKind::Unsupported, "big-endian GGUF files are not supported"));
        }
        if !(2..=3).contains(&version) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("GGUF version {version} is not supported, expected 2 or 3"),
            ));
        }
        let n_tensors = reader.u64()?;
        let n_entries = reader.u64()?;
        let n_tensors = checked_count("tensors", n_tensors, reader.remaining(), MIN_TENSOR)?;
        let n_entries = checked_count("metadata entries", n_entries, reader.remaining(), MIN_ENTRY)?;

        let mut metadata = BTreeMap::new();
        for _ in 0..n_entries {
            let key = reader.name()?;
            let value = reader.value().map_err(|e| in_key(e, &key))?;
            if metadata.contains_key(&key) {
                return Err(Error::new(ErrorKind::InvalidFile, format!("metadata key `{key}` is there twice")));
            }
            metadata.insert(key, value);
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Uint(a)) if a.is_power_of_two() && *a <= MAX_ALIGNMENT => *a,
            Some(other) => {
                return Err(Error::new(
                    ErrorKind::InvalidFile,
                    format!("general.alignment is {other:?}, expected a power of two up to {MAX_ALIGNMENT}"),
                ));
            }
        };
        let tensors = read_tensors(&mut reader, bytes, n_tensors, alignment)?;
        Ok(Self { path: path.to_path_buf(), version, metadata, tensors })
    }

    /// File the bytes came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Version of the format, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// All metadata, by key.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// All tensors, in the order of the file.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// The value of `key` as an unsigned integer, `None` if it is absent.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] if it is something else.
    pub fn uint(&self, key: &str) -> Result<Option<u64>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Uint(v)) => Ok(Some(*v)),
            Some(Value::Int(v)) if *v >= 0 => Ok(Some(v.unsigned_abs())),
            Some(other) => Err(self.wrong_type(key, "an unsigned integer", other)),
        }
    }

    /// The value of `key` as a float, `None` if it is absent.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] if it is something else.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Float(v)) => Ok(Some(*v)),
            Some(other) => Err(self.wrong_type(key, "a float", other)),
        }
    }

    /// The value of `key` as a boolean, `None` if it is absent.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] if it is something else.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Bool(v)) => Ok(Some(*v)),
            Some(other) => Err(self.wrong_type(key, "a boolean", other)),
        }
    }

    /// The value of `key` as text, `None` if it is absent.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] if it is something else.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::String(v)) => Ok(Some(v)),
            Some(other) => Err(self.wrong_type(key, "a string", other)),
        }
    }

    /// The value of `key` as an array, `None` if it is absent.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] if it is something else.
    pub fn array(&self, key: &str) -> Result<Option<&Array>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Array(v)) => Ok(Some(v)),
            Some(other) => Err(self.wrong_type(key, "an array", other)),
        }
    }

    fn wrong_type(&self, key: &str, expected: &str, found: &Value) -> Error {
        let found = match found {
            Value::Uint(_) => "an unsigned integer",
            Value::Int(_) => "a signed integer",
            Value::Float(_) => "a float",
            Value::Bool(_) => "a boolean",
            Value::String(_) => "a string",
            Value::Array(_) => "an array",
        };
        Error::new(ErrorKind::InvalidConfig, format!("metadata `{key}`: expected {expected}, found {found}"))
            .in_file(&self.path)
    }
}

fn in_key(error: Error, key: &str) -> Error {
    Error::new(error.kind(), format!("metadata `{key}`: {}", error.message()))
}

fn checked_count(what: &str, count: u64, remaining: usize, min_bytes: usize) -> Result<usize> {
    match usize::try_from(count) {
        Ok(count) if count <= remaining / min_bytes => Ok(count),
        _ => Err(Error::new(
            ErrorKind::InvalidFile,
            format!("header promises {count} {what}, only {remaining} bytes follow"),
        )),
    }
}

/// A tensor entry before its data section is known.
struct Entry {
    name: String,
    shape: Vec<usize>,
    ggml_type: GgmlType,
    offset: u64,
    length: usize,
}

fn read_tensors(reader: &mut Reader, bytes: &Bytes, n_tensors: usize, alignment: u64) -> Result<Vec<GgufTensor>> {
    let mut entries = Vec::new();
    let mut names = HashMap::new();
    for index in 0..n_tensors {
        let name = reader.name()?;
        let entry = read_entry(reader, name.clone(), alignment).map_err(|e| e.in_tensor(&name))?;
        if names.insert(name.clone(), index).is_some() {
            return Err(Error::new(ErrorKind::InvalidTensor, "the name is there twice").in_tensor(name));
        }
        entries.push(entry);
    }
    let data_start = (reader.position() as u64).next_multiple_of(alignment);
    let mut tensors = Vec::new();
    let mut places = Vec::new();
    for entry in entries {
        let start = data_start.checked_add(entry.offset).and_then(|s| usize::try_from(s).ok());
        let end = start.and_then(|s| s.checked_add(entry.length));
        let data = start.zip(end).and_then(|(start, end)| bytes.slice(start..end));
        let (Some(data), Some(start), Some(end)) = (data, start, end) else {
            return Err(Error::new(
                ErrorKind::InvalidTensor,
                format!(
                    "{} bytes at data offset {} leave the file of {} bytes",
                    entry.length,
                    entry.offset,
                    bytes.len()
                ),
            )
            .in_tensor(entry.name));
        };
        places.push((start, end, tensors.len()));
        tensors.push(GgufTensor {
            name: entry.name,
            shape: entry.shape,
            ggml_type: entry.ggml_type,
            bytes: data,
            offset: start,
        });
    }
    places.sort_unstable();
    for pair in places.windows(2) {
        let ((_, end, first), (start, _, second)) = (pair[0], pair[1]);
        if start < end {
            return Err(Error::new(
                ErrorKind::InvalidTensor,
                format!("its data overlaps that of tensor `{}`", tensors[first].name),
            )
            .in_tensor(&tensors[second].name));
        }
    }
    Ok(tensors)
}

fn read_entry(reader: &mut Reader, name: String, alignment: u64) -> Result<Entry> {
    let n_dims = reader.u32()?;
    if n_dims == 0 || n_dims > MAX_DIMS {
        return Err(Error::new(ErrorKind::InvalidTensor, format!("{n_dims} dimensions, expected 1 to {MAX_DIMS}")));
    }
    let mut shape = Vec::new();
    for _ in 0..n_dims {
        shape.push(reader.u64()?);
    }
    shape.reverse();
    let ggml_type = GgmlType::from_id(reader.u32()?)?;
    let offset = reader.u64()?;
    if !offset.is_multiple_of(alignment) {
        return Err(Error::new(
            ErrorKind::InvalidTensor,
            format!("data offset {offset} is not a multiple of the alignment {alignment}"),
        ));
    }
    let sizes: Option<Vec<usize>> = shape.iter().map(|d| usize::try_from(*d).ok().filter(|d| *d > 0)).collect();
    let (row_len, rows) = sizes.as_ref().and_then(|s| s.split_last()).map_or((0, None), |(row_len, outer)| {
        (*row_len, outer.iter().try_fold(1usize, |product, d| product.checked_mul(*d)))
    });
    // Elements too, not only bytes: whoever expands the tensor multiplies the dimensions again.
    let elements = rows.and_then(|rows| rows.checked_mul(row_len)).and_then(|n| n.checked_mul(size_of::<f32>()));
    let (Some(sizes), Some(rows), Some(_)) = (sizes, rows, elements) else {
        return Err(Error::new(ErrorKind::InvalidTensor, format!("impossible shape {shape:?}")));
    };
    let Some(length) = ggml_type.row_bytes(row_len).and_then(|bytes| bytes.checked_mul(rows)) else {
        return Err(Error::new(
            ErrorKind::InvalidTensor,
            format!("rows of {row_len} elements are not whole {} blocks", ggml_type.name()),
        ));
    };
    Ok(Entry { name, shape: sizes, ggml_type, offset, length })
}
