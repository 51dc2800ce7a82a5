//! Where the files of a checkpoint are: on disk, in memory, or wherever a host reads them from.
//!
//! A [`Source`] is a folder of named files or one file. Its files answer reads at any offset, and may offer their bytes
//! without a copy; an [`Extent`] is a range of one that is read, or viewed, only when somebody asks for it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use crate::error::{Error, ErrorKind, Result};
use crate::tensor::Bytes;

use super::files;

/// A file that can be read at any offset, from any thread at once.
pub trait ReadAt: Send + Sync {
    /// Bytes of the file; constant.
    fn size(&self) -> u64;

    /// Fills `out` with the bytes from `offset` on.
    ///
    /// # Errors
    /// If fewer bytes are there, or reading fails.
    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()>;

    /// `len` bytes from `offset` on without copying them, where the file can offer that.
    fn view(&self, offset: u64, len: usize) -> Option<Bytes> {
        let _ = (offset, len);
        None
    }
}

/// A folder of files by name.
pub trait Folder: Send + Sync {
    /// The file `name`, a plain name without separators; `None` if there is none.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] or [`ErrorKind::InvalidFile`] if it is there and can not be used.
    fn open(&self, name: &str) -> Result<Option<Arc<dyn ReadAt>>>;
}

/// Where a checkpoint is; clones share it.
#[derive(Clone)]
pub struct Source {
    place: Arc<Path>,
    content: Content,
    /// The folder that one file on disk is in.
    around: Option<Arc<Path>>,
}

#[derive(Clone)]
enum Content {
    Folder(Arc<dyn Folder>),
    File(Arc<dyn ReadAt>),
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Source({})", self.place.display())
    }
}

impl Source {
    /// The folder or file at `path`.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if there is nothing, [`ErrorKind::InvalidFile`] if it is neither.
    pub fn path(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let metadata = std::fs::metadata(path).map_err(|error| Error::io(path, &error))?;
        if metadata.is_dir() {
            return Ok(Self::folder(path, Arc::new(Disk(path.to_path_buf()))));
        }
        match open_on_disk(path)? {
            Some(file) => {
                let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
                Ok(Self { around: Some(parent.unwrap_or(Path::new(".")).into()), ..Self::file(path, file) })
            }
            None => Err(Error::io(path, &io::ErrorKind::NotFound.into())),
        }
    }

    /// A folder; messages call it `place`.
    pub fn folder(place: impl AsRef<Path>, folder: Arc<dyn Folder>) -> Self {
        Self { place: place.as_ref().into(), content: Content::Folder(folder), around: None }
    }

    /// One file; messages call it `place`.
    pub fn file(place: impl AsRef<Path>, file: Arc<dyn ReadAt>) -> Self {
        Self { place: place.as_ref().into(), content: Content::File(file), around: None }
    }

    /// A folder whose files are in memory.
    pub fn memory(place: impl AsRef<Path>, files: BTreeMap<String, Bytes>) -> Self {
        Self::folder(place, Arc::new(InMemory(files)))
    }

    /// The folder or file as messages call it.
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// The source itself, if it is one file.
    pub fn whole(&self) -> Option<Extent> {
        match &self.content {
            Content::File(file) => Some(Extent::whole(file.clone(), self.place.clone())),
            Content::Folder(_) => None,
        }
    }

    /// The folder that the file is in, if it is one file on disk.
    pub(crate) fn around(&self) -> Option<Self> {
        let folder = self.around.as_ref()?;
        Some(Self::folder(folder, Arc::new(Disk(folder.to_path_buf()))))
    }

    /// The file `name` of a folder, or `None` if there is none.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] or [`ErrorKind::InvalidFile`].
    pub fn open(&self, name: &str) -> Result<Option<Extent>> {
        let Content::Folder(folder) = &self.content else { return Ok(None) };
        let path = self.place.join(name);
        let file = folder.open(name).map_err(|error| error.in_file(&path))?;
        Ok(file.map(|file| Extent::whole(file, path.into())))
    }

    /// The content of the file `name` if it has at most `limit` bytes, or `None` if there is none.
    ///
    /// # Errors
    /// As [`Self::open`], and [`ErrorKind::InvalidFile`] for larger files.
    pub fn read(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let Some(extent) = self.open(name)? else { return Ok(None) };
        if extent.len() as u64 > limit {
            let message = format!("expected at most {limit} bytes, found {}", extent.len());
            return Err(Error::new(ErrorKind::InvalidFile, message).in_file(extent.path()));
        }
        extent.copy().map(Some)
    }

    /// As [`Self::read`], as JSON.
    ///
    /// # Errors
    /// As [`Self::read`], and [`ErrorKind::InvalidFile`] for a syntax error.
    pub fn json(&self, name: &str) -> Result<Option<serde_json::Value>> {
        let Some(bytes) = self.read(name, files::MAX_JSON)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            Error::new(ErrorKind::InvalidFile, format!("not valid JSON: {error}")).in_file(self.place.join(name))
        })
    }
}

