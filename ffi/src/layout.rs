//! Structures that carry their size, so that programs and libraries of different age understand each other.

use crate::status::awqua_status::*;
use crate::status::{Failure, Outcome};

/// A structure of the header whose first field is `struct_size`.
///
/// # Safety
/// The type is `repr(C)`, starts with `u32 struct_size`, has no padding, and every bit pattern of its fields is valid.
pub unsafe trait Sized32: Copy {
    /// Name for messages.
    const NAME: &'static str;
    /// Size of its first version; smaller ones were never shipped.
    const FIRST: usize;
    /// What fields that the caller does not have are taken to be; its `struct_size` is this library's.
    const INIT: Self;
}

/// How much larger than ours a structure of a newer header may be before its size is taken for garbage.
const ROOM: usize = 512;

fn check_size<T: Sized32>(pointer: *const T) -> Outcome<usize> {
    if pointer.is_null() {
        return Err(Failure::null(T::NAME));
    }
    if !pointer.is_aligned() {
        return Err(Failure::invalid(format!("`{}` is not aligned to {} bytes", T::NAME, align_of::<T>())));
    }
    // SAFETY: not NULL, and the caller of the callers promises a readable structure, which begins with its size.
    let size = unsafe { *pointer.cast::<u32>() } as usize;
    if size < T::FIRST || size > size_of::<T>() + ROOM || !size.is_multiple_of(4) {
        let message = format!(
            "`struct_size` of `{}` is {size}, expected {} (use its initialiser from awqua.h)",
            T::NAME,
            size_of::<T>()
        );
        return Err(Failure::new(AWQUA_ERR_STRUCT_SIZE, message));
    }
    Ok(size)
}

/// Reads a structure of the caller.
///
/// # Safety
/// `pointer` must be NULL or readable for as many bytes as its `struct_size` says.
pub unsafe fn read<T: Sized32>(pointer: *const T) -> Outcome<T> {
    let size = check_size(pointer)?;
    let mut value = T::INIT;
    let known = size.min(size_of::<T>());
    // SAFETY: readable for `size` by the caller's promise, and every bit pattern is a valid T.
    unsafe { std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), (&raw mut value).cast::<u8>(), known) };
    // SAFETY: as above; nothing is read if the structure is not larger than ours.
    let unknown = unsafe { std::slice::from_raw_parts(pointer.cast::<u8>().add(known), size - known) };
    if unknown.iter().any(|&byte| byte != 0) {
        let message = format!("`{}` comes from a newer header and uses a field this library does not know", T::NAME);
        return Err(Failure::new(AWQUA_ERR_STRUCT_SIZE, message));
    }
    Ok(value)
}

/// As [`read`], with the defaults for NULL.
///
/// # Safety
/// As [`read`].
pub unsafe fn read_or_init<T: Sized32>(pointer: *const T) -> Outcome<T> {
    match pointer.is_null() {
        true => Ok(T::INIT),
        // SAFETY: the caller's promise.
        false => unsafe { read(pointer) },
    }
}

/// A structure of the caller that will be filled in.
pub struct Out<T> {
    pointer: *mut T,
    size: usize,
}

impl<T: Sized32> Out<T> {
    /// Checks the structure before any work is done.
    ///
    /// # Safety
    /// `pointer` must be NULL or, for as many bytes as its `struct_size` says, writable until the last use of this.
    pub unsafe fn new(pointer: *mut T) -> Outcome<Self> {
        Ok(Self { pointer, size: check_size(pointer)? })
    }

    /// Bytes of the caller's version.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Writes what the caller's version has room for; its `struct_size` stays.
    pub fn write(&self, value: &T) {
        let known = self.size.min(size_of::<T>());
        // SAFETY: writable by the promise given to `new`; the size was checked to be at least `FIRST`.
        unsafe {
            let from = std::ptr::from_ref(value).cast::<u8>();
            std::ptr::copy_nonoverlapping(from.add(4), self.pointer.cast::<u8>().add(4), known - 4);
        }
    }
}

/// Body of an initialiser function: a structure of another version gets what it has room for.
///
/// # Safety
/// `pointer` must be NULL or writable for as many bytes as its `struct_size` says.
pub unsafe fn init<T: Sized32>(pointer: *mut T) -> Outcome {
    // SAFETY: the caller's promise.
    unsafe { Out::new(pointer) }?.write(&T::INIT);
    Ok(AWQUA_OK)
}

/// States the layout of a structure on 64-bit targets: its size and the offset of every field. Checked here at compile
/// time; the workspace's tests turn the same lines into static assertions in C.
macro_rules! layout {
    ($type:ident, $size:literal, { $($field:ident: $offset:literal),* $(,)? }) => {
        #[cfg(target_pointer_width = "64")]
        const _: () = {
            assert!(size_of::<$type>() == $size);
            $(assert!(std::mem::offset_of!($type, $field) == $offset);)*
        };
    };
}
pub(crate) use layout;
