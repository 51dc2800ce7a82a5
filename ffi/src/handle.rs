//! Objects as C holds them: who may use one, who is using it, and what failed on it last.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::boundary::{caught, remember, trip};
use crate::status::awqua_status::{self, *};
use crate::status::{Failure, Outcome};
use crate::text;

/// What is inside an opaque type of the header.
pub trait Object: Sized {
    /// Name for messages.
    const KIND: &'static str;
    /// First word of the object, so that handing over the wrong kind of object is noticed in languages that do not
    /// check it.
    const MAGIC: u32;
    /// The part that may be used at any time, whoever holds the rest.
    type Anytime: Sync;
}

/// An object behind a pointer of C.
#[repr(C)]
pub struct Handle<T: Object> {
    magic: u32,
    /// -1 while one call has the object for itself, else the number of calls reading it.
    users: AtomicI32,
    poisoned: AtomicBool,
    error: Mutex<String>,
    anytime: T::Anytime,
    value: UnsafeCell<T>,
}

/// Ends a use of a handle, also when the body panicked.
struct Use<'a>(&'a AtomicI32, i32);

impl Drop for Use<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Release);
    }
}

impl<T: Object> Handle<T> {
    /// A new object, owned by whoever gets the pointer.
    pub fn into_c<H>(value: T, anytime: T::Anytime) -> *mut H {
        Box::into_raw(Box::new(Self {
            magic: T::MAGIC,
            users: AtomicI32::new(0),
            poisoned: AtomicBool::new(false),
            error: Mutex::new(String::new()),
            anytime,
            value: UnsafeCell::new(value),
        }))
        .cast()
    }

    /// The object behind `pointer`.
    ///
    /// # Safety
    /// `pointer` must be NULL or an object of this library that was not freed.
    unsafe fn from_raw<'a>(pointer: *const Self) -> Outcome<&'a Self> {
        if pointer.is_null() {
            return Err(Failure::null(T::KIND));
        }
        // SAFETY: every object starts with its magic, whatever its kind.
        if !pointer.is_aligned() || unsafe { *pointer.cast::<u32>() } != T::MAGIC {
            return Err(Failure::invalid(format!("the pointer is not of a {}", T::KIND)));
        }
        // SAFETY: the magic says that it is one of ours, and it lives by the caller's promise.
        Ok(unsafe { &*pointer })
    }

    fn fail(&self, failure: Failure) -> awqua_status {
        remember(&failure.message);
        let mut error = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        *error = failure.message;
        failure.status
    }

    fn check_poison(&self) -> Outcome<()> {
        match self.poisoned.load(Ordering::Acquire) {
            false => Ok(()),
            true => {
                let message = format!("an earlier call panicked; this {} can only be freed", T::KIND);
                Err(Failure::new(AWQUA_ERR_POISONED, message))
            }
        }
    }

    fn enter(&self, exclusive: bool) -> Outcome<Use<'_>> {
        self.check_poison()?;
        let busy = || Failure::new(AWQUA_ERR_BUSY, format!("another call on this {} is running", T::KIND));
        if exclusive {
            self.users.compare_exchange(0, -1, Ordering::Acquire, Ordering::Relaxed).map_err(|_| busy())?;
            Ok(Use(&self.users, -1))
        } else {
            self.users
                .fetch_update(Ordering::Acquire, Ordering::Relaxed, |n| (n >= 0).then_some(n + 1))
                .map_err(|_| busy())?;
            Ok(Use(&self.users, 1))
        }
    }

    fn finish(&self, result: Outcome) -> awqua_status {
        result.unwrap_or_else(|failure| {
            if failure.status == AWQUA_ERR_PANIC {
                self.poisoned.store(true, Ordering::Release);
            }
            self.fail(failure)
        })
    }
}

/// An object that a call on another one has for itself until this is dropped.
pub struct Entered<'a, T: Object> {
    handle: &'a Handle<T>,
    _use: Use<'a>,
}

impl<T: Object> Entered<'_, T> {
    /// Enters the object behind `pointer`.
    ///
    /// # Safety
    /// `pointer` must be NULL or an object of this library that is not freed before the result is dropped.
    pub unsafe fn new(pointer: *mut Handle<T>) -> Outcome<Self> {
        // SAFETY: the caller's promise.
        let handle = unsafe { Handle::from_raw(pointer) }?;
        Ok(Self { handle, _use: handle.enter(true)? })
    }

    /// The object.
    pub fn get(&self) -> &T {
        // SAFETY: `users` is -1, so no other call is inside, and `self` is borrowed.
        unsafe { &*self.handle.value.get() }
    }

    /// As [`Self::get`].
    pub fn get_mut(&mut self) -> &mut T {
        // SAFETY: as in `get`, and `self` is borrowed exclusively.
        unsafe { &mut *self.handle.value.get() }
    }

    /// Keeps the text of what failed on it.
    pub fn remember(&self, message: String) {
        *self.handle.error.lock().unwrap_or_else(PoisonError::into_inner) = message;
    }
}

