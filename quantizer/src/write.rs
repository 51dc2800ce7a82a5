//! Writing a checkpoint folder: one tensor in memory at a time, and nothing visible under the final name until all of
//! it is on disk.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use awqua::checkpoint::{Dtype, TensorView};
use awqua::{Error, ErrorKind, Result};
use half::f16;
use half::slice::HalfFloatSliceExt;
use serde_json::{Map, Value, json};

/// Largest shard, bytes, as the Hugging Face libraries write by default.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;

/// A tensor to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name, unique in the checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Bytes of the tensor's data.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if the size overflows or does not fill whole bytes.
    pub fn bytes(&self) -> Result<u64> {
        self.shape
            .iter()
            .try_fold(self.dtype.bitsize() as u64, |product, &dim| product.checked_mul(dim as u64))
            .filter(|bits| bits % 8 == 0)
            .map(|bits| bits / 8)
            .ok_or_else(|| {
                let message = format!("shape {:?} of {} has no size in bytes", self.shape, self.dtype);
                Error::new(ErrorKind::InvalidInput, message).in_tensor(&self.name)
            })
    }
}

/// A checkpoint folder in the making. It is built under a temporary name beside the final one; dropping it without
/// [`FolderWriter::finish`] removes it.
#[derive(Debug)]
pub struct FolderWriter {
    out: PathBuf,
    temporary: PathBuf,
    finished: bool,
}

