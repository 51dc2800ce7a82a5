//! `verify` against checkpoints of other people's software in which one field was changed so that it means something
//! else: every dialect, every tensor of a packed module, every field of the configuration that decides how to read it.

mod disk;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use awqua::checkpoint::Checkpoint;
use awqua::model::{Severity, verify};
use awqua::quant::{Quantization, load_linear};
use disk::{Folder, Tensor, noise, safetensors, tensor};
use half::{bf16, f16};
use serde_json::{Value, json};

/// The module that is corrupted.
const MODULE: &str = "model.layers.0.self_attn.q_proj";

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/formats")
}

/// A checkpoint in memory.
#[derive(Clone)]
struct Packed {
    config: Value,
    tensors: Vec<Tensor>,
    /// Other files of the folder.
    others: Vec<(String, Vec<u8>)>,
}

impl Packed {
    fn read(name: &str) -> Self {
        let mut packed = Self { config: Value::Null, tensors: Vec::new(), others: Vec::new() };
        for entry in std::fs::read_dir(fixtures().join(name)).unwrap() {
            let path = entry.unwrap().path();
            let file = path.file_name().unwrap().to_string_lossy().into_owned();
            match file.as_str() {
                "config.json" => packed.config = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap(),
                "model.safetensors" => packed.tensors = tensors(&std::fs::read(path).unwrap()),
                "reference" => {}
                _ => packed.others.push((file, std::fs::read(path).unwrap())),
            }
        }
        packed
    }

    /// The section that says how weights are packed.
    fn section(&mut self) -> &mut Value {
        let key = if self.config.get("quantization").is_some() { "quantization" } else { "quantization_config" };
        &mut self.config[key]
    }

