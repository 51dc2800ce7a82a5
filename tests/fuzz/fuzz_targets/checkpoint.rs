//! A checkpoint folder of arbitrary bytes: opening, describing, verifying and loading it may fail, but only politely.
//!
//! Input: three little-endian u16 lengths, then the bytes of `config.json`, of the index (none if empty) and of the
//! separate `quant_config.json` (none if empty); the rest is the weight file: `a.safetensors` beside a fixed second
//! shard if there is an index.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use awqua::checkpoint::{self, Checkpoint};
use awqua::quant::{self, Quantization};
use libfuzzer_sys::fuzz_target;

/// A shard with one tensor `b` of one byte.
const OTHER_SHARD: &[u8] = b"\x3b\0\0\0\0\0\0\0{\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}      x";

/// A folder of this process, in memory where the system has such a place.
static DIR: LazyLock<PathBuf> = LazyLock::new(|| {
    let base = if std::path::Path::new("/dev/shm").is_dir() { "/dev/shm".into() } else { std::env::temp_dir() };
    let dir = base.join(format!("awqua-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a writable temporary folder");
    dir
});

fuzz_target!(|data: &[u8]| {
    let Some((lengths, mut rest)) = data.split_first_chunk::<6>() else { return };
    let mut take = |i: usize| {
        let length = usize::from(u16::from_le_bytes([lengths[2 * i], lengths[2 * i + 1]])).min(rest.len());
        let (part, tail) = rest.split_at(length);
        rest = tail;
        part
    };
    let (config, index, quant_config) = (take(0), take(1), take(2));

    let write = |name: &str, content: &[u8]| {
        let path = DIR.join(name);
        if content.is_empty() {
            let _ = std::fs::remove_file(path);
        } else {
            // A new file, not a truncated one: nothing may shrink under a mapping.
            let _ = std::fs::remove_file(&path);
            std::fs::write(path, content).expect("a writable temporary folder");
        }
    };
    write("config.json", config);
    write("model.safetensors.index.json", index);
    write("quant_config.json", quant_config);
    let (single, shard) = if index.is_empty() { (rest, &[][..]) } else { (&[][..], rest) };
    write("model.safetensors", single);
    write("a.safetensors", shard);
    write("b.safetensors", OTHER_SHARD);

    let Ok(checkpoint) = Checkpoint::open(&DIR) else { return };
    let _ = checkpoint::inspect(&checkpoint);
    let _ = awqua::model::verify(&checkpoint);
    let quantization = Quantization::of(&checkpoint).ok().flatten();
    for tensor in checkpoint.tensors() {
        let module = tensor.name.rsplit_once('.').map_or(tensor.name.as_str(), |(module, _)| module);
        let mut sizes = vec![(8, 64), (256, 256)];
        if let [rows, columns] = tensor.shape[..] {
            sizes.extend([(rows, columns), (columns, rows), (columns.saturating_mul(8), rows)]);
            sizes.extend([(rows, columns.saturating_mul(8)), (rows.saturating_mul(4), columns)]);
        }
        for (n, k) in sizes {
            let _ = quant::load_linear(&checkpoint, quantization.as_ref(), module, n, k);
        }
        let _ = checkpoint.vector(&tensor.name, tensor.shape.first().copied().unwrap_or(0));
    }
});
