//! Reading and mapping the files of a checkpoint with bounds on their size and on what they may be.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::tensor::Bytes;
use memmap2::Mmap;

/// Largest configuration-like JSON file, bytes; real ones are kilobytes.
pub(crate) const MAX_JSON: u64 = 8 << 20;

/// Opens a regular file, or `None` if nothing has that name; returns it with its length in bytes.
///
/// Symbolic links are followed, because that is how download caches build their folders. Anything that is not a
/// regular file is refused before it is opened: opening a pipe would wait for a writer for ever.
pub(crate) fn open_regular(path: &Path) -> Result<Option<(File, u64)>> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(path, &error)),
    };
    if !metadata.is_file() {
        return Err(Error::new(ErrorKind::InvalidFile, "expected a regular file").in_file(path));
    }
    let file = File::open(path).map_err(|error| Error::io(path, &error))?;
    Ok(Some((file, metadata.len())))
}

/// Maps a whole file read-only.
///
/// The mapping sees later changes of the file; a file that somebody truncates while it is mapped ends the process on
/// most systems, so map only files that stay as they are.
///
/// # Errors
/// [`ErrorKind::Io`] if it can not be opened or mapped.
pub fn map_file(path: &Path) -> Result<Bytes> {
    map(&File::open(path).map_err(|error| Error::io(path, &error))?, path)
}

/// Maps an open file; `path` is for messages. See [`map_file`].
pub(crate) fn map(file: &File, path: &Path) -> Result<Bytes> {
    if file.metadata().map_err(|error| Error::io(path, &error))?.len() == 0 {
        // An empty mapping is refused by some systems.
        return Ok(Bytes::owned(Vec::new()));
    }
    // SAFETY: the mapping is read-only and only ever read as bytes, every value of which is valid; that nobody
    // truncates the file is the caller's part, as documented.
    let map = unsafe { Mmap::map(file) }.map_err(|error| Error::io(path, &error))?;
    let length = map.len();
    Bytes::mapped(Arc::new(map), 0..length)
        .ok_or_else(|| Error::new(ErrorKind::Io, "mapping is shorter than the file").in_file(path))
}
