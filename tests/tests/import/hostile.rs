//! Files made to hurt: each is refused with an error that says where and why.

use std::path::Path;

use awqua::checkpoint::gguf::Gguf;
use awqua::tensor::Bytes;
use awqua::{Error, ErrorKind};
use awqua_quantizer::import::{ImportOptions, ImportSource, import};
use zip::CompressionMethod;

use crate::Scratch;
use crate::writer::{GgufFile, array, float, text, texts, tiny_llama, uint, zip_of};

fn parse(bytes: Vec<u8>) -> Result<Gguf, Error> {
    Gguf::parse(Bytes::owned(bytes), Path::new("hostile.gguf"))
}

/// A change, the kind of error it must give, and a piece of the message.
struct Case {
    name: &'static str,
    kind: ErrorKind,
    message: &'static str,
    change: fn(&mut GgufFile),
}

const fn case(name: &'static str, kind: ErrorKind, message: &'static str, change: fn(&mut GgufFile)) -> Case {
    Case { name, kind, message, change }
}

fn check(cases: &[Case], run: impl Fn(&GgufFile) -> Result<(), Error>) {
    for Case { name, kind, message, change } in cases {
        let mut file = tiny_llama();
        change(&mut file);
        let Err(error) = run(&file) else { panic!("{name}: accepted") };
        assert_eq!(error.kind(), *kind, "{name}: {error}");
        assert!(error.message().contains(message), "{name}: {error}");
        assert!(error.file().is_some(), "{name}: no file in {error}");
    }
}

