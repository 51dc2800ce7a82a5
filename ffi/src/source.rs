//! Where a model's files come from if not from a folder: memory of the host, or functions of the host.

use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::io;
use std::sync::Arc;

use runtime::ErrorKind;
use runtime::checkpoint::source::{Folder, ReadAt, Source};
use runtime::tensor::Bytes;

use crate::layout::{self, Sized32, layout};
use crate::model::{AWQUA_MODEL_COPY_FILES, awqua_model_desc};
use crate::status::awqua_status::*;
use crate::status::{Failure, Outcome};
use crate::text::{self, awqua_str};

/// A file in memory.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct awqua_file {
    /// Its name in the checkpoint's folder, such as "config.json" or "model.safetensors".
    pub name: awqua_str,
    /// First byte.
    pub data: *const c_void,
    /// Bytes.
    pub len: u64,
}

layout!(awqua_file, 32, { name: 0, data: 16, len: 24 });

/// Functions of the host that read a checkpoint from wherever it is: a pak file, an Android asset, an archive. They are
/// called from the threads that tick the model or estimate it, from several at once if several do, and must not call
/// the library with an object that is in use, nor throw. Any offset may be asked for at any time, also after loading:
/// weights that were evicted, or lost with a device, are read again.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct awqua_io {
    /// sizeof(awqua_io).
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Handed to the functions.
    pub user: *mut c_void,
    /// Opens the file `name` (a plain name, with a NUL behind it) and sets `file` and `size`. Returns AWQUA_OK,
    /// AWQUA_EMPTY if there is no such file, or AWQUA_ERR_IO.
    pub open:
        Option<unsafe extern "C" fn(user: *mut c_void, name: awqua_str, file: *mut *mut c_void, size: *mut u64) -> i32>,
    /// Reads `size` bytes from `offset` on into `buffer`: all of them and AWQUA_OK, or AWQUA_ERR_IO.
    pub read_at: Option<
        unsafe extern "C" fn(user: *mut c_void, file: *mut c_void, offset: u64, buffer: *mut c_void, size: u64) -> i32,
    >,
    /// `size` bytes from `offset` on where they are in memory, valid until the file is closed, or NULL. NULL if no file
    /// can be mapped. Dense weights of the CPU are computed with where they are mapped.
    pub map:
        Option<unsafe extern "C" fn(user: *mut c_void, file: *mut c_void, offset: u64, size: u64) -> *const c_void>,
    /// Closes a file. May be NULL.
    pub close: Option<unsafe extern "C" fn(user: *mut c_void, file: *mut c_void)>,
    /// Called once when `user` is not needed any more: the model was freed, and so were its sessions. Not called if
    /// awqua_model_create fails. May be NULL.
    pub release: Option<unsafe extern "C" fn(user: *mut c_void)>,
}

// SAFETY: repr(C), u32 first, no padding on any supported target; integers, a pointer, nullable functions.
unsafe impl Sized32 for awqua_io {
    const NAME: &'static str = "awqua_io";
    const FIRST: usize = size_of::<Self>();
    const INIT: Self = Self {
        struct_size: size_of::<Self>() as u32,
        flags: 0,
        user: std::ptr::null_mut(),
        open: None,
        read_at: None,
        map: None,
        close: None,
        release: None,
    };
}

layout!(awqua_io, 56, {
    struct_size: 0, flags: 4, user: 8, open: 16, read_at: 24, map: 32, close: 40, release: 48,
});

/// What `desc` says where the files are.
///
/// # Safety
/// `desc` must hold what the header asks of an `awqua_model_desc`.
pub unsafe fn source(desc: &awqua_model_desc) -> Outcome<Option<Source>> {
    // SAFETY: the caller's promise, for all three.
    let (place, files) = unsafe { (desc.path.get("path")?, text::slice(desc.files, desc.n_files, "files")?) };
    match (files.is_empty(), desc.io.is_null()) {
        (true, true) => Ok(None),
        (false, false) => Err(Failure::invalid("`files` and `io` exclude each other")),
        (false, true) => {
            let copied = desc.flags & AWQUA_MODEL_COPY_FILES != 0;
            // SAFETY: the caller's promise.
            let files = files.iter().map(|file| unsafe { in_memory(file, copied) });
            Ok(Some(Source::memory(place, files.collect::<Outcome<BTreeMap<_, _>>>()?)))
        }
        (true, false) => {
            // SAFETY: the caller's promise.
            let io = unsafe { layout::read(desc.io) }?;
            if io.open.is_none() || io.read_at.is_none() {
                return Err(Failure::invalid("`open` or `read_at` of `awqua_io` is NULL"));
            }
            Ok(Some(Source::folder(place, Arc::new(Host(Arc::new(Functions(io)))))))
        }
    }
}

