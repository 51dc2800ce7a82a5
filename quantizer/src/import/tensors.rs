//! Tensors under their Hugging Face names, written one at a time.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs;
use std::path::Path;

use awqua::checkpoint::gguf::{GgufModel, NamedTensor};
use awqua::{Error, ErrorKind, Result};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensorError, View};

use super::{ImportDtype, ImportProgress, ImportStage};

/// Sizes of what was written.
pub(super) struct Written {
    pub(super) n_tensors: usize,
    pub(super) n_parameters: u64,
    pub(super) n_bytes: u64,
}

/// Writes the tensors of `model`, named, to `path` in the order and format of `safetensors`.
pub(super) fn write(
    model: &GgufModel,
    mapped: &[NamedTensor<'_>],
    dtype: ImportDtype,
    path: &Path,
    progress: &mut dyn FnMut(ImportProgress),
) -> Result<Written> {
    let n_tensors = mapped.len();
    let n_parameters = mapped.iter().map(|m| m.tensor.shape.iter().product::<usize>() as u64).sum::<u64>();
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
        let file = model.file_of(name).to_owned();
        return Err(failure.in_file(file));
    }
    // The writer makes a private temporary file; a model is as public as the files beside it.
    if let Ok(beside) = fs::metadata(path.with_file_name("config.json")) {
        fs::set_permissions(path, beside.permissions()).map_err(|e| Error::io(path, &e))?;
    }
    let n_bytes = fs::metadata(path).map_err(|e| Error::io(path, &e))?.len();
    Ok(Written { n_tensors, n_parameters, n_bytes })
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
    mapped: &'a NamedTensor<'a>,
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
        &self.mapped.tensor.shape
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
        self.mapped.tensor.shape.iter().product::<usize>() * 2
    }
}

/// Expands a tensor and rounds it, with the rows of each head back in the order of `rotate_half`.
fn convert(mapped: &NamedTensor, dtype: ImportDtype) -> Result<Vec<u8>> {
    let tensor = mapped.tensor;
    let (rows, row_len) = (tensor.rows(), tensor.row_len());
    let mut values = vec![0.0f32; row_len];
    let mut bytes = Vec::with_capacity(rows * row_len * 2);
    for row in 0..rows {
        mapped.expand_row(row, &mut values)?;
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
                    format!("row {row} holds {value}, which has no finite {dtype:?} form"),
                )
                .in_tensor(&tensor.name));
            }
            bytes.extend_from_slice(&rounded.to_le_bytes());
        }
    }
    Ok(bytes)
}
