//! What a call returns, and the failures behind it.

use std::fmt;

use runtime::ErrorKind;

/// What every call returns: 0 is success, negative is a failure, positive is success with something to know.
///
/// Values are never renumbered and never reused; later versions only add some, so treat an unknown negative value as a
/// failure and an unknown positive one as success.
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum awqua_status {
    /// Done.
    AWQUA_OK = 0,
    /// Not finished: tick again.
    AWQUA_PENDING = 1,
    /// There is no event.
    AWQUA_EMPTY = 2,

    /// An argument is NULL, out of range or malformed.
    AWQUA_ERR_INVALID_ARGUMENT = -1,
    /// `struct_size` is too small, absurd, or the structure is newer than the library and uses what it does not know.
    AWQUA_ERR_STRUCT_SIZE = -2,
    /// The caller's buffer is too small; the needed size was written, nothing is lost.
    AWQUA_ERR_BUFFER_TOO_SMALL = -3,
    /// The object is not in a state that allows the call.
    AWQUA_ERR_STATE = -4,
    /// Another call on the object is running, in another thread or further up this one's stack.
    AWQUA_ERR_BUSY = -5,
    /// The library failed inside (a defect of it). The object accepts only its free and last_error functions.
    AWQUA_ERR_PANIC = -6,
    /// An earlier call on the object returned AWQUA_ERR_PANIC.
    AWQUA_ERR_POISONED = -7,
    /// The caller cancelled.
    AWQUA_ERR_CANCELLED = -8,
    /// A file could not be opened, mapped or read, or the host's callback failed.
    AWQUA_ERR_IO = -9,
    /// A file's bytes break the rules of its format.
    AWQUA_ERR_INVALID_FILE = -10,
    /// A configuration value is missing, out of range or contradicts another one.
    AWQUA_ERR_INVALID_CONFIG = -11,
    /// A tensor is missing, or has the wrong dtype, shape or values.
    AWQUA_ERR_INVALID_TENSOR = -12,
    /// Well formed, but this build does not do it.
    AWQUA_ERR_UNSUPPORTED = -13,
    /// The tokenizer could not be loaded, or failed on the text.
    AWQUA_ERR_TOKENIZER = -14,
    /// The chat template is missing, does not compile or refused the conversation.
    AWQUA_ERR_TEMPLATE = -15,
    /// The tokens do not fit the session's context.
    AWQUA_ERR_CONTEXT_FULL = -16,
    /// Memory is not enough, or a budget forbids it; the message names the needed bytes.
    AWQUA_ERR_OUT_OF_MEMORY = -17,
    /// There is no usable device or driver.
    AWQUA_ERR_NO_DEVICE = -18,
    /// The device failed an operation.
    AWQUA_ERR_DEVICE = -19,
    /// The device was lost (driver reset, removal).
    AWQUA_ERR_DEVICE_LOST = -20,
    /// The library's ABI is not the one asked for.
    AWQUA_ERR_ABI = -21,
    /// A failure that this ABI has no code for.
    AWQUA_ERR_OTHER = -22,
    /// The weights were evicted; awqua_model_restore brings them back.
    AWQUA_ERR_EVICTED = -23,
}

use awqua_status::*;

impl awqua_status {
    /// The C name of the value, NUL-terminated.
    pub(crate) fn c_name(value: i32) -> &'static std::ffi::CStr {
        macro_rules! names {
            ($($name:ident),* $(,)?) => {{
                $(if value == $name as i32 {
                    const NAME: &std::ffi::CStr =
                        match std::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                            Ok(name) => name,
                            Err(_) => panic!("a name without NUL"),
                        };
                    return NAME;
                })*
                c"AWQUA_UNKNOWN"
            }};
        }
        names!(
            AWQUA_OK,
            AWQUA_PENDING,
            AWQUA_EMPTY,
            AWQUA_ERR_INVALID_ARGUMENT,
            AWQUA_ERR_STRUCT_SIZE,
            AWQUA_ERR_BUFFER_TOO_SMALL,
            AWQUA_ERR_STATE,
            AWQUA_ERR_BUSY,
            AWQUA_ERR_PANIC,
            AWQUA_ERR_POISONED,
            AWQUA_ERR_CANCELLED,
            AWQUA_ERR_IO,
            AWQUA_ERR_INVALID_FILE,
            AWQUA_ERR_INVALID_CONFIG,
            AWQUA_ERR_INVALID_TENSOR,
            AWQUA_ERR_UNSUPPORTED,
            AWQUA_ERR_TOKENIZER,
            AWQUA_ERR_TEMPLATE,
            AWQUA_ERR_CONTEXT_FULL,
            AWQUA_ERR_OUT_OF_MEMORY,
            AWQUA_ERR_NO_DEVICE,
            AWQUA_ERR_DEVICE,
            AWQUA_ERR_DEVICE_LOST,
            AWQUA_ERR_ABI,
            AWQUA_ERR_OTHER,
            AWQUA_ERR_EVICTED,
        )
    }
}

/// A failed call: its status and the text behind it.
#[derive(Debug)]
pub struct Failure {
    pub status: awqua_status,
    pub message: String,
}

/// Result of the body of an exported function.
pub type Outcome<T = awqua_status> = Result<T, Failure>;

impl Failure {
    pub fn new(status: awqua_status, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(AWQUA_ERR_INVALID_ARGUMENT, message)
    }

    pub fn null(what: &str) -> Self {
        Self::invalid(format!("`{what}` is NULL"))
    }

    pub fn state(message: impl Into<String>) -> Self {
        Self::new(AWQUA_ERR_STATE, message)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// The status of a runtime error.
pub fn status_of(kind: ErrorKind) -> awqua_status {
    match kind {
        ErrorKind::Io => AWQUA_ERR_IO,
        ErrorKind::InvalidFile => AWQUA_ERR_INVALID_FILE,
        ErrorKind::InvalidConfig => AWQUA_ERR_INVALID_CONFIG,
        ErrorKind::InvalidTensor => AWQUA_ERR_INVALID_TENSOR,
        ErrorKind::Unsupported => AWQUA_ERR_UNSUPPORTED,
        ErrorKind::Tokenizer => AWQUA_ERR_TOKENIZER,
        ErrorKind::Template => AWQUA_ERR_TEMPLATE,
        ErrorKind::InvalidInput => AWQUA_ERR_INVALID_ARGUMENT,
        ErrorKind::ContextFull => AWQUA_ERR_CONTEXT_FULL,
        ErrorKind::OutOfMemory => AWQUA_ERR_OUT_OF_MEMORY,
        ErrorKind::NoDevice => AWQUA_ERR_NO_DEVICE,
        ErrorKind::Device => AWQUA_ERR_DEVICE,
        ErrorKind::DeviceLost => AWQUA_ERR_DEVICE_LOST,
        ErrorKind::Cancelled => AWQUA_ERR_CANCELLED,
        ErrorKind::Evicted => AWQUA_ERR_EVICTED,
        _ => AWQUA_ERR_OTHER,
    }
}

impl From<runtime::Error> for Failure {
    fn from(error: runtime::Error) -> Self {
        Self::new(status_of(error.kind()), error.to_string())
    }
}
