//! What host code shares with the CUDA sources, against the sources; and the images, against both.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::*;

#[test]
fn devices_get_the_image_that_runs_there() {
    let name = |major, minor| Image::of(major, minor).map(|image| image.name);
    let expected = [
        ((7, 0), None),
        ((7, 5), Some("sm_75")),
        ((8, 0), Some("sm_80")),
        ((8, 6), Some("sm_86")),
        ((8, 7), Some("sm_86")),
        ((8, 9), Some("sm_89")),
        ((9, 0), Some("sm_90a")),
        ((10, 0), Some("sm_100")),
        ((10, 3), Some("sm_100")),
        ((11, 0), Some("compute_80")),
        ((12, 0), Some("sm_120")),
        ((12, 1), Some("sm_120")),
        ((13, 0), Some("compute_80")),
    ];
    for ((major, minor), expected) in expected {
        assert_eq!(name(major, minor), expected, "{major}.{minor}");
    }
}

#[test]
fn images_are_whole() {
    for image in Image::all() {
        let bytes = image.bytes();
        match image.name.starts_with("sm_") {
            true => assert_eq!(&bytes[..4], b"\x7fELF", "{}", image.name),
            false => assert_eq!(bytes.last(), Some(&0), "{}", image.name),
        }
    }
}

fn crate_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The files that images are made from, in the order of shaders/cuda/build.py: name from the crate's folder, text.
fn sources() -> Vec<(String, String)> {
    let root = crate_folder();
    let in_folder = |folder: &str, extension: &str| {
        let entries = std::fs::read_dir(root.join(folder)).expect("the source folder is readable");
        let names = entries.map(|entry| entry.expect("the source folder is readable").file_name());
        let names = names.map(|name| format!("{folder}/{}", name.to_string_lossy()));
        names.filter(|name| name.ends_with(extension)).collect::<Vec<_>>()
    };
    let mut names = [in_folder("src", ".cu"), in_folder("src/prelude", ".cuh")].concat();
    names.sort();
    names.insert(0, "cuda/kernels.cu".into());
    let read = |name: String| {
        let text = std::fs::read_to_string(root.join(&name)).expect("a source is readable");
        (name, text)
    };
    names.into_iter().map(read).collect()
}

#[test]
fn images_are_those_of_the_sources() {
    let mut digest = Sha256::new();
    for (name, text) in sources() {
        digest.update(name.as_bytes());
        digest.update([0]);
        digest.update(text.as_bytes());
        digest.update([0]);
    }
    let hex = |digest: &[u8]| digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let hashes = std::fs::read_to_string(crate_folder().join("cuda/hashes.txt")).expect("the hashes are committed");
    let hashes: HashMap<&str, &str> = hashes.lines().filter_map(|line| line.split_once(' ')).collect();
    assert_eq!(hashes["sources"], hex(&digest.finalize()), "the images are stale: shaders/cuda/build.py makes them");
    for image in Image::all() {
        let name = image.name;
        let file = if name.starts_with("sm_") { format!("{name}.cubin") } else { format!("{name}.ptx") };
        assert_eq!(hashes[file.as_str()], hex(&Sha256::digest(image.bytes())), "{file}");
    }
}

