//! The programs in `examples/` that host the library: built and run as their users would.
#![cfg(all(unix, not(target_os = "macos")))]

use std::path::PathBuf;
use std::process::{Command, Stdio};

use awqua_tests::generated::root;
use awqua_tests::hosts::{library, model, output, run, scratch, skip, tool};

/// An installed copy of the library, made by the script that users run.
fn prefix() -> PathBuf {
    // The tests' own build first, so that the script finds it ready and never runs beside it.
    library("wgpu");
    let prefix = scratch("prefix");
    let mut install = Command::new(root().join("ffi/install.sh"));
    run(install.arg(&prefix).args(["--features", "wgpu"]).args(if cfg!(debug_assertions) {
        None
    } else {
        Some("--release")
    }));
    prefix
}

fn with_input(command: &mut Command, input: &str) -> String {
    use std::io::Write;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let found = child.wait_with_output().unwrap();
    assert!(found.status.success(), "{command:?} ended with {}", found.status);
    String::from_utf8(found.stdout).unwrap()
}

/// CMake finds the installed package, shared and static, and builds the examples out of the tree; pkg-config names the
/// same paths; the programs talk.
#[test]
fn c_and_cpp_hosts_build_from_an_installed_prefix() {
    let (Some(cmake), Some(_)) = (tool("cmake"), tool("g++")) else { return };
    let prefix = prefix();
    let build = scratch("cmake");
    let flags = "-Wall -Wextra -Werror -pedantic";
    run(Command::new(cmake)
        .arg("-S")
        .arg(root().join("examples"))
        .arg("-B")
        .arg(&build)
        .arg(format!("-DCMAKE_PREFIX_PATH={}", prefix.display()))
        .arg(format!("-DCMAKE_C_FLAGS={flags}"))
        .arg(format!("-DCMAKE_CXX_FLAGS={flags}")));
    run(Command::new(cmake).arg("--build").arg(&build));
    for chat in ["chat", "chat_static"] {
        let said = with_input(Command::new(build.join(chat)).arg(model()).arg("cpu"), "Once upon a time\nThen\n");
        assert!(said.len() > 40, "{said}");
    }
    let said = run(Command::new(build.join("npc")).arg(model()));
    assert!(said.contains("3 of 3 spoke"), "{said}");
    if let Some(pkg_config) = tool("pkg-config") {
        let found = run(Command::new(pkg_config)
            .env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig"))
            .args(["--cflags", "--libs", "--static", "awqua"]));
        let libraries = std::fs::read_to_string(root().join("ffi/system-libs")).unwrap();
        assert!(found.contains("-lawqua") && found.contains(libraries.trim()), "{found}");
    }
    // Found only where SDL2 is installed, which CI demands.
    let game = build.join("game");
    if !game.exists() {
        assert!(std::env::var_os("AWQUA_REQUIRE_HOSTS").is_none(), "the game was not built: SDL2 is missing");
        return skip("the SDL2 game needs libsdl2-dev");
    }
    let picture = scratch("bin").join("game.bmp");
    let said = run(Command::new(game)
        .env("SDL_VIDEODRIVER", "offscreen")
        .env("SDL_RENDER_DRIVER", "software")
        .arg(model())
        .args(["-frames", "240", "-screenshot"])
        .arg(&picture));
    let answers = said.split(" frames, ").nth(1).and_then(|s| s.split(' ').next()).and_then(|n| n.parse::<u32>().ok());
    assert!(answers.is_some_and(|n| n > 0), "{said}");
    assert!(std::fs::metadata(picture).unwrap().len() > 100_000);
}

/// A Rust host that shares its device: what is measured on a software GPU means nothing, but all of it runs.
#[test]
fn frames_are_drawn_beside_answers() {
    if !cfg!(feature = "wgpu") {
        return;
    }
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(root()).args(["run", "--quiet", "-p", "awqua-frames"]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    let folder = root().join("tests/fixtures/arch/llama-llama3rope-awq-gemm-g64");
    let found = output(cargo.arg("--").arg(folder).args(["--frames", "3", "--warm-up", "1", "--prompt", "20"]));
    let said = String::from_utf8_lossy(&found.stdout);
    let error = String::from_utf8_lossy(&found.stderr);
    if error.contains("no GPU adapter found") {
        assert!(std::env::var_os("AWQUA_REQUIRE_GPU").is_none(), "AWQUA_REQUIRE_GPU is set");
        return skip("there is no GPU adapter");
    }
    assert!(found.status.success(), "{error}");
    for line in ["alone", "decode, budget", "prefill, budget", "decode, no budget", "prefill, no budget", "alone again"]
    {
        assert!(said.contains(line), "{said}");
    }
}

#[test]
fn love_talks() {
    let (Some(love), Some(xvfb)) = (tool("love"), tool("xvfb-run")) else { return };
    let said = run(Command::new("timeout")
        .args(["120", xvfb, "-a", "-s", "-screen 0 640x480x24", love])
        .arg(root().join("examples/love"))
        .arg(model())
        .arg("300")
        .env("AWQUA_LIBRARY", library("wgpu").dir.join("libawqua.so"))
        .env("LIBGL_ALWAYS_SOFTWARE", "1"));
    assert!(said.contains("300 frames") && said.contains("The old miller looked at Emma and said,"), "{said}");
    assert!(said.contains("remembered:"), "{said}");
    assert!(said.contains("hosted:"), "{said}");
}

#[test]
fn mono_talks() {
    let (Some(mcs), Some(mono)) = (tool("mcs"), tool("mono")) else { return };
    let program = scratch("bin").join("npc.exe");
    let mut command = Command::new(mcs);
    command.args(["-langversion:7", "-warnaserror"]).arg(format!("-out:{}", program.display()));
    for file in ["Awqua.cs", "Native.cs", "Speaker.cs", "Program.cs"] {
        command.arg(root().join("examples/unity").join(file));
    }
    run(&mut command);
    let said = run(Command::new(mono).arg(program).arg(model()).env("LD_LIBRARY_PATH", library("wgpu").dir));
    assert!(said.contains("The old miller said,") && said.contains("as expected: AWQUA_ERR_IO"), "{said}");
    assert!(said.contains("remembered:"), "{said}");
    assert!(said.contains("hosted:") && said.contains("memory: taken often"), "{said}");
}
