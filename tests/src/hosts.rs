//! The C library and the programs that use it: building, finding compilers, running.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

use crate::generated::root;

/// The libraries of one build, in a folder of their own.
#[derive(Debug, Clone)]
pub struct Library {
    /// Holds `libawqua.so`, `libawqua.so.1` and `libawqua.a`.
    pub dir: PathBuf,
}

/// A program on the path, or `None` with a message. With `AWQUA_REQUIRE_HOSTS` set it must be there.
///
/// # Panics
/// If it is demanded and missing.
pub fn tool(name: &str) -> Option<&str> {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(name).is_file()));
    if found {
        return Some(name);
    }
    let demanded = std::env::var_os("AWQUA_REQUIRE_HOSTS").is_some();
    assert!(!demanded, "`{name}` is not installed, and AWQUA_REQUIRE_HOSTS is set");
    skip(&format!("`{name}` is not installed"));
    None
}

/// Says why a test does nothing.
#[allow(clippy::print_stderr, reason = "what is skipped is part of a test's output")]
pub fn skip(why: &str) {
    eprintln!("skipped: {why}");
}

/// Runs a command to its end.
///
/// # Panics
/// With everything it printed, if it can't be started or fails.
pub fn run(command: &mut Command) -> String {
    let output = output(command);
    let printed = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?} ended with {}\n{printed}", output.status);
    printed
}

/// Runs a command to its end, whatever that is.
///
/// # Panics
/// If it can't be started.
pub fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// Folder for what tests build; made if it is missing.
///
/// # Panics
/// If it can't be made.
pub fn scratch(name: &str) -> PathBuf {
    let dir = target().join("c-abi").join(name);
    std::fs::create_dir_all(&dir).expect("a folder under target");
    dir
}

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Builds the C library in the profile of the tests; `features` are added to the default ones.
///
/// # Panics
/// If it does not build.
pub fn library(features: &'static str) -> Library {
    // One build at a time: they write the same files before they are copied out.
    static BUILT: Mutex<BTreeMap<&'static str, Library>> = Mutex::new(BTreeMap::new());
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(library) = built.get(features) {
        return library.clone();
    }
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(root()).args(["build", "-p", "awqua-ffi", "--features", features]);
    let profile = match cfg!(debug_assertions) {
        true => "debug",
        false => {
            cargo.arg("--release");
            "release"
        }
    };
    run(&mut cargo);
    let dir = scratch(&format!("lib-{features}-{profile}"));
    let from = target().join(profile);
    for name in ["libawqua.so", "libawqua.a"] {
        // Replaced rather than written over, because a program of another test run may have it mapped.
        let to = dir.join(name);
        let part = dir.join(format!("{name}.part"));
        std::fs::copy(from.join(name), &part).unwrap_or_else(|e| panic!("{name}: {e}"));
        std::fs::rename(&part, to).expect("in one folder");
    }
    let link = dir.join("libawqua.so.1");
    if !link.exists() {
        std::os::unix::fs::symlink("libawqua.so", link).expect("a link");
    }
    let library = Library { dir };
    built.insert(features, library.clone());
    library
}

/// The story model, packed.
pub fn model() -> PathBuf {
    root().join("examples/models/tiny-story-w4")
}

/// A compiler call with the include path and strict warnings.
pub fn compiler(name: &str, standard: &str) -> Command {
    let mut command = Command::new(name);
    command.arg(format!("-std={standard}")).args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-g"]);
    command.arg("-I").arg(root().join("include"));
    command
}

/// Compiles `source`, from the root, against `library` and returns the program.
///
/// # Panics
/// If it does not compile.
pub fn program(compiler: &mut Command, source: &str, library: &Library, name: &str) -> PathBuf {
    let program = scratch("bin").join(name);
    compiler.arg(root().join(source)).arg("-o").arg(&program);
    compiler.arg("-L").arg(&library.dir).args(["-lawqua", "-lpthread", "-ldl"]);
    compiler.arg(format!("-Wl,-rpath,{}", library.dir.display()));
    run(compiler);
    program
}

/// Lines of `text` that are exported functions of the library, without the version script's tail.
pub fn symbols(library: &Path) -> Vec<String> {
    let listing = run(Command::new("nm").args(["-D", "--defined-only", "--format=posix"]).arg(library));
    listing.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}
