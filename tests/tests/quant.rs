//! Packed weights of every dialect against the numbers of the software that wrote them, and round trips.

use std::path::{Path, PathBuf};

use awqua::checkpoint::Checkpoint;
use awqua::quant::{Dialect, Quantization, load_linear};
use awqua::tensor::{Offset, Weight};
use half::f16;
use sha2::{Digest, Sha256};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// Every fixture folder with packed weights, i.e. whose reference has hashes of dequantized tensors.
fn packed_fixtures() -> Vec<(PathBuf, serde_json::Value)> {
    let mut found = Vec::new();
    for kind in ["formats", "arch"] {
        for entry in std::fs::read_dir(fixtures().join(kind)).unwrap() {
            let dir = entry.unwrap().path();
            let text = std::fs::read_to_string(dir.join("reference/reference.json")).unwrap();
            let reference: serde_json::Value = serde_json::from_str(&text).unwrap();
            if let Some(hashes) = reference
                .get("dequant_f16_sha256")
                .filter(|hashes| hashes.as_object().is_some_and(|map| !map.is_empty()))
            {
                found.push((dir, hashes.clone()));
            }
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

/// SHA-256 of a matrix in half precision, row-major, little-endian.
fn hash(matrix: &awqua::tensor::W4Matrix) -> String {
    let mut hasher = Sha256::new();
    let mut row = vec![0.0; matrix.k];
    for n in 0..matrix.n {
        matrix.dequantize_row(n, &mut row);
        let bytes: Vec<u8> = row.iter().flat_map(|&w| f16::from_f32(w).to_le_bytes()).collect();
        hasher.update(&bytes);
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// (N, K) of a linear, from the dense weights' config rather than from the tensors that are to be checked.
fn shape(config: &serde_json::Value, module: &str) -> (usize, usize) {
    let number = |key: &str| config.get(key).and_then(serde_json::Value::as_u64).map(|v| v as usize);
    let hidden = number("hidden_size").unwrap();
    let inter = number("intermediate_size").unwrap();
    let heads = number("num_attention_heads").unwrap();
    let head_dim = number("head_dim").unwrap_or(hidden / heads);
    let kv = number("num_key_value_heads").unwrap_or(heads) * head_dim;
    match module.rsplit('.').next().unwrap() {
        "q_proj" => (heads * head_dim, hidden),
        "k_proj" | "v_proj" => (kv, hidden),
        "o_proj" => (hidden, heads * head_dim),
        "gate_proj" | "up_proj" => (inter, hidden),
        "down_proj" => (hidden, inter),
        other => panic!("unexpected module {other}"),
    }
}

#[test]
fn every_packed_tensor_dequantizes_to_the_writers_bytes() {
    let mut dialects = std::collections::HashSet::new();
    let mut tensors = 0;
    let mut wrong = Vec::new();
    for (dir, hashes) in packed_fixtures() {
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let quantization = Quantization::of(&checkpoint).unwrap().expect("a packed fixture");
        dialects.insert(quantization.dialect());
        for (name, expected) in hashes.as_object().unwrap() {
            let module = name.strip_suffix(".weight").unwrap();
            let (n, k) = shape(checkpoint.config(), module);
            let Weight::W4(matrix) = load_linear(&checkpoint, Some(&quantization), module, n, k).unwrap() else {
                panic!("{name} of {} is not packed", dir.display());
            };
            let offset = if quantization.dialect() == Dialect::AwqGemvFast { Offset::Bias } else { Offset::Zero };
            assert_eq!(matrix.offset, offset);
            tensors += 1;
            if hash(&matrix) != expected.as_str().unwrap() {
                wrong.push(format!("{}: {name}", dir.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {tensors} tensors differ: {wrong:#?}", wrong.len());
    assert_eq!(dialects.len(), 4, "a dialect has no fixture: {dialects:?}");
    assert!(tensors > 150, "only {tensors} tensors were compared");
}
