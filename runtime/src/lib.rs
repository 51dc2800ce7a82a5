//! Awqua runs packed 4-bit language models inside another program: on any GPU through WGSL, or on the CPU.

pub mod backend;
pub mod checkpoint;
mod error;
pub mod model;
pub mod quant;
pub mod session;
pub mod tensor;

pub use error::{Error, ErrorKind, Result};