#[test]
fn broken_headers_are_refused() {
    use ErrorKind::{InvalidFile, InvalidTensor, Unsupported};
    check(
        &[
            case("version 1", Unsupported, "version 1", |f| f.version = 1),
            case("version 9", Unsupported, "version 9", |f| f.version = 9),
            case("big-endian", Unsupported, "big-endian", |f| f.version = 3u32.swap_bytes()),
            case("value type", InvalidFile, "unknown metadata value type", |f| f.set("x", vec![99, 0, 0, 0])),
            case("boolean", InvalidFile, "boolean value 7", |f| f.set("x", vec![7, 0, 0, 0, 7])),
            case("huge string", InvalidFile, "string of", |f| {
                f.set("x", [&8u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat());
            }),
            case("long string", InvalidFile, "truncated", |f| {
                f.set("x", [&8u32.to_le_bytes()[..], &9_999_999u64.to_le_bytes()].concat());
            }),
            case("not UTF-8", InvalidFile, "UTF-8", |f| {
                f.set("x", [&8u32.to_le_bytes()[..], &2u64.to_le_bytes(), &[0xff, 0xfe]].concat());
            }),
            case("huge array", InvalidFile, "truncated: array", |f| f.set("x", array(8, u64::MAX, &[]))),
            case("overflowing array", InvalidFile, "truncated: array", |f| f.set("x", array(4, 1 << 62, &[]))),
            case("long array", InvalidFile, "array elements", |f| {
                f.set("x", array(0, (1 << 24) + 1, &vec![0; (1 << 24) + 1]));
            }),
            case("nested array", Unsupported, "arrays of arrays", |f| {
                f.set("x", array(9, 1, &array(4, 1, &[1, 0, 0, 0])[4..]));
            }),
            case("array type", InvalidFile, "unknown array element type", |f| f.set("x", array(77, 0, &[]))),
            case("duplicate key", InvalidFile, "twice", |f| f.entries.push(f.entries[0].clone())),
            case("alignment 0", InvalidFile, "general.alignment", |f| f.set("general.alignment", uint(0))),
            case("alignment 24", InvalidFile, "general.alignment", |f| f.set("general.alignment", uint(24))),
            case("alignment 2^31", InvalidFile, "general.alignment", |f| f.set("general.alignment", uint(1 << 31))),
            case("alignment text", InvalidFile, "general.alignment", |f| f.set("general.alignment", text("32"))),
            case("unknown type", Unsupported, "unknown tensor type 4711", |f| f.tensors[3].ggml_type = 4711),
            case("other type", Unsupported, "IQ2_XS", |f| f.tensors[3].ggml_type = 17),
            case("no dimensions", InvalidTensor, "0 dimensions", |f| f.tensors[3].dims.clear()),
            case("many dimensions", InvalidTensor, "5 dimensions", |f| f.tensors[3].dims = vec![1; 5]),
            case("empty dimension", InvalidTensor, "impossible shape", |f| f.tensors[3].dims = vec![32, 0]),
            case("overflowing shape", InvalidTensor, "impossible shape", |f| f.tensors[3].dims = vec![1 << 33; 4]),
            case("outer overflow", InvalidTensor, "impossible shape", |f| {
                f.tensors[3].dims = vec![1, 1 << 63, 2];
            }),
            case("partial block", InvalidTensor, "whole Q4_0 blocks", |f| {
                (f.tensors[3].dims, f.tensors[3].ggml_type) = (vec![33, 2], 2);
            }),
            case("too large", InvalidTensor, "leave the file", |f| f.tensors[3].dims = vec![1 << 20, 1 << 20]),
            case("unaligned", InvalidTensor, "multiple of the alignment", |f| f.tensors[3].offset = Some(33)),
            case("far away", InvalidTensor, "leave the file", |f| f.tensors[3].offset = Some(1 << 40)),
            case("offset overflow", InvalidTensor, "leave the file", |f| f.tensors[3].offset = Some(u64::MAX - 31)),
            case("overlap", InvalidTensor, "overlaps", |f| f.tensors[3].offset = Some(32)),
            case("same name", InvalidTensor, "twice", |f| f.tensors[3].name = f.tensors[2].name.clone()),
        ],
        |file| parse(file.bytes()).map(drop),
    );
}

#[test]
fn tensor_errors_name_the_tensor() {
    let mut file = tiny_llama();
    file.tensors[3].ggml_type = 10;
    let name = file.tensors[3].name.clone();
    let error = parse(file.bytes()).unwrap_err();
    assert_eq!(error.tensor(), Some(name.as_str()));
    assert_eq!(error.to_string(), format!("hostile.gguf: tensor `{name}`: tensor type Q2_K is not supported"));
}

#[test]
fn counts_beyond_the_file_are_refused() {
    for at in [8, 16] {
        for count in [u64::MAX, 1 << 40, 1 << 20] {
            let mut bytes = tiny_llama().bytes();
            bytes[at..at + 8].copy_from_slice(&count.to_le_bytes());
            let error = parse(bytes).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidFile, "{error}");
            assert!(error.message().contains("header promises"), "{error}");
        }
    }
}

#[test]
fn every_truncation_is_refused() {
    let bytes = tiny_llama().bytes();
    for len in (0..bytes.len()).step_by(7).chain([bytes.len() - 1]) {
        assert!(parse(bytes[..len].to_vec()).is_err(), "{len} of {} bytes", bytes.len());
    }
    parse(bytes).unwrap();
}

#[test]
fn changed_bytes_never_panic() {
    let original = tiny_llama().bytes();
    let header = original.windows(8).rposition(|w| w == b"ffn_down").unwrap() + 64;
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize
    };
    for _ in 0..5_000 {
        let mut bytes = original.clone();
        for _ in 0..1 + random() % 3 {
            let value = [0, 1, 0x7f, 0x80, 0xff, random() as u8][random() % 6];
            // Half of the changes in the numbers at the start and near the tensor entries, where they count most.
            let at = if random() % 2 == 0 { random() % header } else { header - 1 - random() % 1400 };
            bytes[at] = value;
        }
        if let Ok(gguf) = parse(bytes) {
            for tensor in gguf.tensors() {
                let mut row = vec![0.0; tensor.row_len()];
                tensor.dequantize_row(tensor.rows() - 1, &mut row).unwrap();
            }
        }
    }
}

