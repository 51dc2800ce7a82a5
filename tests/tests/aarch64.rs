//! The CPU's kernels for AArch64 under an emulator: the library's own unit tests, built for that target. That takes
//! minutes, so it is done only if asked for: `AWQUA_AARCH64=1 cargo test -p awqua-tests --test aarch64`, with Rust's
//! target `aarch64-unknown-linux-gnu`, a linker for it and QEMU's user mode (Debian: `gcc-aarch64-linux-gnu`,
//! `libc6-dev-arm64-cross` and `qemu-user-static`). QEMU's largest processor has `dotprod` and `i8mm`, so the tests
//! compare both kinds of kernels with plain code.

use std::path::Path;
use std::process::Command;

use awqua_tests::hosts::{run, skip, tool};

const TARGET: &str = "aarch64-unknown-linux-gnu";

#[test]
fn kernels_pass_under_an_emulator() {
    if std::env::var_os("AWQUA_AARCH64").is_none() {
        return skip("AWQUA_AARCH64 is not set");
    }
    let (linker, emulator) = match (tool("aarch64-linux-gnu-gcc"), tool("qemu-aarch64-static")) {
        (Some(linker), Some(emulator)) => (linker, emulator),
        _ => return,
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(&root)
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", linker)
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER", format!("{emulator} -L /usr/aarch64-linux-gnu"))
        .args(["test", "-p", "awqua", "--lib", "--no-default-features", "--target", TARGET])
        .arg("--target-dir")
        .arg(root.join("target/aarch64"))
        .args(["--", "backend::cpu"]);
    let printed = run(&mut cargo);
    assert!(printed.contains("products_match_f64_whatever_is_computed_together ... ok"), "{printed}");
}