    fn tensor(&mut self, suffix: &str) -> &mut Tensor {
        let name = format!("{MODULE}.{suffix}");
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    /// Suffixes of the module's tensors.
    fn parts(&self) -> Vec<String> {
        let of_module = self.tensors.iter().filter_map(|tensor| tensor.name.strip_prefix(MODULE));
        of_module.filter_map(|rest| rest.strip_prefix('.')).map(str::to_owned).collect()
    }

    /// What is wrong with it, if anything is.
    fn fault(&self) -> Option<String> {
        let folder = Folder::new();
        for (name, content) in &self.others {
            folder.write(name, content);
        }
        folder.write("config.json", self.config.to_string());
        folder.write("model.safetensors", safetensors(&self.tensors));
        fault(folder.path())
    }
}

/// The first thing that keeps a checkpoint from being used.
fn fault(path: &Path) -> Option<String> {
    let findings = match Checkpoint::open(path).and_then(|checkpoint| verify(&checkpoint)) {
        Err(error) => return Some(error.to_string()),
        Ok(findings) => findings,
    };
    findings.into_iter().find(|finding| finding.severity == Severity::Error).map(|finding| finding.message)
}

fn tensors(file: &[u8]) -> Vec<Tensor> {
    const DTYPES: &[&str] = &["I64", "I32", "U32", "I16", "I8", "U8", "F32", "F16", "BF16"];
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
    let entries = header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__");
    let entry = |(name, entry): (&String, &Value)| {
        let number = |value: &Value| value.as_u64().unwrap() as usize;
        let offsets = &entry["data_offsets"];
        let dtype = entry["dtype"].as_str().unwrap();
        let shape: Vec<usize> = entry["shape"].as_array().unwrap().iter().map(number).collect();
        let data = file[8 + length + number(&offsets[0])..8 + length + number(&offsets[1])].to_vec();
        tensor(name, DTYPES.iter().find(|known| **known == dtype).unwrap(), &shape, data)
    };
    entries.map(entry).collect()
}

/// A change, and what it is called.
type Corruption = (String, Box<dyn Fn(&mut Packed)>);

fn corruption(name: impl Into<String>, change: impl Fn(&mut Packed) + 'static) -> Corruption {
    (name.into(), Box::new(change))
}

/// Whether a packed module loads the same without it.
fn is_optional(packed: &Packed, part: &str) -> bool {
    let section = &packed.config["quantization_config"];
    match part {
        "g_idx" => section["desc_act"] == false,
        "qzeros" => section["sym"] == true,
        // The shape that the architecture asks for is what counts; the tables are those of the format's definition.
        "weight_shape" | "weight.quant_map" => true,
        _ => false,
    }
}

/// Changes of single tensors.
fn tensor_corruptions(packed: &Packed) -> Vec<Corruption> {
    let mut all = Vec::new();
    for part in packed.parts() {
        let name = format!("{MODULE}.{part}");
        let found = packed.tensors.iter().find(|tensor| tensor.name == name).unwrap();
        // Bytes are bytes whatever they are called, and a state is a text.
        let is_bytes = matches!(found.dtype, "U8" | "I8");
        if !is_optional(packed, &part) {
            let name = name.clone();
            all.push(corruption(format!("{part} missing"), move |p| p.tensors.retain(|tensor| tensor.name != name)));
        }
        if !is_bytes {
            let part = part.clone();
            all.push(corruption(format!("{part} of another type"), move |p| {
                let tensor = p.tensor(&part);
                tensor.dtype = match tensor.dtype {
                    "I32" => "F32",
                    "U32" => "F32",
                    "F32" => "I32",
                    "I16" => "F16",
                    "F16" => "BF16",
                    "BF16" => "F16",
                    "I64" => "U8",
                    other => panic!("{other}"),
                };
                if tensor.dtype == "U8" {
                    tensor.shape.push(8);
                }
            }));
        }
        if let [rows, columns] = found.shape[..] {
            if rows > 1 {
                let part = part.clone();
                all.push(corruption(format!("{part} a row short"), move |p| {
                    let tensor = p.tensor(&part);
                    tensor.data.truncate(tensor.data.len() / rows * (rows - 1));
                    tensor.shape[0] -= 1;
                }));
            }
            // The bytes of bitsandbytes have no shape of their own.
            if rows != columns && !part.starts_with("weight.") && !(is_bytes && columns == 1) {
                let part = part.clone();
                all.push(corruption(format!("{part} transposed"), move |p| p.tensor(&part).shape.reverse()));
            }
        } else {
            let part = part.clone();
            all.push(corruption(format!("{part} an element short"), move |p| {
                let tensor = p.tensor(&part);
                let size = tensor.data.len() / tensor.shape[0];
                tensor.data.truncate(tensor.data.len() - size);
                tensor.shape[0] -= 1;
            }));
        }
        let is_scale = matches!(
            part.as_str(),
            "scales" | "weight_scale" | "weight.absmax" | "weight.nested_absmax" | "pre_quant_scale" | "biases"
        ) || part == "qzeros" && found.dtype == "F16";
        if is_scale && !is_bytes {
            let may_be_negative = part == "biases" || part == "qzeros" || packed.config.get("quantization").is_some();
            for (what, value) in [("NaN", f32::NAN), ("infinite", f32::INFINITY), ("negative", -1.0)] {
                if value < 0.0 && may_be_negative {
                    continue;
                }
                let part = part.clone();
                all.push(corruption(format!("{part} {what}"), move |p| {
                    let tensor = p.tensor(&part);
                    let bytes = match tensor.dtype {
                        "F16" => f16::from_f32(value).to_le_bytes().to_vec(),
                        "BF16" => bf16::from_f32(value).to_le_bytes().to_vec(),
                        _ => value.to_le_bytes().to_vec(),
                    };
                    tensor.data[..bytes.len()].copy_from_slice(&bytes);
                }));
            }
        }
        if part.ends_with("g_idx") {
            for (what, value) in [("past the last group", 1000i32), ("negative", -1)] {
                let part = part.clone();
                all.push(corruption(format!("{part} {what}"), move |p| {
                    p.tensor(&part).data[..4].copy_from_slice(&value.to_le_bytes());
                }));
            }
            // With one group a row there is no other.
            let first = found.data[..4].to_vec();
            if found.data.chunks(4).all(|group| group == first) {
                continue;
            }
            let part = part.clone();
            all.push(corruption(format!("{part} with a group of too many"), move |p| {
                let tensor = p.tensor(&part);
                let (first, last) = (tensor.data[..4].to_vec(), tensor.data.len() - 4);
                let other = tensor.data.chunks(4).position(|group| group != first).unwrap();
                assert!(4 * other <= last);
                tensor.data[4 * other..4 * other + 4].copy_from_slice(&first);
            }));
        }
        if part == "weight_shape" {
            all.push(corruption("weight_shape of another matrix", |p| {
                p.tensor("weight_shape").data[..8].copy_from_slice(&7i64.to_le_bytes());
            }));
        }
        if part == "weight.quant_map" {
            all.push(corruption("another code book", |p| {
                p.tensor("weight.quant_map").data[..4].copy_from_slice(&(-0.5f32).to_le_bytes());
            }));
        }
        if part.contains("quant_state") {
            let state: Value = serde_json::from_slice(&found.data).unwrap();
            for (key, value) in [
                ("quant_type", json!("int4")),
                ("blocksize", json!(128)),
                ("blocksize", json!(0)),
                ("shape", json!([3, 5])),
                ("dtype", json!("complex64")),
                ("nested_blocksize", json!(7)),
                ("nested_offset", json!("NaN")),
            ] {
                if state.get(key).is_none_or(|found| *found == value) {
                    continue;
                }
                let mut state = state.clone();
                state[key] = value.clone();
                let part = part.clone();
                all.push(corruption(format!("state with {key} {value}"), move |p| {
                    let tensor = p.tensor(&part);
                    tensor.data = state.to_string().into_bytes();
                    tensor.shape = vec![tensor.data.len()];
                }));
            }
        }
    }
    all
}

/// Changes of single fields of the configuration, by where they are.
fn config_corruptions(packed: &Packed) -> Vec<Corruption> {
    let mut all = Vec::new();
    let mut set = |pointer: &'static str, values: &[Value]| {
        let section = packed.config.get("quantization").unwrap_or(&packed.config["quantization_config"]);
        let Some(found) = section.pointer(pointer) else { return };
        for value in values.iter().filter(|value| *value != found) {
            let value = value.clone();
            all.push(corruption(format!("{pointer} {value}"), move |p| {
                *p.section().pointer_mut(pointer).unwrap() = value.clone();
            }));
        }
    };
    let bits = [json!(2), json!(3), json!(4), json!(8), json!(7), json!(0), json!("four"), Value::Null];
    let group_sizes = [json!(16), json!(48), json!(128), json!(-5), json!(1u64 << 40), json!("64")];
    set("/bits", &bits);
    set("/group_size", &group_sizes);
    set("/quant_method", &[json!("awq"), json!("gptq"), json!("bitsandbytes"), json!("hqq"), json!(4)]);
    if packed.config["quantization_config"]["quant_method"] == "awq" {
        set("/version", &[json!("gemm"), json!("gemv"), json!("gemv_fast"), json!("marlin"), json!(1)]);
    }
    set("/checkpoint_format", &[json!("gptq"), json!("gptq_v2"), json!("marlin")]);
    set("/sym", &[json!(true), json!("yes")]);
    set("/pack_dtype", &[json!("int16")]);
    set("/quant_algo", &[json!("FP8"), json!("NVFP4")]);
    set("/format", &[json!("int-quantized"), json!("nvfp4-pack-quantized")]);
    set("/config_groups/group_0/weights/num_bits", &bits);
    set("/config_groups/group_0/weights/symmetric", &[json!(true), json!(false)]);
    set("/config_groups/group_0/weights/type", &[json!("float")]);
    set("/config_groups/group_0/weights/strategy", &[json!("block"), json!("token")]);
    set("/config_groups/group_0/input_activations", &[json!({"num_bits": 8, "type": "int"})]);
    if packed.config.pointer("/quantization_config/config_groups/group_0/weights/group_size") != Some(&Value::Null) {
        set("/config_groups/group_0/weights/group_size", &group_sizes);
    }
    set("/load_in_4bit", &[json!(false)]);
    all
}

