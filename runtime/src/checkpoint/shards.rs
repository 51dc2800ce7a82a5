//! The index that says which file of the folder holds which tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Component, Path};

use serde::Deserialize;
use serde::de::{Error as _, MapAccess, Visitor};

use crate::error::{Error, ErrorKind, Result};

use super::safetensors::check_name;

/// Largest index file, bytes.
pub(crate) const MAX_INDEX: u64 = 100_000_000;

/// `model.safetensors.index.json`.
#[derive(Debug)]
pub(crate) struct Index {
    /// Tensor name to file name inside the folder.
    pub weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Parses the index; every file name is a plain name inside the folder.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidFile`], with the tensor where one is to blame; the caller adds the file.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let raw: RawIndex = serde_json::from_slice(bytes)
            .map_err(|error| Error::new(ErrorKind::InvalidFile, format!("not a valid index: {error}")))?;
        let weight_map = raw.weight_map.0;
        if weight_map.is_empty() {
            return Err(Error::new(ErrorKind::InvalidFile, "`weight_map` is empty"));
        }
        for (tensor, file) in &weight_map {
            if !is_plain_file_name(file) {
                let message = format!("shard {file:?} is not a plain file name inside the checkpoint's folder");
                return Err(Error::new(ErrorKind::InvalidFile, message).in_tensor(tensor));
            }
        }
        Ok(Self { weight_map })
    }

    /// File names, each once, sorted.
    pub fn files(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }
}

/// Whether `name` names a file directly in a folder on every system: no separator of any of them, no `..`, no drive.
fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
        && name.len() <= 255
        && !name.contains(|c: char| matches!(c, '/' | '\\' | ':') || c.is_control())
}

#[derive(Deserialize)]
struct RawIndex {
    weight_map: UniqueMap,
}

/// A string map that refuses a key given twice, where the usual map keeps the last silently.
struct UniqueMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for UniqueMap {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct UniqueVisitor;
        impl<'de> Visitor<'de> for UniqueVisitor {
            type Value = UniqueMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from tensor names to file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueMap, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some((tensor, file)) = map.next_entry::<String, String>()? {
                    check_name(&tensor).map_err(A::Error::custom)?;
                    if let Some(first) = entries.insert(tensor.clone(), file) {
                        return Err(A::Error::custom(format!("`{tensor}` is listed twice, first in {first:?}")));
                    }
                }
                Ok(UniqueMap(entries))
            }
        }
        deserializer.deserialize_map(UniqueVisitor)
    }
}