/// # Safety
/// The file must be readable, and, unless it is copied, until everything that uses it is freed.
unsafe fn in_memory(file: &awqua_file, copied: bool) -> Outcome<(String, Bytes)> {
    // SAFETY: the caller's promise, for both.
    let (name, bytes) = unsafe { (file.name.get("name")?, text::slice(file.data.cast::<u8>(), file.len, "data")?) };
    let bytes = match copied {
        false => Bytes::shared(Arc::new(bytes)),
        true => {
            let mut copy = Vec::new();
            if copy.try_reserve_exact(bytes.len()).is_err() {
                let message = format!("copying {} bytes of `{name}`", bytes.len());
                return Err(Failure::new(AWQUA_ERR_OUT_OF_MEMORY, message));
            }
            copy.extend_from_slice(bytes);
            Bytes::owned(copy)
        }
    };
    Ok((name.to_owned(), bytes))
}

/// The host's functions, until nobody needs them.
struct Functions(awqua_io);

// SAFETY: the header asks the host for functions that any thread may call, with its `user`.
unsafe impl Send for Functions {}
// SAFETY: as above.
unsafe impl Sync for Functions {}

impl Drop for Functions {
    fn drop(&mut self) {
        if let Some(release) = self.0.release {
            // SAFETY: the host's own function and argument.
            unsafe { release(self.0.user) }
        }
    }
}

struct Host(Arc<Functions>);

impl Folder for Host {
    fn open(&self, name: &str) -> runtime::Result<Option<Arc<dyn ReadAt>>> {
        let failed = |message: String| Err(runtime::Error::new(ErrorKind::Io, message));
        let Functions(io) = &*self.0;
        let (Some(open), Ok(c_name)) = (io.open, CString::new(name)) else { return Ok(None) };
        let (mut file, mut size) = (std::ptr::null_mut(), 0);
        let c_name = awqua_str { data: c_name.as_ptr(), len: name.len() as u64 };
        // SAFETY: the host's own function and argument; the name lives for the call.
        match unsafe { open(io.user, c_name, &raw mut file, &raw mut size) } {
            status if status == AWQUA_OK as i32 => {
                Ok(Some(Arc::new(Open(Arc::new(Opened { functions: self.0.clone(), file, size })))))
            }
            status if status == AWQUA_EMPTY as i32 => Ok(None),
            status => failed(format!("the host could not open it (status {status})")),
        }
    }
}

/// A file that the host opened, closed with its last user.
struct Opened {
    functions: Arc<Functions>,
    file: *mut c_void,
    size: u64,
}

// SAFETY: as for the functions that it is handed to.
unsafe impl Send for Opened {}
// SAFETY: as above.
unsafe impl Sync for Opened {}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Some(close) = self.functions.0.close {
            // SAFETY: the host's own function, argument and file.
            unsafe { close(self.functions.0.user, self.file) }
        }
    }
}

struct Open(Arc<Opened>);

impl ReadAt for Open {
    fn size(&self) -> u64 {
        self.0.size
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let Opened { functions, file, .. } = &*self.0;
        let Some(read_at) = functions.0.read_at else { return Err(io::ErrorKind::Unsupported.into()) };
        // SAFETY: the host's own function, argument and file; the buffer is writable for its length.
        match unsafe { read_at(functions.0.user, *file, offset, out.as_mut_ptr().cast(), out.len() as u64) } {
            status if status == AWQUA_OK as i32 => Ok(()),
            status => Err(io::Error::other(format!("the host could not read it (status {status})"))),
        }
    }

    fn view(&self, offset: u64, len: usize) -> Option<Bytes> {
        let Opened { functions, file, size } = &*self.0;
        offset.checked_add(len as u64).filter(|end| end <= size)?;
        // SAFETY: the host's own function, argument and file.
        let data = unsafe { functions.0.map?(functions.0.user, *file, offset, len as u64) }.cast::<u8>();
        (!data.is_null() && len > 0).then(|| Bytes::shared(Arc::new(View { data, len, _file: self.0.clone() })))
    }
}

/// Memory of a file that the host mapped, which keeps the file open.
struct View {
    data: *const u8,
    len: usize,
    _file: Arc<Opened>,
}

// SAFETY: read-only memory of the host.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

impl AsRef<[u8]> for View {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the host's `map` promises this memory while the file is open.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }
}
