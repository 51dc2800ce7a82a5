//! Any bytes as a GGUF file: reading it and expanding the first and last row of each tensor never panics.

#![no_main]

use std::path::Path;

use awqua::checkpoint::gguf::Gguf;
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
});
