//! The C library as C sees it: headers, symbols, linking, and the programs in `tests/c` under sanitizers.
#![cfg(all(unix, not(target_os = "macos")))]

use std::path::PathBuf;
use std::process::Command;

use awqua_tests::generated::{check, root};
use awqua_tests::hosts::{compiler, library, model, output, program, run, scratch, skip, symbols, tool};

const COMPILERS: [(&str, &str); 4] = [("gcc", "c99"), ("clang", "c11"), ("g++", "c++17"), ("clang++", "c++17")];
/// Calls made by the fuzz driver; few where every instruction is watched.
const SEQUENCES: &str = "10000";

/// A C test with the hooks that inject faults, under AddressSanitizer and UndefinedBehaviorSanitizer.
fn sanitized(name: &str) -> Option<PathBuf> {
    let mut gcc = compiler(tool("gcc")?, "c99");
    gcc.args(["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]);
    Some(program(&mut gcc, &format!("tests/c/{name}.c"), &library("fault-injection"), &format!("{name}-asan")))
}

fn plain(name: &str) -> Option<PathBuf> {
    let mut gcc = compiler(tool("gcc")?, "c99");
    Some(program(&mut gcc, &format!("tests/c/{name}.c"), &library("fault-injection"), name))
}

fn model_arg() -> String {
    model().display().to_string()
}

#[test]
fn headers_compile_without_a_warning() {
    for (name, standard) in COMPILERS {
        let Some(name) = tool(name) else { continue };
        let language = if standard.starts_with("c++") { "c++" } else { "c" };
        for file in ["layout.c", "inits.c", "abi_probe.c"] {
            let mut command = compiler(name, standard);
            command.args(["-x", language, "-c"]).arg(root().join("tests/c").join(file)).args(["-o", "/dev/null"]);
            run(&mut command);
        }
        if language == "c++" {
            let mut command = compiler(name, standard);
            command.args(["-x", "c++", "-fsyntax-only", "-include", "awqua.hpp"]);
            run(command.arg(root().join("tests/c/inits.c")));
        }
    }
}

#[test]
fn the_library_exports_the_functions_of_the_header() {
    if tool("nm").is_none() {
        return;
    }
    let header = std::fs::read_to_string(root().join("include/awqua.h")).unwrap();
    let mut declared: Vec<String> = header
        .split("AWQUA_API")
        .skip(1)
        .filter_map(|text| text[..text.find(';')?].split_once('(')?.0.split_whitespace().last().map(str::to_owned))
        .map(|name| name.trim_start_matches('*').to_owned())
        .filter(|name| name.starts_with("awqua_"))
        .collect();
    declared.sort();
    // The version is also named in a macro's comment.
    declared.dedup();
    for features in ["wgpu", "grammar"] {
        let mut exported = symbols(&library(features).dir.join("libawqua.so"));
        exported.sort();
        assert_eq!(exported, declared, "with feature `{features}`");
    }
    let dynamic = run(Command::new("readelf").arg("-d").arg(library("wgpu").dir.join("libawqua.so")));
    assert!(dynamic.contains("[libawqua.so.1]"), "{dynamic}");
}

/// The ABI is what the debug information of `abi_probe.c` says, and every change of it shows up against the committed
/// baseline. What may be added (functions behind the table's end, members behind a structure's end, enumerators) goes
/// into the baseline with `AWQUA_BLESS=1` and raises `AWQUA_ABI_MINOR`; anything else raises `AWQUA_ABI_MAJOR`.
#[test]
fn the_abi_is_compatible_with_the_baseline() {
    let (Some(gcc), Some(abidw), Some(abidiff)) = (tool("gcc"), tool("abidw"), tool("abidiff")) else { return };
    let probe = scratch("bin").join("abi-probe.so");
    let mut gcc = compiler(gcc, "c99");
    // Relative paths, so that the baseline is the same on every machine.
    gcc.current_dir(root()).arg(format!("-ffile-prefix-map={}=.", root().display()));
    run(gcc.args(["-shared", "-fPIC", "-o"]).arg(&probe).arg("tests/c/abi_probe.c"));
    let baseline = root().join("tests/c/awqua.abi");
    if std::env::var_os("AWQUA_BLESS").is_some() {
        let text = run(Command::new(abidw)
            .args(["--no-show-locs", "--no-corpus-path", "--no-comp-dir-path", "--no-elf-needed", "--type-id-style"])
            .args(["hash"])
            .arg(&probe));
        check("tests/c/awqua.abi", &text);
        return;
    }
    run(Command::new(abidiff).arg(&baseline).arg(&probe));
    // The comparison can fail: a field in the middle is noticed.
    let header = std::fs::read_to_string(root().join("include/awqua.h")).unwrap();
    let broken = scratch("broken");
    let changed = header.replacen("uint32_t new_tokens;", "uint64_t new_tokens;", 1);
    assert_ne!(header, changed);
    std::fs::write(broken.join("awqua.h"), changed).unwrap();
    let probe = scratch("bin").join("abi-probe-broken.so");
    let mut gcc = Command::new("gcc");
    gcc.current_dir(root()).args(["-g", "-shared", "-fPIC", "-I"]).arg(&broken).arg("-o").arg(&probe);
    run(gcc.arg("tests/c/abi_probe.c"));
    let found = output(Command::new(abidiff).arg(baseline).arg(&probe));
    assert!(!found.status.success(), "a changed field was not noticed");
}

#[test]
fn the_static_library_links_with_the_listed_system_libraries() {
    let Some(gcc) = tool("gcc") else { return };
    let library = library("wgpu");
    let libraries = std::fs::read_to_string(root().join("ffi/system-libs")).unwrap();
    let program = scratch("bin").join("static-contract");
    let mut gcc = compiler(gcc, "c99");
    gcc.arg("-DAWQUA_STATIC").arg(root().join("tests/c/contract.c")).arg("-o").arg(&program);
    run(gcc.arg(library.dir.join("libawqua.a")).args(libraries.split_whitespace()));
    run(Command::new(program).arg(model()));
}

#[test]
fn initialisers_and_functions_agree() {
    for (name, standard) in COMPILERS {
        let Some(name) = tool(name) else { continue };
        let mut command = compiler(name, standard);
        if standard.starts_with("c++") {
            command.args(["-x", "c++"]);
        }
        run(&mut Command::new(program(
            &mut command,
            "tests/c/inits.c",
            &library("fault-injection"),
            &format!("inits-{name}"),
        )));
    }
}

#[test]
fn the_contract_holds() {
    let Some(contract) = sanitized("contract") else { return };
    run(Command::new(contract).arg(model()));
}

#[test]
fn injected_panics_become_statuses() {
    let Some(panics) = sanitized("panics") else { return };
    run(Command::new(panics).arg(model()));
    // Every function of the header that can panic is in the program.
    let text = std::fs::read_to_string(root().join("tests/c/panics.c")).unwrap();
    let table = std::fs::read_to_string(root().join("ffi/src/table.rs")).unwrap();
    // These return constants.
    let constant = ["awqua_abi_version", "awqua_version", "awqua_status_name"];
    for name in table.lines().filter_map(|l| l.trim().strip_prefix("/// awqua_")).filter(|n| !n.contains(' ')) {
        let name = format!("awqua_{name}");
        let tested =
            ["PANIC(", "PANIC_FREE(", "AWQUA_CSTR(\""].iter().any(|open| text.contains(&format!("{open}{name}")));
        assert!(tested || constant.contains(&name.as_str()), "{name} is not in tests/c/panics.c");
    }
}

/// A model of few ticks.
fn small_model() -> PathBuf {
    root().join("tests/fixtures/arch/llama-llama3rope-awq-gemm-g64")
}

#[test]
fn cancelling_works_at_every_tick() {
    let Some(cancels) = sanitized("cancels") else { return };
    // The cost grows with the square of the ticks, of which the story model has five times as many.
    let model = if std::env::var_os("AWQUA_LONG_TESTS").is_some() { model() } else { small_model() };
    run(Command::new(cancels).arg(model));
}

#[test]
fn what_sessions_and_models_can_do_is_reached() {
    let Some(abilities) = sanitized("abilities") else { return };
    run(Command::new(abilities).arg(model()));
}

/// The header for C++ wraps every function, and what it makes of them works.
#[test]
fn the_header_for_cpp_covers_all_functions() {
    let header = std::fs::read_to_string(root().join("include/awqua.hpp")).unwrap();
    let table = std::fs::read_to_string(root().join("ffi/src/table.rs")).unwrap();
    for name in table.lines().filter_map(|l| l.trim().strip_prefix("/// awqua_")).filter(|n| !n.contains(' ')) {
        // Initialisers are macros there, and the table is for programs that do not link.
        let needless = name.ends_with("_init") || name == "get_api";
        let is_used = header.match_indices(&format!("awqua_{name}")).any(|(at, found)| {
            header[at + found.len()..].chars().next().is_some_and(|c| !c.is_alphanumeric() && c != '_')
        });
        assert!(is_used || needless, "awqua_{name} is not in awqua.hpp");
    }
    let Some(gcc) = tool("g++") else { return };
    let mut gcc = compiler(gcc, "c++17");
    gcc.args(["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]);
    let wrapper = program(&mut gcc, "tests/c/wrapper.cpp", &library("fault-injection"), "wrapper-asan");
    run(Command::new(wrapper).arg(model()));
}

/// With the optional feature, and refused without it.
#[test]
fn grammars_are_kept() {
    let Some(gcc) = tool("gcc") else { return };
    let mut gcc = compiler(gcc, "c99");
    let grammar = program(&mut gcc, "tests/c/grammar.c", &library("grammar"), "grammar");
    run(Command::new(grammar).args([&model_arg(), "with"]));
    let mut gcc = compiler("gcc", "c99");
    let grammar = program(&mut gcc, "tests/c/grammar.c", &library("fault-injection"), "no-grammar");
    run(Command::new(grammar).args([&model_arg(), "without"]));
}

/// Runs a program that works on a GPU, so without the sanitizers, which find fault with its driver.
fn on_gpu(name: &str) {
    let Some(program) = plain(name) else { return };
    let said = run(Command::new(program).arg(small_model()));
    let demanded = std::env::var_os("AWQUA_REQUIRE_GPU").is_some();
    assert!(!demanded || !said.contains("no GPU"), "no GPU adapter, and AWQUA_REQUIRE_GPU is set");
}

#[test]
fn a_lost_device_is_recovered() {
    on_gpu("loss");
}

#[test]
fn forks_share_their_start() {
    on_gpu("forks");
}

/// A host's own Vulkan device; without the sanitizers, as above. Its header is demanded where the hosts' programs are.
#[test]
fn a_vulkan_device_is_shared() {
    let (Some(gcc), Some(pkg_config)) = (tool("gcc"), tool("pkg-config")) else { return };
    if !output(Command::new(pkg_config).args(["--exists", "vulkan"])).status.success() {
        assert!(std::env::var_os("AWQUA_REQUIRE_HOSTS").is_none(), "Vulkan's header is missing: libvulkan-dev");
        return skip("the host of a Vulkan device needs libvulkan-dev");
    }
    let mut gcc = compiler(gcc, "c99");
    let vulkan = scratch("bin").join("vulkan");
    let library = library("fault-injection");
    gcc.arg(root().join("tests/c/vulkan.c")).arg("-o").arg(&vulkan).arg("-L").arg(&library.dir);
    run(gcc.args(["-lawqua", "-lvulkan", "-lpthread"]).arg(format!("-Wl,-rpath,{}", library.dir.display())));
    let said = run(Command::new(vulkan).arg(small_model()));
    let demanded = std::env::var_os("AWQUA_REQUIRE_GPU").is_some();
    assert!(!demanded || !said.contains("no GPU"), "no GPU adapter, and AWQUA_REQUIRE_GPU is set");
}

#[test]
fn threads_are_served_or_refused() {
    let Some(threads) = sanitized("threads") else { return };
    run(Command::new(threads).arg(model()));
}

#[test]
fn random_calls_break_nothing() {
    let Some(fuzz) = sanitized("fuzz") else { return };
    let seed = std::env::var("AWQUA_FUZZ_SEED").unwrap_or_else(|_| "20261123".to_owned());
    run(Command::new(fuzz).args([&model_arg(), SEQUENCES, &seed]));
}

#[test]
fn the_table_works_without_linking() {
    let Some(gcc) = tool("gcc") else { return };
    let library = library("fault-injection");
    let program = scratch("bin").join("table");
    let mut gcc = compiler(gcc, "c99");
    run(gcc.arg(root().join("tests/c/table.c")).arg("-o").arg(&program).arg("-ldl"));
    run(Command::new(program).arg(library.dir.join("libawqua.so")).arg(model()));
}

#[test]
fn memory_comes_from_the_host() {
    let Some(allocator) = plain("allocator") else { return };
    run(Command::new(allocator).arg(model()));
}

/// Random calls, a panic in every function, and cancels at every tick; a subset of the first, because every instruction
/// is interpreted, and the last without batches, which take most of the time, unless there is time.
#[test]
fn valgrind_finds_nothing() {
    let Some(valgrind) = tool("valgrind") else { return };
    let memcheck = |program: PathBuf, arguments: &[&str]| {
        let mut command = Command::new(valgrind);
        // "Possible" leaks are what only interior pointers reach, as in every hash table of Rust.
        command.args(["--quiet", "--error-exitcode=9", "--leak-check=full", "--show-leak-kinds=definite,indirect"]);
        command.arg("--errors-for-leak-kinds=definite,indirect");
        run(command.arg(program).args(arguments))
    };
    if let Some(fuzz) = plain("fuzz") {
        memcheck(fuzz, &[&model_arg(), "1000", "7"]);
    }
    let small = small_model().display().to_string();
    if let Some(panics) = plain("panics") {
        memcheck(panics, &[&small]);
    }
    if let Some(cancels) = plain("cancels") {
        memcheck(cancels.clone(), &[&small, "load"]);
        memcheck(cancels.clone(), &[&small, "answer"]);
        if std::env::var_os("AWQUA_LONG_TESTS").is_some() {
            memcheck(cancels, &[&small, "batch"]);
        }
    }
}
