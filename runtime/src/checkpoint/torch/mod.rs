//! Weights as `torch.save` writes them: `pytorch_model.bin`, and the `.pt` files of llm-awq.
//!
//! Such a file is a zip archive whose members are stored without compression: `*/data.pkl`, a pickled dictionary that
//! says which tensor is where, and a member `*/data/KEY` for each storage. Python's pickles are programs; this reader
//! runs the few instructions that a dictionary of tensors needs and knows no function but those that describe tensors,
//! so nothing in a file is ever executed. Storages stay views of the file.

use std::collections::BTreeMap;

use crate::error::{Error, ErrorKind, Result};

use super::safetensors::Entry;
use super::source::Extent;

mod pickle;
mod zip;

/// First bytes of a zip archive with members.
const MAGIC: [u8; 4] = *b"PK\x03\x04";
/// Largest pickle, bytes; those of real models have hundreds of kilobytes.
const MAX_PICKLE: usize = 64 << 20;

/// Whether the file is a zip archive.
///
/// # Errors
/// [`ErrorKind::Io`].
pub(super) fn is_archive(file: &Extent) -> Result<bool> {
    let mut magic = [0; 4];
    if file.len() < magic.len() {
        return Ok(false);
    }
    file.read(0, &mut magic)?;
    Ok(magic == MAGIC)
}

/// The tensors of an archive, each with a range that lies inside the file and has the length its type and shape ask
/// for.
///
/// # Errors
/// [`ErrorKind::InvalidFile`], [`ErrorKind::Unsupported`] for what is no dictionary of plain contiguous tensors (with
/// the tensor where one is to blame); the caller adds the file. [`ErrorKind::Io`].
pub(super) fn read(file: &Extent) -> Result<BTreeMap<String, Entry>> {
    if !is_archive(file)? {
        let message = "no zip archive: PyTorch before 1.6 wrote it, or something else; save it again";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let members = zip::members(file)?;
    let pickle_name = members.keys().find(|name| name.ends_with("/data.pkl")).cloned();
    let Some(pickle_name) = pickle_name else {
        return Err(Error::new(ErrorKind::Unsupported, "an archive without `data.pkl`, not made by `torch.save`"));
    };
    let root = pickle_name.trim_end_matches("data.pkl");
    if let Some(range) = members.get(&format!("{root}byteorder")) {
        let order = file.slice(range.clone()).map_or(Ok(Vec::new()), |order| order.copy())?;
        if order != b"little" {
            let message = format!("byte order {:?}", String::from_utf8_lossy(&order[..order.len().min(16)]));
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
    }
    let range = &members[&pickle_name];
    if range.len() > MAX_PICKLE {
        let message = format!("`data.pkl` has {} bytes, at most {MAX_PICKLE} are accepted", range.len());
        return Err(Error::new(ErrorKind::InvalidFile, message));
    }
    let pickle = file.slice(range.clone()).ok_or_else(|| invalid("`data.pkl` leaves the file"))?.copy()?;

    let mut entries = BTreeMap::new();
    for (name, tensor) in pickle::tensors(&pickle)? {
        let entry = entry(&tensor, &members, root).map_err(|error| error.in_tensor(&name))?;
        if entries.insert(name.clone(), entry).is_some() {
            return Err(invalid("two entries have this name").in_tensor(name));
        }
    }
    Ok(entries)
}

/// Where the elements of a tensor are.
fn entry(tensor: &pickle::Tensor, members: &BTreeMap<String, std::ops::Range<usize>>, root: &str) -> Result<Entry> {
    let size = tensor.dtype.bitsize() / 8;
    let key = format!("{root}data/{}", tensor.storage);
    let storage = members.get(&key).ok_or_else(|| invalid(format!("its storage `{key}` is missing")))?;
    let overflow = || invalid(format!("size of shape {:?} overflows", tensor.shape));
    let elements = tensor.shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
    let elements = elements.ok_or_else(overflow)?;
    // Row-major, as everything else is; dimensions of one element have no stride worth the name.
    let mut expected = 1;
    for (&dim, &stride) in tensor.shape.iter().zip(&tensor.stride).rev() {
        if dim > 1 && stride != expected && elements != 0 {
            let message = format!("strides {:?} of shape {:?}, not contiguous", tensor.stride, tensor.shape);
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        // An empty tensor may have sizes whose product overflows, and no element whose place would matter.
        expected = expected.saturating_mul(dim.max(1));
    }
    let start = tensor.offset.checked_mul(size).ok_or_else(overflow)?;
    let length = elements.checked_mul(size).ok_or_else(overflow)?;
    let end = start.checked_add(length).filter(|&end| end <= storage.len()).ok_or_else(|| {
        invalid(format!("needs {length} bytes from {start} on, its storage has {} bytes", storage.len()))
    })?;
    let range = storage.start + start..storage.start + end;
    Ok(Entry { dtype: tensor.dtype, shape: tensor.shape.clone(), range })
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidFile, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_whose_product_overflows_are_refused_or_empty() {
        let members = BTreeMap::from([("root/data/0".to_owned(), 100..108)]);
        let tensor = |shape: &[usize]| pickle::Tensor {
            dtype: ::safetensors::Dtype::F32,
            storage: "0".into(),
            offset: 0,
            stride: vec![0; shape.len()],
            shape: shape.to_vec(),
        };
        let huge = usize::MAX / 2;
        // Without an element no product matters, in whatever order the sizes come.
        assert_eq!(entry(&tensor(&[0, huge, huge]), &members, "root/").unwrap().range, 100..100);
        for shape in [[huge, huge, 0], [huge, huge, 1]] {
            let error = entry(&tensor(&shape), &members, "root/").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidFile, "{shape:?}");
        }
        assert_eq!(entry(&tensor(&[1, 2, 1]), &members, "root/").unwrap_err().kind(), ErrorKind::Unsupported);
        let plain = pickle::Tensor { stride: vec![2, 1], ..tensor(&[1, 2]) };
        assert_eq!(entry(&plain, &members, "root/").unwrap().range, 100..108);
    }
}
