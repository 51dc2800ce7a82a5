//! The one error type of the runtime: a stable kind plus the place and the reason.

use std::fmt;
use std::path::{Path, PathBuf};

/// Result of every fallible call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, as a program decides on it; the text of an [`Error`] is for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system refused to open, map, read or write a file.
    Io,
    /// A file's bytes break the rules of its format (truncated, overlapping, oversized, not UTF-8).
    InvalidFile,
    /// A configuration value is missing, out of range or contradicts another one or the tensors.
    InvalidConfig,
    /// A tensor is missing, or has the wrong dtype, shape or values.
    InvalidTensor,
    /// The input is well formed but asks for something this build does not implement.
    Unsupported,
    /// The tokenizer could not be loaded or could not encode or decode.
    Tokenizer,
    /// The chat template could not be compiled or refused the conversation.
    Template,
    /// An argument of the call is out of range (empty prompt, unknown token id, bad sampling value).
    InvalidInput,
    /// The tokens do not fit the session's context.
    ContextFull,
    /// Host or device memory is not enough; the message names the needed bytes.
    OutOfMemory,
    /// No usable device or driver was found.
    NoDevice,
    /// The device failed an operation.
    Device,
    /// The device was lost (driver reset, removal); sessions on it are unusable until reloaded.
    DeviceLost,
    /// The caller cancelled.
    Cancelled,
    /// The weights were evicted; the model has to be restored first.
    Evicted,
}

impl ErrorKind {
    /// Stable lower-case name, used in machine-readable output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Io => "io",
            Self::InvalidFile => "invalid_file",
            Self::InvalidConfig => "invalid_config",
            Self::InvalidTensor => "invalid_tensor",
            Self::Unsupported => "unsupported",
            Self::Tokenizer => "tokenizer",
            Self::Template => "template",
            Self::InvalidInput => "invalid_input",
            Self::ContextFull => "context_full",
            Self::OutOfMemory => "out_of_memory",
            Self::NoDevice => "no_device",
            Self::Device => "device",
            Self::DeviceLost => "device_lost",
            Self::Cancelled => "cancelled",
            Self::Evicted => "evicted",
        }
    }
}

/// A failure with its kind, the file and tensor it concerns, and the reason.
///
/// Displays as one line: `FILE: tensor `NAME`: reason`.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    file: Option<PathBuf>,
    tensor: Option<String>,
    message: String,
}

impl Error {
    /// An error of `kind`; `message` is lower-case, without a full stop, and names what was expected and found.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, file: None, tensor: None, message: message.into() }
    }

    /// Adds the file, unless a more precise one is already there.
    #[must_use]
    pub fn in_file(mut self, file: impl AsRef<Path>) -> Self {
        self.file.get_or_insert_with(|| file.as_ref().to_path_buf());
        self
    }

    /// Adds the tensor, unless a more precise one is already there.
    #[must_use]
    pub fn in_tensor(mut self, tensor: impl Into<String>) -> Self {
        self.tensor.get_or_insert_with(|| tensor.into());
        self
    }

    /// Kind of the failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// File the failure concerns.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// Tensor the failure concerns.
    pub fn tensor(&self) -> Option<&str> {
        self.tensor.as_deref()
    }

    /// The reason alone, without file and tensor.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// An [`ErrorKind::Io`] error about `file`.
    pub fn io(file: impl AsRef<Path>, source: &std::io::Error) -> Self {
        Self::new(ErrorKind::Io, source.to_string()).in_file(file)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}: ", file.display())?;
        }
        if let Some(tensor) = &self.tensor {
            write!(f, "tensor `{tensor}`: ")?;
        }
        // Messages quote other people's text; keep the promise of one line.
        f.write_str(&self.message.replace(['\n', '\r'], " "))
    }
}

impl std::error::Error for Error {}
