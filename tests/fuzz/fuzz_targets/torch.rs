//! Any bytes as a file of `torch.save`: opening, verifying and reading its tensors may fail, but only politely.

#![no_main]

use std::collections::BTreeMap;

use awqua::checkpoint::{Checkpoint, Source};
use awqua::quant::Quantization;
use awqua::tensor::Bytes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let files = BTreeMap::from([
        ("config.json".to_owned(), Bytes::owned(b"{}".to_vec())),
        ("pytorch_model.bin".to_owned(), Bytes::owned(data.to_vec())),
    ]);
    let Ok(checkpoint) = Checkpoint::open_source(Source::memory("fuzz", files)) else { return };
    for tensor in checkpoint.tensors() {
        assert_eq!(tensor.bytes().expect("in memory").len(), tensor.byte_len());
    }
    let _ = Quantization::of(&checkpoint);
    let _ = awqua::model::verify(&checkpoint);
});
