//! What the command keeps between runs.

use std::path::PathBuf;
use std::sync::Arc;

use awqua::{Error, ErrorKind};

use crate::output::{self, Outcome};

/// What `awqua tune` found.
const TUNING: &str = "tuning.txt";
/// More bytes than that file ever has.
const MOST_TUNING: u64 = 1 << 20;

/// The folder; it may not be there.
fn place() -> Outcome<PathBuf> {
    Ok(match std::env::var_os("AWQUA_CACHE") {
        Some(folder) => PathBuf::from(folder),
        None => directories::ProjectDirs::from("", "", "awqua")
            .map(|dirs| dirs.cache_dir().to_path_buf())
            .ok_or_else(|| Error::new(ErrorKind::Io, "this system has no cache folder; set AWQUA_CACHE"))?,
    })
}

/// The folder, made if it is not there.
pub fn folder() -> Outcome<PathBuf> {
    let folder = place()?;
    std::fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, &e))?;
    Ok(folder)
}

/// What `awqua tune` found on the adapters of this machine, if it ran; what can not be read is noted and ignored.
pub fn tuning() -> Option<Arc<Vec<u8>>> {
    let file = place().ok()?.join(TUNING);
    let read = std::fs::metadata(&file).and_then(|about| match about.len() {
        0..=MOST_TUNING => std::fs::read(&file),
        bytes => Err(std::io::Error::other(format!("it has {bytes} bytes"))),
    });
    match read {
        Ok(saved) => Some(Arc::new(saved)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
        Err(e) => {
            output::note(&format!("note: the tuning in {} is ignored: {e}", file.display()));
            None
        }
    }
}

/// Keeps it, as a whole or not at all.
pub fn keep_tuning(saved: &[u8]) -> Outcome<PathBuf> {
    let folder = folder()?;
    let (file, part) = (folder.join(TUNING), folder.join(format!(".{TUNING}-{}", std::process::id())));
    let written = std::fs::write(&part, saved).and_then(|()| std::fs::rename(&part, &file));
    written.map_err(|e| {
        // A part that can not be removed either is no worse than the failure that is reported.
        let _ = std::fs::remove_file(&part);
        Error::io(&file, &e)
    })?;
    Ok(file)
}
