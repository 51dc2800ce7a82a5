//! Running tests on the machine of tests/cuda.

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};

use awqua_tests::generated::root;
use awqua_tests::hosts::{run, tool};

/// Tells the second process that it is one.
pub const CHILD: &str = "AWQUA_TEST_ON_MACHINE";

/// The folder of the machine's libcuda.so; `None` with a message where it can not be built.
pub fn folder() -> Option<PathBuf> {
    static BUILT: OnceLock<Mutex<Option<PathBuf>>> = OnceLock::new();
    let mut built = BUILT.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if built.is_none() {
        tool("g++")?;
        let folder = root().join("target").join(format!("cuda-machine-{}", std::process::id()));
        run(Command::new("sh").arg(root().join("tests/cuda/build.sh")).arg(&folder));
        *built = Some(folder);
    }
    built.clone()
}

/// Whether this is the second process, or one on a real device; else runs `test` in a second one under each of `settings`.
pub fn is_on_machine(test: &str, settings: &[&[(&str, &str)]]) -> bool {
    if std::env::var_os(CHILD).is_some() || std::env::var_os("AWQUA_CUDA_DEVICE").is_some() {
        return true;
    }
    let Some(folder) = folder() else { return false };
    let this = std::env::current_exe().expect("a test has a path");
    for settings in settings {
        run(Command::new(&this)
            .args(["--exact", test, "--nocapture"])
            .env(CHILD, "1")
            .env("LD_LIBRARY_PATH", &folder)
            .envs(settings.iter().copied()));
    }
    false
}

/// Settings under which every path is taken.
#[allow(dead_code, reason = "not every test takes all")]
pub const ALL_CAPABILITIES: &[&[(&str, &str)]] = &[
    &[("AWQUA_MACHINE_CAPABILITY", "90")],
    &[("AWQUA_MACHINE_CAPABILITY", "90"), ("AWQUA_MACHINE_SEED", "7"), ("AWQUA_MACHINE_PROCESSORS", "132")],
    &[("AWQUA_MACHINE_CAPABILITY", "86")],
    &[("AWQUA_MACHINE_CAPABILITY", "75")],
];