#[test]
fn contradictions_are_refused() {
    use ErrorKind::{InvalidConfig, InvalidTensor, Unsupported};
    check(
        &[
            case("architecture", Unsupported, "`mamba`", |f| f.set("general.architecture", text("mamba"))),
            case("no architecture", InvalidConfig, "missing", |f| f.remove("general.architecture")),
            case("experts", Unsupported, "experts", |f| f.set("llama.expert_count", uint(8))),
            case("key type", InvalidConfig, "a string", |f| f.set("llama.block_count", text("2"))),
            case("zero heads", InvalidConfig, "is 0", |f| f.set("llama.attention.head_count", uint(0))),
            case("odd groups", InvalidConfig, "heads", |f| f.set("llama.attention.head_count_kv", uint(3))),
            case("many blocks", InvalidConfig, "blocks", |f| f.set("llama.block_count", uint(2_000_000_000))),
            case("missing block", InvalidTensor, "missing", |f| f.set("llama.block_count", uint(3))),
            case("extra block", Unsupported, "no place", |f| f.set("llama.block_count", uint(1))),
            case("other width", InvalidTensor, "expected shape", |f| f.set("llama.feed_forward_length", uint(63))),
            case("absurd width", InvalidTensor, "expected shape", |f| {
                f.set("llama.embedding_length", uint(1 << 31));
            }),
            case("partial rope", Unsupported, "partial rope", |f| f.set("llama.rope.dimension_count", uint(4))),
            case("bad eps", InvalidConfig, "NaN", |f| {
                f.set("llama.attention.layer_norm_rms_epsilon", float(f32::NAN));
            }),
            case("extra tensor", Unsupported, "no place", |f| f.add("blk.0.magic.weight", &[4], |_, _| 0.0)),
            case("some biases", Unsupported, "biases", |f| f.add("blk.0.attn_q.bias", &[32], |_, _| 0.0)),
            case("infinite weight", InvalidTensor, "row 1 holds inf", |f| {
                f.tensor("blk.1.ffn_up.weight").data[128..132].copy_from_slice(&f32::INFINITY.to_le_bytes());
            }),
            case("beyond half", InvalidTensor, "row 1 holds 70000", |f| {
                f.tensor("blk.1.ffn_up.weight").data[128..132].copy_from_slice(&70_000f32.to_le_bytes());
            }),
            case("tokenizer", Unsupported, "`t5`", |f| f.set("tokenizer.ggml.model", text("t5"))),
            case("pre-tokenizer", Unsupported, "`viking`", |f| f.set("tokenizer.ggml.pre", text("viking"))),
            case("no tokens", InvalidConfig, "missing", |f| f.remove("tokenizer.ggml.tokens")),
            case("many tokens", InvalidConfig, "rows", |f| f.set("tokenizer.ggml.tokens", texts(&["a"; 263]))),
            case("same tokens", InvalidConfig, "both", |f| f.set("tokenizer.ggml.tokens", texts(&["a"; 262]))),
            case("few types", InvalidConfig, "types for", |f| f.set("tokenizer.ggml.token_type", array(5, 0, &[]))),
            case("bad merge", InvalidConfig, "not a pair", |f| f.set("tokenizer.ggml.merges", texts(&["th"]))),
            case("strange merge", InvalidConfig, "not a token", |f| {
                f.set("tokenizer.ggml.merges", texts(&["q x"]));
            }),
            case("far eos", InvalidConfig, "eos_token_id", |f| f.set("tokenizer.ggml.eos_token_id", uint(262))),
        ],
        |file| Scratch::new().import_gguf(file).map(drop),
    );
}

fn import_zip(archive: &[u8]) -> Result<(), Error> {
    let scratch = Scratch::new();
    let file = scratch.file("model.zip", archive);
    scratch.import(&[file], &ImportOptions::default()).map(drop)
}

