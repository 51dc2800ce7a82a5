//! The functions as a table, and what the library is.

use std::ffi::{CStr, c_char};

use crate::boundary::{guard, with_last};
use crate::status::Failure;
use crate::status::awqua_status::{self, *};
use crate::text;
use crate::version::{AWQUA_ABI_MAJOR, AWQUA_ABI_MINOR};

/// ABI of the library that is loaded, as AWQUA_ABI_VERSION: major << 16 | minor. A program works with a library of the
/// same major and the same or a higher minor version.
#[unsafe(no_mangle)]
pub extern "C" fn awqua_abi_version() -> u32 {
    AWQUA_ABI_MAJOR << 16 | AWQUA_ABI_MINOR
}

/// Version of the library, as "1.2.3".
#[unsafe(no_mangle)]
pub extern "C" fn awqua_version() -> *const c_char {
    const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => panic!("the version has a NUL"),
    };
    VERSION.as_ptr()
}

/// Name of a status, as "AWQUA_ERR_IO"; "AWQUA_UNKNOWN" for one this library does not know. Never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn awqua_status_name(status: i32) -> *const c_char {
    awqua_status::c_name(status).as_ptr()
}

/// Copies the text of the last failed call of this thread, on whatever object, cut to `capacity` and always ended by a
/// NUL. `length` may be NULL and gets the length of the whole text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_last_error(buffer: *mut c_char, capacity: u64, length: *mut u64) -> awqua_status {
    // Not `guard`: its failures would replace the text.
    crate::boundary::caught("awqua_last_error", || {
        crate::boundary::trip("awqua_last_error");
        // SAFETY: the caller's promise.
        with_last(|last| unsafe { text::put_cut(last, buffer, capacity, length) }).map(|()| AWQUA_OK)
    })
    .unwrap_or_else(|failure| failure.status)
}

use crate::table::{API, awqua_api};

/// Hands out the table of functions, for programs that load the library at run time and look up this symbol only.
///
/// Pass AWQUA_ABI_VERSION and sizeof(awqua_api) of the header the program was compiled with: fails with AWQUA_ERR_ABI
/// if the library is older than that or of another major version. The table lives as long as the library is loaded.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_get_api(abi_version: u32, table_size: u32, api: *mut *const awqua_api) -> awqua_status {
    guard("awqua_get_api", || {
        // SAFETY: the caller's promise.
        let out = unsafe { text::out(api, "api") }?;
        let (major, minor) = (abi_version >> 16, abi_version & 0xffff);
        if major != AWQUA_ABI_MAJOR || minor > AWQUA_ABI_MINOR || table_size as usize > size_of::<awqua_api>() {
            let message = format!(
                "ABI {major}.{minor} with a table of {table_size} bytes was asked for, this is {AWQUA_ABI_MAJOR}.{AWQUA_ABI_MINOR} \
                 with {}",
                size_of::<awqua_api>()
            );
            return Err(Failure::new(AWQUA_ERR_ABI, message));
        }
        *out = &raw const API;
        Ok(AWQUA_OK)
    })
}
