//! Which bytes: a folder or file on disk as validated views of tensors.

pub mod gguf;
