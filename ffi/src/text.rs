//! Text and arrays across the boundary: pointer and length in, caller's memory out.

use crate::layout::layout;
use crate::status::awqua_status::*;
use crate::status::{Failure, Outcome};

/// Length of an `awqua_str` whose end is its NUL.
pub const AWQUA_STRLEN: u64 = u64::MAX;

/// UTF-8 text: `len` bytes at `data`, or up to the NUL if `len` is AWQUA_STRLEN. NULL is the empty text. It is read
/// during the call only.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct awqua_str {
    /// First byte.
    pub data: *const std::ffi::c_char,
    /// Bytes, or AWQUA_STRLEN.
    pub len: u64,
}

impl awqua_str {
    pub const EMPTY: Self = Self { data: std::ptr::null(), len: 0 };

    /// The text; `what` names it in the failure.
    ///
    /// # Safety
    /// `data` must be NULL or readable for `len` bytes (up to its NUL) for `'a`.
    pub unsafe fn get<'a>(self, what: &str) -> Outcome<&'a str> {
        if self.data.is_null() {
            return match self.len {
                0 | AWQUA_STRLEN => Ok(""),
                len => Err(Failure::invalid(format!("`{what}` is NULL with a length of {len}"))),
            };
        }
        let bytes = match self.len {
            // SAFETY: the caller promises a NUL.
            AWQUA_STRLEN => unsafe { std::ffi::CStr::from_ptr(self.data) }.to_bytes(),
            // SAFETY: the caller's promise.
            len => unsafe { slice(self.data.cast::<u8>(), len, what) }?,
        };
        std::str::from_utf8(bytes)
            .map_err(|e| Failure::invalid(format!("`{what}` is not UTF-8: bad byte at offset {}", e.valid_up_to())))
    }

    /// As [`Self::get`], `None` for the empty text.
    ///
    /// # Safety
    /// As [`Self::get`].
    pub unsafe fn get_optional<'a>(self, what: &str) -> Outcome<Option<&'a str>> {
        // SAFETY: the caller's promise.
        Ok(Some(unsafe { self.get(what) }?).filter(|s| !s.is_empty()))
    }
}

fn check_array<T>(data: *const T, len: u64, what: &str) -> Outcome<usize> {
    let len = usize::try_from(len)
        .ok()
        .filter(|n| n.checked_mul(size_of::<T>()).is_some_and(|bytes| bytes <= isize::MAX as usize))
        .ok_or_else(|| Failure::invalid(format!("`{what}` has an absurd length of {len}")))?;
    if len > 0 && data.is_null() {
        return Err(Failure::invalid(format!("`{what}` is NULL with a length of {len}")));
    }
    if !data.is_aligned() {
        return Err(Failure::invalid(format!("`{what}` is not aligned to {} bytes", align_of::<T>())));
    }
    Ok(len)
}

/// An array of the caller.
///
/// # Safety
/// `data` must be NULL or readable for `len` elements for `'a`.
pub unsafe fn slice<'a, T>(data: *const T, len: u64, what: &str) -> Outcome<&'a [T]> {
    match check_array(data, len, what)? {
        0 => Ok(&[]),
        // SAFETY: not NULL, aligned, of a possible size, and readable by the caller's promise.
        len => Ok(unsafe { std::slice::from_raw_parts(data, len) }),
    }
}

/// Memory of the caller to write to. Its bytes must count as initialised, which all memory of C does here: they are
/// only ever overwritten.
///
/// # Safety
/// `data` must be NULL or writable for `len` elements for `'a`, and nobody else may touch it.
pub unsafe fn slice_mut<'a, T: Copy>(data: *mut T, len: u64, what: &str) -> Outcome<&'a mut [T]> {
    match check_array(data, len, what)? {
        0 => Ok(&mut []),
        // SAFETY: as in `slice`.
        len => Ok(unsafe { std::slice::from_raw_parts_mut(data, len) }),
    }
}

/// Where one value goes.
///
/// # Safety
/// `data` must be NULL or writable.
pub unsafe fn out<'a, T>(data: *mut T, what: &str) -> Outcome<&'a mut T> {
    if data.is_null() {
        return Err(Failure::null(what));
    }
    check_array(data, 1, what)?;
    // SAFETY: checked above, writable by the caller's promise.
    Ok(unsafe { &mut *data })
}

/// Copies `values` to the caller's `data` if `capacity` suffices, and their number to `count` either way.
///
/// # Safety
/// `data` must be NULL or writable for `capacity` elements, `count` NULL or writable.
pub unsafe fn put<T: Copy>(values: &[T], data: *mut T, capacity: u64, count: *mut u64) -> Outcome<()> {
    // SAFETY: the caller's promise.
    let (data, count) = unsafe { (slice_mut(data, capacity, "buffer")?, out(count, "count")?) };
    *count = values.len() as u64;
    match data.get_mut(..values.len()) {
        Some(data) => data.copy_from_slice(values),
        None => return Err(too_small(values.len() as u64, capacity)),
    }
    Ok(())
}

/// As [`put`] for text, which gets a NUL behind it: `capacity` must be larger than the length by one.
///
/// # Safety
/// As [`put`].
pub unsafe fn put_text(text: &str, data: *mut std::ffi::c_char, capacity: u64, length: *mut u64) -> Outcome<()> {
    // SAFETY: the caller's promise.
    let (data, length) = unsafe { (slice_mut(data.cast::<u8>(), capacity, "buffer")?, out(length, "length")?) };
    *length = text.len() as u64;
    if data.len() <= text.len() {
        return Err(too_small(text.len() as u64 + 1, capacity));
    }
    data[..text.len()].copy_from_slice(text.as_bytes());
    data[text.len()] = 0;
    Ok(())
}

/// As [`put_text`], but what does not fit is cut off at a character.
///
/// # Safety
/// As [`put`]; `length` may be NULL.
pub unsafe fn put_cut(text: &str, data: *mut std::ffi::c_char, capacity: u64, length: *mut u64) -> Outcome<()> {
    // SAFETY: the caller's promise.
    let data = unsafe { slice_mut(data.cast::<u8>(), capacity, "buffer") }?;
    if !length.is_null() {
        // SAFETY: the caller's promise.
        *unsafe { out(length, "length") }? = text.len() as u64;
    }
    if let Some(room) = data.len().checked_sub(1) {
        let cut = whole_chars(text, room);
        data[..cut].copy_from_slice(&text.as_bytes()[..cut]);
        data[cut] = 0;
    }
    match data.len() > text.len() {
        true => Ok(()),
        false => Err(too_small(text.len() as u64 + 1, capacity)),
    }
}

/// The failure of a call whose result does not fit.
pub fn too_small(needed: u64, capacity: u64) -> Failure {
    Failure::new(AWQUA_ERR_BUFFER_TOO_SMALL, format!("the buffer holds {capacity}, {needed} are needed"))
}

/// Bytes of the longest start of `text` that has at most `room` bytes and whole characters.
pub fn whole_chars(text: &str, room: usize) -> usize {
    let mut cut = room.min(text.len());
    while !text.is_char_boundary(cut) {
        cut -= 1;
    }
    cut
}

layout!(awqua_str, 16, { data: 0, len: 8 });