/// Whether a changed field reads the same, by fixture.
fn means_the_same(fixture: &str, change: &str) -> bool {
    // llm.int8 and 4 bits are told apart by what is stored.
    let stored_decides = fixture.starts_with("bnb") && change.starts_with("/load_in_4bit");
    // Only separate files of ModelOpt say it, beside this one.
    let one_group = fixture == "gptq-8bit-sym-row" && change == "/group_size 1099511627776";
    stored_decides || one_group || fixture.starts_with("mlx") && change.starts_with("/quant_method")
}

#[test]
fn every_change_of_meaning_is_found() {
    let mut kinds = BTreeSet::new();
    let (mut changes, mut accepted) = (0, Vec::new());
    let mut names: Vec<String> =
        std::fs::read_dir(fixtures()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    for name in names.iter().filter(|name| !name.starts_with("gguf") && *name != "fp16") {
        let packed = Packed::read(name);
        if packed.tensors.is_empty() {
            continue;
        }
        assert_eq!(packed.fault(), None, "{name} as it is");
        kinds.insert(name.split('-').next().unwrap().to_owned());
        for (change, apply) in tensor_corruptions(&packed).into_iter().chain(config_corruptions(&packed)) {
            if means_the_same(name, &change) {
                continue;
            }
            let mut changed = packed.clone();
            apply(&mut changed);
            changes += 1;
            if changed.fault().is_none() {
                accepted.push(format!("{name}: {change}"));
            }
        }
    }
    assert!(accepted.is_empty(), "{} of {changes} were not found:\n{}", accepted.len(), accepted.join("\n"));
    assert!(changes > 300, "only {changes} changes");
    assert_eq!(kinds.len(), 6, "{kinds:?}");
}

#[test]
fn random_damage_to_every_dialect_is_survived() {
    for entry in std::fs::read_dir(fixtures()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let mut packed = Packed::read(&name);
        packed.tensors.retain(|tensor| tensor.name.starts_with(MODULE));
        if packed.tensors.is_empty() {
            continue;
        }
        // Without the architecture only the packed module is looked at.
        packed.config = json!({
            "quantization_config": packed.config.get("quantization_config").cloned(),
            "quantization": packed.config.get("quantization").cloned(),
        });
        let (config, file) = (packed.config.to_string().into_bytes(), safetensors(&packed.tensors));
        let (header, k) = (8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize, 128);
        for seed in 0..60 {
            let random = noise(seed, 16);
            let (mut config, mut file) = (config.clone(), file.clone());
            // A few bytes of the configuration, of the header, or of what is stored.
            let (target, end) = match seed % 3 {
                0 => (&mut config, usize::MAX),
                1 => (&mut file, header),
                _ => (&mut file, usize::MAX),
            };
            for bytes in random.chunks_exact(4) {
                let at = usize::from(u16::from_le_bytes([bytes[0], bytes[1]])) % target.len().min(end);
                target[at] = if bytes[2] < 128 { bytes[3] } else { target[at] ^ 1 << (bytes[3] % 8) };
            }
            let folder = Folder::new();
            folder.write("config.json", config);
            folder.write("model.safetensors", file);
            let Ok(checkpoint) = Checkpoint::open(folder.path()) else { continue };
            let _ = verify(&checkpoint);
            if let Ok(quantization) = Quantization::of(&checkpoint) {
                for n in [k, 2 * k] {
                    let _ = load_linear(&checkpoint, quantization.as_ref(), MODULE, n, n);
                }
            }
        }
    }
}

#[test]
fn damage_to_files_of_torch_is_survived() {
    let source = fixtures().join("llm-awq-g64");
    let name = "tiny-w4-g64-awq-v2.pt";
    let (config, file) =
        (std::fs::read(source.join("config.json")).unwrap(), std::fs::read(source.join(name)).unwrap());
    let folder = Folder::new();
    folder.write("config.json", config);
    let path = folder.path().join(name);
    let open = |bytes: &[u8]| {
        let _ = std::fs::remove_file(&path);
        std::fs::write(&path, bytes).unwrap();
        Checkpoint::open(&path)
    };
    assert_eq!(open(&file).unwrap().tensors().len(), 49);
    // Named by its folder under the name that Transformers gave it.
    folder.write("pytorch_model.bin", &file);
    assert_eq!(Checkpoint::open(folder.path()).unwrap().tensors().len(), 49);
    for length in [0, 3, 100, 5000, file.len() / 2, file.len() - 1000, file.len() - 30, file.len() - 1] {
        let error = open(&file[..length]).unwrap_err();
        assert_eq!(error.file(), Some(&*path), "{length} bytes: {error}");
    }
    // The pickle is the first member, the directory the last part of the file.
    let (pickle, directory) = (6000, file.len() - 7000);
    let (mut opened, mut refused) = (0, 0);
    for seed in 0..400 {
        let random = noise(seed, 16);
        let mut file = file.clone();
        for bytes in random.chunks_exact(4) {
            let at = usize::from(u16::from_le_bytes([bytes[0], bytes[1]]));
            let at = if seed % 2 == 0 { at % pickle } else { directory + at % 7000 };
            file[at] = if bytes[2] < 128 { bytes[3] } else { file[at] ^ 1 << (bytes[3] % 8) };
        }
        match open(&file) {
            Ok(checkpoint) => {
                opened += 1;
                for tensor in checkpoint.tensors() {
                    assert_eq!(tensor.bytes().unwrap().len(), tensor.byte_len());
                }
            }
            Err(error) => {
                refused += 1;
                assert_eq!(error.file(), Some(&*path), "{error}");
            }
        }
    }
    assert!(opened > 20 && refused > 100, "{opened} opened, {refused} refused");
}

/// Position behind the name in the list of tensors.
fn gguf_entry(file: &[u8], tensor: &str) -> usize {
    let mut named = (tensor.len() as u64).to_le_bytes().to_vec();
    named.extend(tensor.as_bytes());
    file.windows(named.len()).position(|window| window == named).unwrap() + named.len()
}

/// A change of a file, and what it is called.
type FileChange<'a> = (&'a str, &'a dyn Fn(&mut Vec<u8>));

#[test]
fn every_change_of_meaning_in_gguf_files_is_found() {
    for name in ["gguf-q4_0", "gguf-q4_1-q8_0", "gguf-q4_k-q6_k", "gguf-q5", "gguf-q5_k"] {
        let file = std::fs::read(fixtures().join(name).join("model.gguf")).unwrap();
        let at = gguf_entry(&file, "blk.0.attn_q.weight");
        let alignment = 32;
        // After the name: number of dimensions, two dimensions, type, offset; the data starts at the next multiple of
        // 32 after the last entry.
        let last = (0..file.len()).rev().find(|&i| file[..i].ends_with(b".weight")).unwrap();
        let dims = u32::from_le_bytes(file[last..last + 4].try_into().unwrap()) as usize;
        let data = (last + 4 + 8 * dims + 4 + 8_usize).next_multiple_of(alignment);
        let offset = u64::from_le_bytes(file[at + 24..at + 32].try_into().unwrap()) as usize;
        let word = |file: &mut Vec<u8>, at: usize, value: u32| file[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let changes: &[FileChange<'_>] = &[
            ("one dimension", &|file| word(file, at, 1)),
            ("nine dimensions", &|file| word(file, at, 9)),
            ("other inputs", &|file| word(file, at + 4, 96)),
            ("other outputs", &|file| word(file, at + 12, 77)),
            ("outputs past the end", &|file| word(file, at + 16, 77)),
            ("a type of another size", &|file| word(file, at + 20, 24)),
            ("an unknown type", &|file| word(file, at + 20, 999)),
            ("an offset out of the file", &|file| word(file, at + 28, 1)),
            ("an offset that is not aligned", &|file| word(file, at + 24, offset as u32 + 4)),
            ("a scale that is not a number", &|file| {
                // Wherever a type keeps its scale, all bytes of a block set make it one.
                file[data + offset..data + offset + 210].fill(0xff);
            }),
        ];
        let folder = Folder::new();
        folder.write("model.gguf", &file);
        let path = folder.path().join("model.gguf");
        assert_eq!(fault(&path), None, "{name} as it is");
        for (change, apply) in changes {
            let mut changed = file.clone();
            apply(&mut changed);
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, changed).unwrap();
            assert!(fault(&path).is_some(), "{name}: {change}");
        }
    }
}
