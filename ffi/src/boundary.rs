//! What stands between C and the library: no panic gets out, and every failure leaves its text behind.

use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use crate::status::awqua_status::{self, *};
use crate::status::{Failure, Outcome};
use crate::text;

/// Longest text of a thread's last failure; longer ones are cut at a character.
const LAST_ERROR: usize = 1024;

thread_local! {
    // No destructor, so that a host may unload the library while its threads live; no allocation, so that reading it
    // before `awqua_set_allocator` is harmless.
    static LAST: RefCell<(usize, [u8; LAST_ERROR])> = const { RefCell::new((0, [0; LAST_ERROR])) };
}

/// Keeps the text of a failed call for `awqua_last_error`.
pub fn remember(message: &str) {
    LAST.with(|last| {
        if let Ok(mut last) = last.try_borrow_mut() {
            let cut = text::whole_chars(message, LAST_ERROR);
            last.1[..cut].copy_from_slice(&message.as_bytes()[..cut]);
            last.0 = cut;
        }
    });
}

/// Hands the text of the last failed call of this thread to `f`.
pub fn with_last<T>(f: impl FnOnce(&str) -> T) -> T {
    LAST.with(|last| match last.try_borrow() {
        Ok(last) => f(std::str::from_utf8(&last.1[..last.0]).unwrap_or_default()),
        Err(_) => f(""),
    })
}

/// Runs the body of the exported function `name`: panics and failures become statuses.
pub fn guard(name: &'static str, body: impl FnOnce() -> Outcome) -> awqua_status {
    match caught(name, || {
        trip(name);
        body()
    }) {
        Ok(status) => status,
        Err(failure) => {
            remember(&failure.message);
            failure.status
        }
    }
}

/// Runs `body` with panics turned into failures.
pub fn caught<T>(name: &'static str, body: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    quiet_panics();
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
        let message = format!("{name} panicked: {}", describe(&*payload));
        // A payload can panic in its own destructor.
        if let Err(second) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
            std::mem::forget(second);
        }
        log::error!("{message}");
        Err(Failure::new(AWQUA_ERR_PANIC, message))
    })
}

fn describe(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// Takes the place of the hook that prints panics to standard error. The library has its own copy of Rust's standard
/// library, so no other Rust code of the process is touched.
fn quiet_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        std::panic::set_hook(Box::new(|info| {
            if let Some(place) = info.location() {
                log::error!("panic at {}:{}", place.file(), place.line());
            }
        }));
    });
}

/// Where an injected panic happens in `name`.
pub fn trip(name: &'static str) {
    #[cfg(feature = "fault-injection")]
    fault::trip(name);
    #[cfg(not(feature = "fault-injection"))]
    let _ = name;
}

/// Panics on demand, for the tests of the boundary.
#[cfg(feature = "fault-injection")]
mod fault {
    use std::sync::{Mutex, PoisonError};

    use crate::text::awqua_str;

    /// Length and bytes of a name; an array, because `awqua_set_allocator` works only while nothing is allocated.
    static ARMED: Mutex<(usize, [u8; 64])> = Mutex::new((0, [0; 64]));

    pub fn trip(name: &str) {
        let mut armed = ARMED.lock().unwrap_or_else(PoisonError::into_inner);
        if armed.0 > 0 && armed.1[..armed.0] == *name.as_bytes() {
            armed.0 = 0;
            drop(armed);
            panic!("injected");
        }
    }

    /// Makes the next call of the exported function `name` panic behind its boundary; no name disarms.
    /// cbindgen:ignore
    ///
    /// # Safety
    /// `name` must be NULL or readable for its length.
    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn awqua_test_panic(name: awqua_str) {
        // SAFETY: the caller's promise.
        let name = unsafe { name.get("name") }.unwrap_or_default();
        let mut armed = ARMED.lock().unwrap_or_else(PoisonError::into_inner);
        armed.0 = name.len();
        armed.1[..name.len()].copy_from_slice(name.as_bytes());
    }
}
