//! The header of a safetensors file, checked so that every later access to its tensors is in bounds.
//!
//! The element types are those of the `safetensors` crate. Its own reader is strict about tiling but keeps the last
//! of two tensors with one name and reports most faults without a name or a number, so the header is parsed here.

use std::collections::BTreeMap;
use std::fmt;

use ::safetensors::Dtype;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::error::{Error, ErrorKind, Result};

use super::source::Extent;

/// Largest header, bytes: the limit of the format's reference implementation.
const MAX_HEADER: u64 = 100_000_000;
/// Most tensors of a file; bounds what a header of that size can cost in memory.
pub(crate) const MAX_TENSORS: usize = 1 << 18;
/// Most dimensions of a tensor.
const MAX_RANK: usize = 8;
/// Longest tensor name, bytes.
const MAX_NAME: usize = 512;
/// Bytes of the length field before the header.
const LENGTH_FIELD: usize = 8;

/// One tensor of a file.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Byte range in the file.
    pub range: std::ops::Range<usize>,
}

/// Reads the header of a whole file: every entry's byte range lies inside `file`, has the length its dtype and shape
/// ask for, and the ranges tile the data without overlap or gap.
///
/// # Errors
/// [`ErrorKind::InvalidFile`] with the tensor where one is to blame; the caller adds the file. [`ErrorKind::Io`].
pub(crate) fn read_header(file: &Extent) -> Result<BTreeMap<String, Entry>> {
    let header = header_bytes(file)?;
    let data = LENGTH_FIELD + header.len();
    let text = std::str::from_utf8(&header).map_err(|error| invalid(format!("header is not UTF-8: {error}")))?;

    let mut current = String::new();
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let parsed = HeaderSeed { current: &mut current }
        .deserialize(&mut deserializer)
        .and_then(|entries| deserializer.end().map(|()| entries));
    let raw = parsed.map_err(|error| {
        let error = invalid(format!("header is not valid: {error}"));
        if current.is_empty() { error } else { error.in_tensor(std::mem::take(&mut current)) }
    })?;

    let mut entries = BTreeMap::new();
    for (name, raw) in raw {
        let entry = entry(&raw, data, file.len()).map_err(|error| error.in_tensor(&name))?;
        entries.insert(name, entry);
    }
    check_tiling(&entries, data, file.len())?;
    Ok(entries)
}

fn header_bytes(file: &Extent) -> Result<Vec<u8>> {
    let mut length = [0; LENGTH_FIELD];
    let Some(rest) = file.slice(LENGTH_FIELD..file.len()) else {
        return Err(invalid(format!("expected at least {LENGTH_FIELD} bytes, found {}", file.len())));
    };
    file.read(0, &mut length)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER {
        return Err(invalid(format!("header claims {length} bytes, at most {MAX_HEADER} are accepted")));
    }
    match usize::try_from(length).ok().and_then(|length| rest.slice(0..length)) {
        Some(header) => header.copy(),
        None => Err(invalid(format!("truncated: header claims {length} bytes, found {}", rest.len()))),
    }
}

/// Checks one entry by itself and moves its range from the data section to the file.
fn entry(raw: &RawEntry, data: usize, file_len: usize) -> Result<Entry> {
    if raw.shape.len() > MAX_RANK {
        return Err(invalid(format!("expected at most {MAX_RANK} dimensions, found {}", raw.shape.len())));
    }
    let bits = raw
        .shape
        .iter()
        .try_fold(1u64, |product, &dim| product.checked_mul(dim))
        .and_then(|elements| elements.checked_mul(raw.dtype.bitsize() as u64))
        .ok_or_else(|| invalid(format!("size of shape {:?} overflows", raw.shape)))?;
    if bits % 8 != 0 {
        return Err(invalid(format!("shape {:?} of {} does not fill whole bytes", raw.shape, raw.dtype)));
    }
    let (start, end) = raw.data_offsets;
    if end.checked_sub(start) != Some(bits / 8) {
        return Err(invalid(format!(
            "shape {:?} of {} needs {} bytes, offsets {start}..{end} do not span that",
            raw.shape,
            raw.dtype,
            bits / 8
        )));
    }
    let in_file = |offset: u64| usize::try_from(offset).ok()?.checked_add(data).filter(|&end| end <= file_len);
    let (Some(start), Some(end)) = (in_file(start), in_file(end)) else {
        let found = file_len - data;
        return Err(invalid(format!("truncated: data offsets {start}..{end} leave the {found} bytes of data")));
    };
    // Fits: a dimension is at most the byte length unless another is zero.
    let shape = raw.shape.iter().map(|&dim| usize::try_from(dim)).collect::<Result<_, _>>();
    let shape = shape.map_err(|_| invalid(format!("shape {:?} does not fit this machine", raw.shape)))?;
    Ok(Entry { dtype: raw.dtype, shape, range: start..end })
}

fn check_tiling(entries: &BTreeMap<String, Entry>, data: usize, file_len: usize) -> Result<()> {
    let mut ordered: Vec<_> = entries.iter().map(|(name, entry)| (&entry.range, name)).collect();
    ordered.sort_by_key(|(range, _)| (range.start, range.end));
    let mut expected = data;
    for (range, name) in ordered {
        if range.start != expected {
            let fault = if range.start < expected { "overlaps another tensor" } else { "follows a gap" };
            let (expected, found) = (expected - data, range.start - data);
            let message = format!("{fault}: expected data offset {expected}, found {found}");
            return Err(invalid(message).in_tensor(name));
        }
        expected = range.end;
    }
    if expected != file_len {
        let message = format!("{} bytes after the last tensor's data", file_len - expected);
        return Err(invalid(message));
    }
    Ok(())
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidFile, message)
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Parses the header object; leaves the tensor being read in `current`, so that a syntax error can name it.
struct HeaderSeed<'a> {
    current: &'a mut String,
}

impl<'de> DeserializeSeed<'de> for HeaderSeed<'_> {
    type Value = BTreeMap<String, RawEntry>;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderSeed<'_> {
    type Value = BTreeMap<String, RawEntry>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = BTreeMap::new();
        let mut has_metadata = false;
        while let Some(name) = map.next_key::<String>()? {
            check_name(&name).map_err(A::Error::custom)?;
            self.current.clone_from(&name);
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                if std::mem::replace(&mut has_metadata, true) {
                    return Err(A::Error::custom("two entries have this name"));
                }
            } else {
                let value = map.next_value()?;
                if entries.insert(name, value).is_some() {
                    return Err(A::Error::custom("two entries have this name"));
                }
            }
            self.current.clear();
            if entries.len() > MAX_TENSORS {
                return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
            }
        }
        Ok(entries)
    }
}

/// Names are quoted in one-line messages and used as keys; anything a model never contains is refused.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > MAX_NAME {
        return Err(format!("expected a tensor name of 1 to {MAX_NAME} bytes, found {}", name.len()));
    }
    if name.chars().any(char::is_control) {
        return Err(format!("tensor name {name:?} contains a control character"));
    }
    Ok(())
}