/// A range of a file, read when asked for; clones share the file.
#[derive(Clone)]
pub struct Extent {
    file: Arc<dyn ReadAt>,
    path: Arc<Path>,
    offset: u64,
    len: usize,
}

impl fmt::Debug for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Extent({}, {} bytes from {})", self.path.display(), self.len, self.offset)
    }
}

impl Extent {
    /// The whole of `file`, which messages call `path`. What this machine can not address is left out.
    pub fn whole(file: Arc<dyn ReadAt>, path: Arc<Path>) -> Self {
        let len = usize::try_from(file.size()).unwrap_or(usize::MAX);
        Self { file, path, offset: 0, len }
    }

    /// Bytes of the range.
    #[allow(clippy::len_without_is_empty, reason = "an empty range is nothing special")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The file as messages call it.
    pub fn path(&self) -> &Arc<Path> {
        &self.path
    }

    /// The sub-range `range`, relative to this one, or `None` if it leaves it.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        let len = range.end.checked_sub(range.start).filter(|_| range.end <= self.len)?;
        Some(Self { offset: self.offset + range.start as u64, len, ..self.clone() })
    }

    /// The bytes: a view of the file where it offers one, else a copy.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] or [`ErrorKind::OutOfMemory`].
    pub fn bytes(&self) -> Result<Bytes> {
        match self.view() {
            Some(view) => Ok(view),
            None => self.copy().map(Bytes::owned),
        }
    }

    /// The bytes without a copy, where the file offers that.
    pub fn view(&self) -> Option<Bytes> {
        self.file.view(self.offset, self.len).filter(|view| view.len() == self.len)
    }

    /// A copy of the bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] or [`ErrorKind::OutOfMemory`].
    pub fn copy(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(self.len).map_err(|_| {
            Error::new(ErrorKind::OutOfMemory, format!("reading {} bytes", self.len)).in_file(&self.path)
        })?;
        bytes.resize(self.len, 0);
        self.read(0, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `out` with the bytes from `at` on, relative to this range.
    ///
    /// # Errors
    /// [`ErrorKind::Io`], also for bytes outside the range.
    pub fn read(&self, at: usize, out: &mut [u8]) -> Result<()> {
        let io = |error: &io::Error| Error::io(&self.path, error);
        if at.checked_add(out.len()).is_none_or(|end| end > self.len) {
            return Err(io(&io::ErrorKind::UnexpectedEof.into()));
        }
        self.file.read_at(self.offset + at as u64, out).map_err(|error| io(&error))
    }

    /// Tells the system that the pages of a view will be read soon; see [`Bytes::prefetch`].
    pub fn prefetch(&self) {
        if let Some(view) = self.view() {
            view.prefetch();
        }
    }

    /// Tells the system that the pages of a view will not be read soon; see [`Bytes::release`].
    pub fn release(&self) {
        if let Some(view) = self.view() {
            view.release();
        }
    }
}

/// A folder on disk.
struct Disk(PathBuf);

impl Folder for Disk {
    fn open(&self, name: &str) -> Result<Option<Arc<dyn ReadAt>>> {
        open_on_disk(&self.0.join(name))
    }
}

/// A file on disk, mapped when somebody wants a view.
struct OnDisk {
    file: File,
    size: u64,
    path: PathBuf,
    map: OnceLock<Option<Bytes>>,
    /// Readers that have to move the file's position take turns.
    #[cfg(not(unix))]
    turn: std::sync::Mutex<()>,
}

fn open_on_disk(path: &Path) -> Result<Option<Arc<dyn ReadAt>>> {
    let Some((file, size)) = files::open_regular(path)? else { return Ok(None) };
    Ok(Some(Arc::new(OnDisk {
        file,
        size,
        path: path.to_path_buf(),
        map: OnceLock::new(),
        #[cfg(not(unix))]
        turn: std::sync::Mutex::new(()),
    })))
}

impl ReadAt for OnDisk {
    fn size(&self) -> u64 {
        self.size
    }

    #[cfg(unix)]
    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, out, offset)
    }

    #[cfg(not(unix))]
    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        use std::io::{Read, Seek, SeekFrom};
        let _turn = self.turn.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        (&self.file).seek(SeekFrom::Start(offset))?;
        (&self.file).read_exact(out)
    }

    fn view(&self, offset: u64, len: usize) -> Option<Bytes> {
        let map = self.map.get_or_init(|| files::map(&self.file, &self.path).ok()).as_ref()?;
        let start = usize::try_from(offset).ok()?;
        map.slice(start..start.checked_add(len)?)
    }
}

struct InMemory(BTreeMap<String, Bytes>);

impl Folder for InMemory {
    fn open(&self, name: &str) -> Result<Option<Arc<dyn ReadAt>>> {
        Ok(self.0.get(name).map(|bytes| Arc::new(bytes.clone()) as Arc<dyn ReadAt>))
    }
}

impl ReadAt for Bytes {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = start.checked_add(out.len()).and_then(|end| self.get(start..end));
        out.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn view(&self, offset: u64, len: usize) -> Option<Bytes> {
        let start = usize::try_from(offset).ok()?;
        self.slice(start..start.checked_add(len)?)
    }
}
