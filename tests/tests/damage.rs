//! Checkpoint folders with random damage: whatever happens is a result, never a panic.
//!
//! The fuzz target `checkpoint` walks the same road with coverage feedback; this keeps a small walk in every test run.

mod disk;

use awqua::checkpoint::{self, Checkpoint};
use awqua::quant::{Quantization, load_linear};
use disk::{Folder, noise, safetensors, tensor};

/// Overwrites, removes, inserts or repeats some bytes.
fn damage(bytes: &mut Vec<u8>, random: &[u8]) {
    for action in random.chunks_exact(4) {
        let at = usize::from(u16::from_le_bytes([action[1], action[2]])) % (bytes.len() + 1);
        let end = (at + 1 + usize::from(action[0] >> 2) % 12).min(bytes.len());
        match action[0] % 4 {
            0 if at < bytes.len() => bytes[at] = action[3],
            1 => drop(bytes.drain(at..end)),
            2 => bytes.insert(at, action[3]),
            _ => {
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
        }
    }
}

#[test]
fn random_damage_is_survived() {
    let module = "layers.0.q";
    let name = |suffix: &str| format!("{module}.{suffix}");
    // Three layouts of an 8 x 64 linear.
    let weights = [
        safetensors(&[
            tensor(&name("qweight"), "I32", &[64, 1], noise(1, 256)),
            tensor(&name("qzeros"), "I32", &[2, 1], noise(2, 8)),
            tensor(&name("scales"), "F16", &[2, 8], vec![0x11; 32]),
        ]),
        safetensors(&[
            tensor(&name("qweight"), "I16", &[2, 64], noise(1, 256)),
            tensor(&name("qzeros"), "F16", &[16, 8], vec![0x11; 256]),
            tensor(&name("scales"), "F16", &[16, 8], vec![0x11; 256]),
        ]),
        safetensors(&[
            tensor(&name("weight_packed"), "I32", &[8, 8], noise(1, 256)),
            tensor(&name("weight_scale"), "BF16", &[8, 1], vec![0x11; 16]),
            tensor(&name("weight_shape"), "I64", &[2], [8i64, 64].map(i64::to_le_bytes).concat()),
        ]),
    ];
    let configs = [
        r#"{"quantization_config":{"quant_method":"awq","bits":4,"group_size":32,"version":"gemm"}}"#,
        r#"{"quantization_config":{"quant_method":"awq","bits":4,"group_size":64,"version":"gemv_fast"}}"#,
        r#"{"quantization_config":{"quant_method":"compressed-tensors","format":"pack-quantized","ignore":["re:.*gate"],
            "config_groups":{"g":{"targets":["re:layers.*"],"weights":{"num_bits":4,"type":"int","symmetric":true,
            "strategy":"channel"}}}}}"#,
    ];
    let (mut loaded, mut refused) = (0, 0);
    for seed in 0..3000 {
        let (mut config, mut file) = (configs[seed % 3].as_bytes().to_vec(), weights[seed % 3].clone());
        let random = noise(seed as u64, 9);
        // Mostly a little damage, sometimes a lot; to one of the two files.
        let actions = 1 + usize::from(random[0]) % 3 + if random[1] < 20 { 50 } else { 0 };
        let target = if random[2] < 80 { &mut config } else { &mut file };
        damage(target, &noise(seed as u64 + 1_000_000, 4 * actions));

        let folder = Folder::new();
        folder.write("config.json", config);
        folder.write("model.safetensors", file);
        let result = Checkpoint::open(folder.path()).and_then(|checkpoint| {
            let _ = checkpoint::inspect(&checkpoint);
            let _ = awqua::model::verify(&checkpoint);
            let quantization = Quantization::of(&checkpoint)?;
            load_linear(&checkpoint, quantization.as_ref(), module, 8, 64)
        });
        match result {
            Ok(_) => loaded += 1,
            Err(error) => {
                assert!(error.file().is_some(), "no file named: {error}");
                refused += 1;
            }
        }
    }
    // Both ends of the scale are reached: damage to codes loads, damage to headers does not.
    assert!(loaded > 100 && refused > 1000, "{loaded} loaded, {refused} refused");
}

/// A file that is larger than any memory although it takes no space: the size is confirmed, and still absurd.
#[cfg(target_os = "linux")]
#[test]
#[expect(clippy::print_stderr, reason = "a skip has to be visible")]
fn a_sparse_file_larger_than_memory_is_out_of_memory() {
    let overcommit = std::fs::read_to_string("/proc/sys/vm/overcommit_memory").unwrap_or_default();
    if overcommit.trim() == "1" {
        eprintln!("skipped: this system promises memory it does not have");
        return;
    }
    let (n, k) = (1usize << 20, 1usize << 22);
    let (codes, zeros, scales) = (n * k / 2, n / 2, 2 * n);
    let header = format!(
        r#"{{"fc.qweight":{{"dtype":"I32","shape":[{k},{}],"data_offsets":[0,{codes}]}},
            "fc.qzeros":{{"dtype":"I32","shape":[1,{}],"data_offsets":[{codes},{}]}},
            "fc.scales":{{"dtype":"F16","shape":[1,{n}],"data_offsets":[{},{}]}}}}"#,
        n / 8,
        n / 8,
        codes + zeros,
        codes + zeros,
        codes + zeros + scales
    );
    let start = disk::raw_file(&header, &[]);
    let folder = Folder::new();
    folder.write("config.json", r#"{"quantization_config":{"quant_method":"awq","bits":4,"group_size":-1}}"#);
    folder.write("model.safetensors", &start);
    let file = std::fs::File::options().write(true).open(folder.path().join("model.safetensors")).unwrap();
    if let Err(error) = file.set_len((start.len() + codes + zeros + scales) as u64) {
        eprintln!("skipped: no sparse files of this size here: {error}");
        return;
    }
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let quantization = Quantization::of(&checkpoint).unwrap();
    let error = load_linear(&checkpoint, quantization.as_ref(), "fc", n, k).unwrap_err();
    assert_eq!(error.kind(), awqua::ErrorKind::OutOfMemory, "{error}");
    assert_eq!(error.tensor(), Some("fc.qweight"));
}