#[test]
fn hostile_archives_are_refused() {
    let gguf = tiny_llama().bytes();
    let zeros = [b"GGUF".to_vec(), vec![0; 8 << 20]].concat();
    let deflated = |members: &[(&str, &[u8])]| zip_of(members, CompressionMethod::Deflated);
    let stored = |members: &[(&str, &[u8])]| zip_of(members, CompressionMethod::Stored);
    let cut = deflated(&[("m.gguf", &gguf)]);
    let mut corrupt = deflated(&[("m.gguf", &gguf)]);
    let mut corrupt_stored = stored(&[("m.gguf", &gguf)]);
    for bytes in [&mut corrupt, &mut corrupt_stored] {
        for byte in &mut bytes[500..520] {
            *byte ^= 0x5a;
        }
    }
    // The size in the central directory, 24 bytes after its signature.
    let mut lying = deflated(&[("m.gguf", &gguf)]);
    let directory = lying.windows(4).rposition(|w| w == b"PK\x01\x02").unwrap();
    lying[directory + 24..directory + 28].copy_from_slice(&1000u32.to_le_bytes());
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("bomb", deflated(&[("m.gguf", &zeros)]), "claims to grow"),
        ("empty", deflated(&[("readme.txt", b"hello")]), "no GGUF"),
        ("truncated", cut[..cut.len() / 2].to_vec(), "zip archive"),
        ("corrupt", corrupt, "m.gguf"),
        ("corrupt stored", corrupt_stored, "m.gguf"),
        ("lying size", lying, "m.gguf"),
        ("leaves the archive", stored(&[("../../m.gguf", &gguf)]), "leaves the archive"),
        ("absolute", stored(&[("/../m.gguf", &gguf)]), "leaves the archive"),
        ("not GGUF", stored(&[("m.gguf", b"hello")]), "does not begin with"),
        ("gap", stored(&[("part1.bin", &gguf[..900]), ("part3.bin", &gguf[900..])]), "missing"),
        ("late start", stored(&[("part2.bin", &gguf[..900]), ("part3.bin", &gguf[900..])]), "missing"),
        ("twice", stored(&[("a/part1.bin", &gguf), ("b/part1.bin", &gguf)]), "twice"),
    ];
    for (name, archive, message) in cases {
        let Err(error) = import_zip(&archive) else { panic!("{name}: accepted") };
        assert_eq!(error.kind(), ErrorKind::InvalidFile, "{name}: {error}");
        assert!(error.message().contains(message), "{name}: {error}");
        assert!(error.file().is_some(), "{name}: {error}");
    }
    let two = stored(&[("a.gguf", &gguf), ("b.gguf", &gguf)]);
    assert_eq!(import_zip(&two).unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
fn bad_calls_are_refused() {
    let scratch = Scratch::new();
    let gguf = tiny_llama().bytes();
    let file = scratch.file("m.gguf", &gguf);
    let archive = scratch.file("m.zip", &zip_of(&[("m.gguf", &gguf)], CompressionMethod::Stored));
    let empty = scratch.file("empty.gguf", b"");
    let run = |files: &[&Path], sha256: Option<&str>| {
        let options = ImportOptions { sha256: sha256.map(str::to_owned), ..ImportOptions::default() };
        import(&ImportSource::new(files.iter().copied()), &scratch.out(), &options, &mut |_| {}).unwrap_err().kind()
    };
    assert_eq!(run(&[], None), ErrorKind::InvalidInput);
    assert_eq!(run(&[&file, &archive], None), ErrorKind::InvalidInput);
    assert_eq!(run(&[&empty], None), ErrorKind::InvalidFile);
    assert_eq!(run(&[&file], Some("abc")), ErrorKind::InvalidInput);
    assert_eq!(run(&[Path::new("/nonexistent/m.gguf")], None), ErrorKind::Io);
    assert_eq!(run(&[scratch.0.as_path()], None), ErrorKind::Io);

    std::fs::create_dir(scratch.out()).unwrap();
    std::fs::write(scratch.out().join("mine.txt"), "keep").unwrap();
    assert_eq!(run(&[&file], None), ErrorKind::InvalidInput);
    assert_eq!(std::fs::read_to_string(scratch.out().join("mine.txt")).unwrap(), "keep");
}