impl FolderWriter {
    /// Starts the folder `out`, which must not exist or be empty. Missing parent folders are created.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if `out` is in use or not a folder's name, [`ErrorKind::Io`].
    pub fn create(out: &Path) -> Result<Self> {
        let name = free_name(out)?;
        let parent = match out.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(|error| Error::io(parent, &error))?;
        for attempt in 0..1000 {
            let mut temporary = std::ffi::OsString::from(".");
            temporary.push(name);
            temporary.push(format!(".partial-{}-{attempt}", std::process::id()));
            let temporary = parent.join(temporary);
            match fs::create_dir(&temporary) {
                Ok(()) => return Ok(Self { out: out.to_path_buf(), temporary, finished: false }),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::io(&temporary, &error)),
            }
        }
        Err(Error::new(ErrorKind::InvalidInput, "no free temporary name beside the output folder").in_file(out))
    }

    /// As [`FolderWriter::create`], built as `temporary`, which has to be on the same file system; what is there is
    /// removed.
    ///
    /// # Errors
    /// As [`FolderWriter::create`].
    pub fn create_as(out: &Path, temporary: PathBuf) -> Result<Self> {
        free_name(out)?;
        match fs::remove_dir_all(&temporary) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(&temporary, &error)),
            _ => {}
        }
        fs::create_dir(&temporary).map_err(|error| Error::io(&temporary, &error))?;
        Ok(Self { out: out.to_path_buf(), temporary, finished: false })
    }

    /// Where the files are until [`FolderWriter::finish`].
    pub fn dir(&self) -> &Path {
        &self.temporary
    }

    /// Writes a small file.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn write_file(&self, file_name: &str, content: &[u8]) -> Result<()> {
        let path = self.temporary.join(file_name);
        let write = || -> std::io::Result<()> {
            let mut file = File::create_new(&path)?;
            file.write_all(content)?;
            file.sync_all()
        };
        write().map_err(|error| Error::io(&path, &error))
    }

    /// Writes a JSON file, indented by two as the Hugging Face libraries do.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn write_json(&self, file_name: &str, value: &Value) -> Result<()> {
        self.write_file(file_name, format!("{value:#}\n").as_bytes())
    }

    /// Copies a file of another folder, if it is there; returns whether it was.
    ///
    /// # Errors
    /// [`ErrorKind::Io`], or [`ErrorKind::InvalidFile`] if it is not a regular file.
    pub fn copy_file(&self, from: &Path, file_name: &str) -> Result<bool> {
        let source = from.join(file_name);
        match fs::metadata(&source) {
            Ok(metadata) if !metadata.is_file() => {
                return Err(Error::new(ErrorKind::InvalidFile, "expected a regular file").in_file(source));
            }
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(Error::io(source, &error)),
        }
        // The content only: a copied read-only mode would stop the owner of the new folder from changing it.
        let content = fs::read(&source).map_err(|error| Error::io(&source, &error))?;
        self.write_file(file_name, &content).map(|()| true)
    }

    /// Writes the weight files: `model.safetensors`, or numbered shards of at most `shard_bytes` of data with their
    /// index. `produce` is called once for every tensor, in the order of `tensors`, and writes exactly its data.
    ///
    /// # Errors
    /// Those of `produce`, [`ErrorKind::Io`], or [`ErrorKind::InvalidInput`] if two tensors have one name or a tensor's
    /// data is shorter or longer than its shape says.
    pub fn write_tensors(
        &self,
        tensors: &[TensorSpec],
        shard_bytes: u64,
        produce: &mut dyn FnMut(&TensorSpec, &mut dyn Write) -> Result<()>,
    ) -> Result<()> {
        let shards = plan_shards(tensors, shard_bytes)?;
        let mut weight_map = BTreeMap::new();
        for (i, shard) in shards.iter().enumerate() {
            let name = match shards.len() {
                1 => "model.safetensors".to_owned(),
                count => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
            };
            for tensor in *shard {
                if weight_map.insert(tensor.name.clone(), name.clone()).is_some() {
                    let message = "two tensors have this name";
                    return Err(Error::new(ErrorKind::InvalidInput, message).in_tensor(&tensor.name));
                }
            }
            write_shard(&self.temporary.join(&name), shard, produce)?;
        }
        if shards.len() > 1 {
            let total = tensors.iter().map(TensorSpec::bytes).sum::<Result<u64>>()?;
            let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
            self.write_json("model.safetensors.index.json", &index)?;
        }
        Ok(())
    }

    /// Gives the folder its final name. Nothing may have it open or mapped any more on systems that forbid renaming then.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; the temporary folder is removed.
    pub fn finish(mut self) -> Result<()> {
        // The final name may be an empty folder, which not every system renames over; a full one is kept and fails.
        match fs::remove_dir(&self.out) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(&self.out, &error)),
            _ => {}
        }
        fs::rename(&self.temporary, &self.out).map_err(|error| Error::io(&self.out, &error))?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for FolderWriter {
    fn drop(&mut self) {
        if !self.finished {
            // Nobody is left to tell if this fails; the leftover has a name that says what it is.
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// The last part of the name of the folder `out`, which does not exist or is empty.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] if it is in use or not a folder's name, [`ErrorKind::Io`].
pub fn free_name(out: &Path) -> Result<&std::ffi::OsStr> {
    let refuse = |message: &str| Error::new(ErrorKind::InvalidInput, message).in_file(out);
    let name = out.file_name().ok_or_else(|| refuse("expected the name of a new folder"))?;
    match fs::read_dir(out) {
        Ok(mut entries) => match entries.next() {
            Some(_) => Err(refuse("output folder is not empty")),
            None => Ok(name),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(name),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {
            Err(refuse("output exists and is not a folder"))
        }
        Err(error) => Err(Error::io(out, &error)),
    }
}

/// How a tensor's elements are stored in a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Elements {
    /// As they are.
    Kept,
    /// bf16 and f32 as f16.
    Halves,
}

impl Elements {
    /// Element type of the copy.
    pub fn of(self, dtype: Dtype) -> Dtype {
        match (self, dtype) {
            (Self::Halves, Dtype::BF16 | Dtype::F32) => Dtype::F16,
            _ => dtype,
        }
    }
}

/// Calls `take` with the data of a copy of `tensor`, a piece at a time, and leaves no page of it in memory.
///
/// # Errors
/// [`ErrorKind::InvalidTensor`] if a value does not fit half precision, those of reading and of `take`.
pub(crate) fn copy_tensor(
    tensor: &TensorView,
    elements: Elements,
    take: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    const PIECE: usize = 1 << 18;
    let mut bytes = vec![0; PIECE.min(tensor.byte_len())];
    let convert = match elements.of(tensor.dtype) == tensor.dtype {
        true => None,
        false => Some(tensor.dense_type()?),
    };
    let mut values = vec![0.0; PIECE / 2];
    let mut halves = vec![f16::ZERO; PIECE / 2];
    let mut converted = Vec::with_capacity(PIECE);
    for at in (0..tensor.byte_len()).step_by(PIECE) {
        let bytes = &mut bytes[..PIECE.min(tensor.byte_len() - at)];
        tensor.extent().read(at, bytes).map_err(|error| error.in_tensor(&tensor.name))?;
        let Some(dtype) = convert else {
            take(bytes)?;
            continue;
        };
        let values = &mut values[..bytes.len() / dtype.size()];
        dtype.widen(bytes, values);
        let halves = &mut halves[..values.len()];
        halves.convert_from_f32_slice(values);
        if let Some(i) = halves.iter().position(|half| !half.is_finite()) {
            return Err(tensor.error(format!("{} does not fit half precision", values[i])));
        }
        converted.clear();
        converted.extend(halves.iter().flat_map(|half| half.to_le_bytes()));
        take(&converted)?;
    }
    tensor.release();
    Ok(())
}

/// Cuts the tensors into runs of at most `limit` bytes; a larger tensor gets a run of its own.
fn plan_shards(tensors: &[TensorSpec], limit: u64) -> Result<Vec<&[TensorSpec]>> {
    let mut shards = Vec::new();
    let (mut first, mut size) = (0, 0u64);
    for (i, tensor) in tensors.iter().enumerate() {
        let bytes = tensor.bytes()?;
        if i > first && size.saturating_add(bytes) > limit {
            shards.push(&tensors[first..i]);
            (first, size) = (i, 0);
        }
        size = size.saturating_add(bytes);
    }
    shards.push(&tensors[first..]);
    Ok(shards)
}

/// Bytes of the weight files that [`FolderWriter::write_tensors`] writes.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] if the size overflows.
pub fn weight_bytes(tensors: &[TensorSpec], shard_bytes: u64) -> Result<u64> {
    let shards = plan_shards(tensors, shard_bytes)?;
    shards.into_iter().try_fold(0u64, |sum, shard| {
        let data = shard.iter().map(TensorSpec::bytes).sum::<Result<u64>>()?;
        Ok(sum + header(shard)?.len() as u64 + data)
    })
}

fn write_shard(
    path: &Path,
    tensors: &[TensorSpec],
    produce: &mut dyn FnMut(&TensorSpec, &mut dyn Write) -> Result<()>,
) -> Result<()> {
    let io = |error: std::io::Error| Error::io(path, &error);
    let mut out = BufWriter::with_capacity(1 << 20, File::create_new(path).map_err(io)?);
    out.write_all(&header(tensors)?).map_err(io)?;
    for tensor in tensors {
        let mut exact = Exact { out: &mut out, left: tensor.bytes()? };
        produce(tensor, &mut exact).map_err(|error| error.in_file(path).in_tensor(&tensor.name))?;
        if exact.left != 0 {
            let message = format!("its data is {} bytes short", exact.left);
            return Err(Error::new(ErrorKind::InvalidInput, message).in_tensor(&tensor.name));
        }
    }
    let file = out.into_inner().map_err(|error| io(error.into_error()))?;
    file.sync_all().map_err(io)
}

/// The length field and the header, padded with spaces so that the data starts at a multiple of 8.
fn header(tensors: &[TensorSpec]) -> Result<Vec<u8>> {
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut offset = 0u64;
    for tensor in tensors {
        let overflow = || Error::new(ErrorKind::InvalidInput, "the file's size overflows");
        let end = offset.checked_add(tensor.bytes()?).ok_or_else(overflow)?;
        let dtype = tensor.dtype.to_string();
        let entry = json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": [offset, end] });
        entries.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    Ok(bytes)
}

/// Passes on as many bytes as the tensor has and refuses more.
struct Exact<'a> {
    out: &'a mut dyn Write,
    left: u64,
}

impl Write for Exact<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if bytes.len() as u64 > self.left {
            return Err(std::io::Error::other("more data than the tensor's shape says"));
        }
        let written = self.out.write(bytes)?;
        self.left -= written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}
