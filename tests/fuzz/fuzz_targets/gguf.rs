//! Any bytes as a GGUF file: reading it, expanding the first and last row of each tensor, and opening and verifying it as
//! a checkpoint never panics.

#![no_main]

use std::path::Path;
use std::sync::Arc;

use awqua::checkpoint::gguf::Gguf;
use awqua::checkpoint::{Checkpoint, Source};
use awqua::tensor::Bytes;
use libfuzzer_sys::fuzz_target;

/// Rows longer than this are left alone, elements: allocating them is not what is tested.
const MAX_ROW: usize = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let Ok(gguf) = Gguf::parse(Bytes::owned(data.to_vec()), Path::new("fuzz.gguf")) else { return };
    for tensor in gguf.tensors() {
        if tensor.row_len() > MAX_ROW {
            continue;
        }
        let mut row = vec![0.0; tensor.row_len()];
        for index in [0, tensor.rows() - 1] {
            tensor.dequantize_row(index, &mut row).expect("the row exists");
        }
    }
    if let Ok(checkpoint) = Checkpoint::open_source(Source::file("fuzz.gguf", Arc::new(Bytes::owned(data.to_vec())))) {
        let _ = awqua::model::verify(&checkpoint);
    }
});
