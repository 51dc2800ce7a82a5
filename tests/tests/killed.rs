//! Quantizing in a process that is killed, again and again: nothing half-written, and in the end the same bytes.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use awqua_quantizer::calibration::Calibration;
use awqua_quantizer::math::Threads;
use awqua_quantizer::method::Method;
use awqua_quantizer::quantize::{GroupSize, QuantizeOptions, quantize, tune};
use awqua_quantizer::random::Random;

#[allow(dead_code, reason = "another test makes tensors with it")]
mod disk;

use disk::Folder;

/// Where the child process writes to.
const OUT: &str = "AWQUA_KILLED_OUT";

fn work(out: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/arch/qwen2");
    let mut random = Random::new(6);
    let ids = (0..6).map(|_| (0..40).map(|_| random.below(512) as u32).collect()).collect();
    let mut options = QuantizeOptions::new(Method::Tuned, 4);
    options.group_size = GroupSize::Features(32);
    let mut recipe = Method::Tuned.recipe(4);
    recipe.tune = Some(tune::Options { epochs: 4.0, tokens: 20, scale_rate: 2e-3, vector_rate: 1e-3 });
    options.recipe = Some(recipe);
    quantize(&source, out, &Calibration::of_ids("random", ids), &options, Threads::new(1), &mut |_| Ok(())).unwrap();
}

/// What the other test starts and kills; alone it does nothing.
#[test]
fn child() {
    if let Some(out) = std::env::var_os(OUT) {
        work(Path::new(&out));
    }
}

#[test]
fn a_killed_run_leaves_nothing_half_written_and_goes_on_to_the_same_bytes() {
    let folder = Folder::new();
    let (whole, broken) = (folder.path().join("whole"), folder.path().join("broken"));
    let start = || {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "child"]).env(OUT, &broken).stdout(Stdio::null()).stderr(Stdio::null());
        child.spawn().unwrap()
    };
    let begun = Instant::now();
    work(&whole);
    let time = begun.elapsed();
    let names = |dir: &Path| {
        let mut names: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let files = names(&whole);
    let finished = || {
        assert_eq!(names(&broken), files);
        for file in &files {
            assert_eq!(std::fs::read(whole.join(file)).unwrap(), std::fs::read(broken.join(file)).unwrap(), "{file:?}");
        }
        std::fs::remove_dir_all(&broken).unwrap();
    };

    let mut random = Random::new(std::process::id().into());
    let (mut kills, mut runs) = (0, 0);
    while kills < 20 {
        let mut child = start();
        std::thread::sleep(time.mul_f64(0.9 * random.below(1000) as f64 / 1000.0) + Duration::from_millis(5));
        runs += 1;
        assert!(runs < 400, "it is never killed");
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            kills += 1;
        }
        // It may have finished just before.
        if child.wait().unwrap().success() || broken.exists() {
            finished();
        }
    }
    let status = start().wait().unwrap();
    assert!(status.success());
    finished();
    let left: Vec<_> = names(folder.path()).into_iter().filter(|name| name != "whole").collect();
    assert!(left.is_empty(), "{left:?}");
}
