//! What is generated from `ffi/`: the table of functions, the C header, and the layouts as C assertions.

use std::collections::BTreeSet;
use std::fmt::Write;

use awqua_tests::generated::{check, root};

/// Rust files of `ffi/src` in the order of their subjects, which is the order of new functions in the table.
const SUBJECTS: [&str; 8] = ["api", "alloc", "log", "engine", "model", "session", "answer", "batch"];
/// Rust files whose types are in the header, in the order of their subjects.
const TYPES: [&str; 11] =
    ["text", "alloc", "log", "jobs", "vulkan", "engine", "source", "model", "session", "answer", "batch"];

struct Export {
    name: String,
    /// `(arguments) -> result` as in the source.
    signature: String,
}

fn source(module: &str) -> String {
    let path = root().join("ffi/src").join(module).with_extension("rs");
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Exported functions of the sources; what only tests use is left out.
fn exports() -> Vec<Export> {
    let mut exports = Vec::new();
    for module in SUBJECTS {
        let source = source(module);
        for (at, _) in source.match_indices("extern \"C\" fn awqua_") {
            let rest = &source[at + "extern \"C\" fn ".len()..];
            let open = rest.find('(').unwrap();
            let body = rest.find(" {\n").unwrap();
            let signature = rest[open..body].split_whitespace().collect::<Vec<_>>().join(" ");
            let signature = signature.replace("( ", "(").replace(", )", ")");
            exports.push(Export { name: rest[..open].to_owned(), signature });
        }
    }
    exports
}

/// Names of the table as it is committed, in order: those of its values, which fit a line each.
fn listed() -> Vec<String> {
    let table = std::fs::read_to_string(root().join("ffi/src/table.rs")).unwrap_or_default();
    let values = table.split_once("pub static API").map_or("", |(_, values)| values);
    let name = |line: &str| line.trim().split_once(": ")?.1.strip_suffix(',').map(str::to_owned);
    values.lines().filter_map(name).filter(|name| name.starts_with("awqua_")).collect()
}

#[test]
fn the_table_and_the_header_are_the_generated_ones() {
    // In this order: the header declares the table.
    check_table();
    check_header();
}

/// The table has every function and only grows.
fn check_table() {
    let exports = exports();
    let names: BTreeSet<&str> = exports.iter().map(|e| e.name.as_str()).collect();
    assert_eq!(names.len(), exports.len(), "a function is exported twice");
    let mut order: Vec<String> = listed();
    for name in &order {
        assert!(names.contains(name.as_str()), "{name} is in the table but no longer exported; the table only grows");
    }
    let new: Vec<_> = exports.iter().map(|e| e.name.clone()).filter(|name| !order.contains(name)).collect();
    order.extend(new);

    let mut table = String::from(
        "//! GENERATED from the exported functions by `AWQUA_BLESS=1 cargo test -p awqua-tests --test header`.\n\
         //! New functions are appended; the order never changes.\n\n",
    );
    for module in SUBJECTS {
        writeln!(table, "use crate::{module}::*;").unwrap();
    }
    table.push_str(
        "use crate::status::awqua_status;\nuse crate::text::awqua_str;\n\
         use crate::version::{AWQUA_ABI_MAJOR, AWQUA_ABI_MINOR};\nuse crate::vulkan::awqua_vulkan;\nuse std::ffi::{c_char, c_void};\n\n\
         /// Every function of this header, for programs that load the library at run time; see awqua_get_api. Members \
         are\n/// only ever appended.\n#[repr(C)]\n#[derive(Clone, Copy)]\npub struct awqua_api {\n    \
         /// sizeof(awqua_api) of the library.\n    pub struct_size: u32,\n    \
         /// awqua_abi_version of the library.\n    pub abi: u32,\n",
    );
    let find = |name: &String| exports.iter().find(|e| e.name == *name).unwrap();
    for name in &order {
        let field = name.strip_prefix("awqua_").unwrap();
        writeln!(table, "    /// {name}\n    pub {field}: unsafe extern \"C\" fn{},", find(name).signature).unwrap();
    }
    table.push_str(
        "}\n\n/// The table.\npub static API: awqua_api = awqua_api {\n    \
         struct_size: size_of::<awqua_api>() as u32,\n    \
         abi: AWQUA_ABI_MAJOR << 16 | AWQUA_ABI_MINOR,\n",
    );
    for name in &order {
        writeln!(table, "    {}: {name},", name.strip_prefix("awqua_").unwrap()).unwrap();
    }
    table.push_str("};\n");
    check("ffi/src/table.rs", &rustfmt(&table));
}

/// The text as `cargo fmt` leaves it.
fn rustfmt(text: &str) -> String {
    use std::io::Write as _;
    use std::process::{Command, Stdio};
    let mut child = Command::new("rustfmt")
        .args(["--edition", "2024", "--config-path"])
        .arg(root())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("rustfmt");
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

fn check_header() {
    let config = cbindgen::Config::from_file(root().join("ffi/cbindgen.toml")).unwrap();
    let mut builder = cbindgen::Builder::new().with_config(config);
    for module in ["version", "status"].iter().chain(&TYPES).chain(&["api", "table"]) {
        builder = builder.with_src(root().join("ffi/src").join(module).with_extension("rs"));
    }
    let mut header = Vec::new();
    builder.generate().unwrap().write(&mut header);
    check("include/awqua.h", &String::from_utf8(header).unwrap());
}

#[test]
fn layouts_are_asserted_in_c_too() {
    let mut c = String::from(
        "/* GENERATED from the layouts in ffi/src by AWQUA_BLESS=1 cargo test -p awqua-tests --test header. */\n\
         #include <stddef.h>\n\n#include \"awqua.h\"\n\n#if UINTPTR_MAX == UINT64_MAX\n\
         #define CHECK(name, condition) typedef char check_##name[(condition) ? 1 : -1]\n",
    );
    let mut structs = 0;
    for module in TYPES {
        for invocation in source(module).split("\nlayout!(").skip(1) {
            let mut words = invocation[..invocation.find(");").unwrap()]
                .split(|c: char| !(c.is_alphanumeric() || c == '_'))
                .filter(|w| !w.is_empty());
            let name = words.next().unwrap();
            writeln!(c, "\nCHECK({name}, sizeof({name}) == {});", words.next().unwrap()).unwrap();
            while let (Some(field), Some(offset)) = (words.next(), words.next()) {
                writeln!(c, "CHECK({name}_{field}, offsetof({name}, {field}) == {offset});").unwrap();
            }
            structs += 1;
        }
    }
    c.push_str(
        "#endif\n\n/* The table has the types of the functions. */\nvoid awqua_check_table(awqua_api *table);\n",
    );
    c.push_str("void awqua_check_table(awqua_api *table) {\n");
    for name in listed() {
        writeln!(c, "    table->{} = {name};", name.strip_prefix("awqua_").unwrap()).unwrap();
    }
    c.push_str("}\n");
    let declared = TYPES.iter().map(|module| source(module).matches("#[repr(C)]").count()).sum::<usize>();
    assert_eq!(structs, declared, "every structure of the header states its layout");
    check("tests/c/layout.c", &c);
}