impl<T: Object> Drop for Entered<'_, T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.handle.poisoned.store(true, Ordering::Release);
        }
    }
}

/// Runs an exported function that takes `T*`.
///
/// # Safety
/// `pointer` must be NULL or an object of this library that is not freed before the call returns.
pub unsafe fn exclusive<T: Object>(
    name: &'static str,
    pointer: *mut Handle<T>,
    body: impl FnOnce(&mut T, &T::Anytime) -> Outcome,
) -> awqua_status {
    // SAFETY: the caller's promise.
    let handle = match unsafe { Handle::from_raw(pointer) } {
        Ok(handle) => handle,
        Err(failure) => return on_nothing(failure),
    };
    let entered = match handle.enter(true) {
        Ok(entered) => entered,
        Err(failure) => return handle.fail(failure),
    };
    let result = caught(name, || {
        trip(name);
        // SAFETY: `users` is -1, so no other call is inside.
        body(unsafe { &mut *handle.value.get() }, &handle.anytime)
    });
    let status = handle.finish(result);
    drop(entered);
    status
}

/// Runs an exported function that takes `const T*`.
///
/// # Safety
/// As [`exclusive`].
pub unsafe fn shared<T: Object>(
    name: &'static str,
    pointer: *const Handle<T>,
    body: impl FnOnce(&T, &T::Anytime) -> Outcome,
) -> awqua_status {
    // SAFETY: the caller's promise.
    let handle = match unsafe { Handle::from_raw(pointer) } {
        Ok(handle) => handle,
        Err(failure) => return on_nothing(failure),
    };
    let entered = match handle.enter(false) {
        Ok(entered) => entered,
        Err(failure) => return handle.fail(failure),
    };
    let result = caught(name, || {
        trip(name);
        // SAFETY: `users` is positive, so no call has the object for itself.
        body(unsafe { &*handle.value.get() }, &handle.anytime)
    });
    let status = handle.finish(result);
    drop(entered);
    status
}

/// Runs an exported function that may be called at any time, from any thread.
///
/// # Safety
/// As [`exclusive`].
pub unsafe fn anytime<T: Object>(
    name: &'static str,
    pointer: *const Handle<T>,
    body: impl FnOnce(&T::Anytime) -> Outcome,
) -> awqua_status {
    // SAFETY: the caller's promise.
    match unsafe { Handle::from_raw(pointer) } {
        Ok(handle) => {
            let result = handle.check_poison().and_then(|()| {
                caught(name, || {
                    trip(name);
                    body(&handle.anytime)
                })
            });
            handle.finish(result)
        }
        Err(failure) => on_nothing(failure),
    }
}

/// Ends the caller's ownership; NULL is fine. A poisoned object is freed as far as it can be.
///
/// # Safety
/// `pointer` must be NULL or an object of this library that nobody uses any more.
pub unsafe fn free<T: Object>(name: &'static str, pointer: *mut Handle<T>) -> awqua_status {
    if pointer.is_null() {
        return AWQUA_OK;
    }
    let result = caught(name, || {
        // SAFETY: the caller's promise.
        let handle = unsafe { Handle::from_raw(pointer) }?;
        if handle.users.load(Ordering::Acquire) != 0 {
            let message = format!("a call on this {} is running; it was not freed", T::KIND);
            return Err(Failure::new(AWQUA_ERR_BUSY, message));
        }
        // So that a second free of memory that is still mapped has a chance to be noticed.
        // SAFETY: the object came from `into_c` and has no other user.
        let mut object = unsafe { Box::from_raw(pointer) };
        object.magic = 0;
        trip(name);
        drop(object);
        Ok(AWQUA_OK)
    });
    result.unwrap_or_else(on_nothing)
}

/// Copies the text of the last failed call on the object.
///
/// # Safety
/// As [`exclusive`], and `buffer` must be NULL or writable for `capacity` bytes, `length` NULL or writable.
pub unsafe fn last_error<T: Object>(
    name: &'static str,
    pointer: *const Handle<T>,
    buffer: *mut std::ffi::c_char,
    capacity: u64,
    length: *mut u64,
) -> awqua_status {
    let result = caught(name, || {
        // SAFETY: the caller's promise.
        let handle = unsafe { Handle::from_raw(pointer) }?;
        trip(name);
        let error = handle.error.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the caller's promise.
        unsafe { text::put_cut(&error, buffer, capacity, length) }.map(|()| AWQUA_OK)
    });
    // A buffer that is too small must not replace the message that is being asked for.
    result.unwrap_or_else(|failure| failure.status)
}

fn on_nothing(failure: Failure) -> awqua_status {
    remember(&failure.message);
    failure.status
}