/// Compiles again where the compiler is: `AWQUA_NVRTC` and `AWQUA_NVRTC_OLD` name folders, see shaders/cuda/build.py.
#[test]
fn compiling_again_gives_the_same() {
    if std::env::var_os("AWQUA_NVRTC").is_none() {
        skip("AWQUA_NVRTC names no compiler; images are not compiled again");
        return;
    }
    let output = std::process::Command::new("python3")
        .arg(crate_folder().join("cuda/build.py"))
        .arg("--check")
        .output()
        .expect("python3 starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[expect(clippy::print_stderr, reason = "a skipped test has to be visible")]
fn skip(reason: &str) {
    eprintln!("SKIPPED: {reason}");
}

#[test]
fn numbers_are_those_of_the_sources() {
    let mut found: HashMap<String, u32> = HashMap::new();
    for (name, text) in sources() {
        for line in text.lines().filter_map(|line| line.strip_prefix("constexpr ")) {
            let definitions = line.split(';').next().expect("a line has a beginning");
            let Some((_, definitions)) = definitions.split_once(' ') else { continue };
            for definition in definitions.split(", ") {
                if let Some((constant, value)) = definition.split_once(" = ")
                    && let Ok(value) = value.trim_end_matches(".f").parse()
                {
                    let before = found.insert(constant.to_owned(), value);
                    assert!(before.is_none_or(|before| before == value), "{name}: {constant} has two values");
                }
            }
        }
    }
    for (name, value) in NUMBERS {
        assert_eq!(found.get(*name), Some(value), "{name}");
    }
    assert_eq!(found.get("WIDE").map(|wide| *wide as f32), Some(WIDE));
}

/// Fields of the structures of the sources with their byte offsets, and their sizes.
fn structures() -> HashMap<String, (usize, Vec<(String, u32)>)> {
    let mut all: HashMap<String, (usize, Vec<(String, u32)>)> = HashMap::new();
    let sources = sources();
    // Those of preludes are used by others, Product by all.
    let mut ordered: Vec<_> = sources.iter().collect();
    ordered.sort_by_key(|(name, _)| {
        let name = Path::new(name);
        let before = ["w4.cuh", "rows.cuh"].iter().position(|base| name.ends_with(base));
        (before.unwrap_or(2), name.extension() != Some("cuh".as_ref()))
    });
    for (_, text) in ordered {
        let mut lines = text.lines();
        while let Some(line) = lines.next() {
            let name = line.strip_prefix("struct ").and_then(|line| line.strip_suffix(" {"));
            let Some(name) = name.filter(|name| ARGUMENTS.iter().any(|(other, ..)| other == name)) else { continue };
            let (mut at, mut fields) = (0usize, Vec::new());
            for line in lines.by_ref().take_while(|line| *line != "};") {
                let Some((declaration, _)) = line.split_once(';') else { continue };
                let (kind, names) = declaration.trim().rsplit_once(", ").map_or_else(
                    || declaration.trim().rsplit_once(' ').expect("a type and a name"),
                    |_| {
                        let first = declaration.trim().split_once(", ").expect("several names").0;
                        let kind = first.rsplit_once(' ').expect("a type and a name").0;
                        (kind, declaration.trim()[kind.len()..].trim())
                    },
                );
                let size = match kind {
                    kind if kind.ends_with('*') => 8,
                    "u64" => 8,
                    "u32" | "float" => 4,
                    kind => match all.get(kind) {
                        Some((size, _)) => *size,
                        // Not a structure of arguments.
                        None => continue,
                    },
                };
                for name in names.split(", ") {
                    let (name, count) = match name.split_once('[') {
                        Some((name, count)) => (name, count.trim_end_matches(']').parse().unwrap_or(0)),
                        None => (name, 1),
                    };
                    at = at.next_multiple_of(size.min(8));
                    fields.push((name.to_owned(), at as u32));
                    at += size * count;
                }
            }
            all.insert(name.to_owned(), (at.next_multiple_of(8), fields));
        }
    }
    all
}

#[test]
fn arguments_lie_where_kernels_read_them() {
    let structures = structures();
    for (name, size, fields) in ARGUMENTS {
        let (expected_size, expected) = structures.get(*name).unwrap_or_else(|| panic!("the sources have no {name}"));
        let fields: Vec<_> = fields.iter().map(|field| (field.name.trim_start_matches("r#"), field.offset)).collect();
        let expected: Vec<_> = expected.iter().map(|(name, offset)| (name.as_str(), *offset)).collect();
        // Padding at the end has no name in the sources.
        let fields = if fields.len() == expected.len() + 1 && fields.ends_with(&[("pad", fields[fields.len() - 1].1)]) {
            &fields[..expected.len()]
        } else {
            &fields
        };
        assert_eq!(fields, expected, "{name}");
        assert_eq!(size.next_multiple_of(8), *expected_size, "{name}");
    }
}
