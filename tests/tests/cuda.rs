//! The CUDA backend on a machine on the CPU (tests/cuda): arithmetic, indexing, synchronisation inside of blocks, and
//! everything around the kernels. With `AWQUA_CUDA_DEVICE=1` the same tests run on this machine's own driver.
//!
//! A test builds the machine as a library and runs itself again in a process that finds it as its driver.
#![cfg(all(feature = "cuda", target_os = "linux", target_arch = "x86_64"))]

mod machine;

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use awqua::ErrorKind;
use awqua::backend::cuda::driver::Gpu;
use awqua::backend::cuda::{CudaBackend, CudaChoice, CudaOptions, devices};
use awqua::backend::{
    Backend, Budget, KvType, LogitsRows, Program, Progress, Runner, RunnerConfig, Sharing, Step, kv_bytes,
};
use awqua::session::sampler::{SampleRequest, Sampling};
use awqua_tests::constraints;
use awqua_tests::decoder::{
    CONTEXT, Case, Model, Rng, STEPS, build, cases, config, cuda_cases, error, q8_error, rope_rows, tokens, write_rope,
};
use awqua_tests::hosts::run;
use awqua_tests::oracle::{Dequantised, Oracle};
use awqua_tests::runners;
use machine::{ALL_CAPABILITIES, CHILD, folder, is_on_machine};

fn upload(model: &Model, options: &CudaOptions) -> Arc<CudaBackend> {
    let mut backend = CudaBackend::open(options).expect("the device opens");
    model.upload(&mut backend);
    Arc::new(backend)
}

fn runner(model: &Model, config: &RunnerConfig) -> (Arc<CudaBackend>, Box<dyn Runner>) {
    runner_with(model, config, &CudaOptions::default())
}

fn runner_with(model: &Model, config: &RunnerConfig, options: &CudaOptions) -> (Arc<CudaBackend>, Box<dyn Runner>) {
    let backend = upload(model, options);
    let mut runner = backend.clone().runner(&model.program, config).expect("the runner fits");
    write_rope(&mut *runner, &model.program);
    (backend, runner)
}

fn compare(case: &Case) {
    let model = build(case);
    let (backend, mut runner) = runner(&model, &RunnerConfig { kv_type: Some(case.kv), ..config() });
    assert_eq!(runner.kv_type(), case.kv);
    let mut oracle = Oracle::new(&model.program, &model.weights, CONTEXT as usize, case.kv, Dequantised::Exact);
    for table in 0..case.rope_tables {
        oracle.write_rope(table as usize, 0, &rope_rows(table, case.shape.rotary_dim / 2));
    }
    let mut rng = Rng(77);
    let (mut logits, mut hidden) = (Vec::new(), Vec::new());
    for &(n, position, rows) in STEPS {
        let tokens = tokens(&mut rng, n, case.vocab);
        let expected = oracle.run(&tokens, position as usize, rows);
        runner.run(&Step { tokens: &tokens, position, logits: rows }).expect("the step runs");
        runner.read_logits(&mut logits).expect("the logits come back");
        if !expected.is_empty() {
            runner.read_hidden(&mut hidden).expect("the hidden rows come back");
            assert_eq!(hidden.len(), rows.range(n).len() * case.hidden);
        }
        let error = if expected.is_empty() { logits.len() as f32 } else { error(&logits, &expected) };
        // Half precision inputs carry 11 bits.
        let allowed = if case.kv == KvType::Q8 { q8_error(6e-3) } else { 6e-3 };
        assert!(
            error <= allowed,
            "{} ({}), {n} tokens at {position}: error {error}",
            case.name,
            backend.info().variant
        );
    }
}

#[test]
fn programs_match_the_naive_interpretation() {
    if is_on_machine("programs_match_the_naive_interpretation", ALL_CAPABILITIES) {
        for case in cuda_cases() {
            compare(&case);
            compare(&Case { kv: KvType::Q8, ..case });
        }
    }
}

/// The fused case, with a vocabulary of its own.
fn fast_case(vocab: usize) -> Case {
    let case = cuda_cases().into_iter().find(|case| case.name == "fused, heads of 128 with groups of 64");
    Case { vocab, ..case.expect("the case is there") }
}

#[test]
fn tokens_are_picked_as_on_the_cpu() {
    if !is_on_machine("tokens_are_picked_as_on_the_cpu", &[&[]]) {
        return;
    }
    let case = fast_case(40_003);
    let (_backend, mut runner) = runner(&build(&case), &config());
    runners::check_choices(&mut *runner, case.vocab, &[0.0, 0.333, 0.777, 0.999]);
}

/// Over vocabularies that end within a word of a mask, and of more than one slice.
#[test]
fn constrained_tokens_are_picked_as_on_the_cpu() {
    if !is_on_machine("constrained_tokens_are_picked_as_on_the_cpu", &[&[]]) {
        return;
    }
    let mut rng = Rng(22);
    for vocab in [31, 2101] {
        let (_backend, mut runner) = runner(&build(&fast_case(vocab)), &config());
        let mut row = Vec::new();
        runner.run(&Step { tokens: &[3, 1], position: 0, logits: LogitsRows::Last }).expect("the step runs");
        runner.read_logits(&mut row).expect("the logits come back");
        constraints::check(&mut *runner, &row, &mut rng, &[0.313, constraints::LARGEST]);
    }
}

/// The oldest token ahead.
fn take(runner: &mut dyn Runner) -> u32 {
    loop {
        if let Some(token) = runner.poll_ahead().expect("a token") {
            return token;
        }
        runner.wait().expect("the device goes on");
    }
}

#[test]
fn tokens_ahead_are_those_one_by_one() {
    if !is_on_machine("tokens_ahead_are_those_one_by_one", &ALL_CAPABILITIES[..1]) {
        return;
    }
    let model = build(&fast_case(517));
    let prompt = [5, 6, 7, 8, 9];
    for sampling in [Sampling::greedy(), Sampling { top_k: 20, temperature: 1.2, ..Sampling::default() }] {
        let uniform = |i: usize| (i as f32 * 0.37).fract();
        let (_backend, mut slow) = runner(&model, &config());
        let mut expected = Vec::new();
        slow.run(&Step { tokens: &prompt, position: 0, logits: LogitsRows::Last }).expect("the step runs");
        for i in 0..12 {
            let request = SampleRequest { uniform: uniform(i), ..SampleRequest::new(&sampling) };
            let token = slow.sample(&request).expect("a token");
            expected.push(token);
            let position = (prompt.len() + i) as u32;
            slow.run(&Step { tokens: &[token], position, logits: LogitsRows::Last }).expect("the step runs");
        }
        for force_no_graphs in [false, true] {
            let options = CudaOptions { force_no_graphs, ..CudaOptions::default() };
            let (_backend, mut fast) = runner_with(&model, &config(), &options);
            fast.run(&Step { tokens: &prompt, position: 0, logits: LogitsRows::Last }).expect("the step runs");
            let mut found = Vec::new();
            for i in 0..12 {
                let request = SampleRequest { uniform: uniform(i), ..SampleRequest::new(&sampling) };
                let position = (prompt.len() + i) as u32;
                assert!(fast.begin_ahead(&request, position).expect("it begins"));
                if i == 4 {
                    // Forgotten before it was queued: nothing counts it.
                    fast.abandon();
                    found.push(expected[3]);
                    let step = Step { tokens: &expected[3..4], position: position - 1, logits: LogitsRows::Last };
                    fast.run(&step).expect("the step runs");
                    assert!(fast.begin_ahead(&request, position).expect("it begins"));
                }
                // Every other one in the smallest pieces.
                let piece = Budget { deadline: None, device: Some(Duration::from_nanos(1)) };
                let budget = if i % 2 == 0 { Budget::UNLIMITED } else { piece };
                while fast.advance(&budget).expect("pieces are queued") != Progress::Done {
                    fast.wait().expect("the device goes on");
                }
                if i > 0 && i != 4 {
                    found.push(take(&mut *fast));
                }
            }
            found.push(take(&mut *fast));
            assert_eq!(found, expected, "{sampling:?}, no graphs {force_no_graphs}");
            assert_eq!(fast.poll_ahead().expect_err("there is none").kind(), ErrorKind::InvalidInput);
        }
    }
}

#[test]
fn budgets_change_nothing() {
    if !is_on_machine("budgets_change_nothing", &[&[]]) {
        return;
    }
    let model = build(&fast_case(300));
    let (_backend, mut runner) = runner(&model, &config());
    let prompt: Vec<u32> = (0..33).collect();
    let step = Step { tokens: &prompt, position: 0, logits: LogitsRows::Last };
    let (mut whole, mut pieces) = (Vec::new(), Vec::new());
    runner.run(&step).expect("the step runs");
    runner.read_logits(&mut whole).expect("the logits come back");
    runner.begin(&step).expect("the step begins");
    let mut calls = 0;
    loop {
        let deadline = Some(Instant::now() + Duration::from_micros(if calls % 3 == 0 { 0 } else { 500 }));
        let budget = Budget { deadline, device: Some(Duration::from_micros(50)) };
        calls += 1;
        match runner.advance(&budget).expect("it goes on") {
            Progress::Done => break,
            Progress::Waiting => runner.wait().expect("the device ends something"),
            Progress::Working => {}
        }
    }
    runner.read_logits(&mut pieces).expect("the logits come back");
    // The first call has no time at all; how many follow depends on the device.
    assert!(calls > 1 && whole == pieces, "{calls} calls");
    assert!(runner.chunk(0, 40, Duration::from_nanos(1)) == 1 && runner.chunk(0, 40, Duration::from_secs(9)) == 40);
    // An abandoned step leaves the runner usable.
    runner.begin(&step).expect("the step begins");
    runner.advance(&Budget { deadline: None, device: Some(Duration::from_nanos(1)) }).expect("it goes on");
    runner.abandon();
    runner.run(&step).expect("the step runs");
    runner.read_logits(&mut pieces).expect("the logits come back");
    assert!(whole == pieces);
    let times = runner.profile(&step).expect("it can be profiled");
    assert!(times.iter().all(|t| t.seconds >= 0.0 && t.bytes > 0) && times.len() > 10);
}

#[test]
fn caches_can_be_kept_and_shared() {
    if !is_on_machine("caches_can_be_kept_and_shared", &[&[]]) {
        return;
    }
    // Of matrix units and of any form, where the cache of 8 bits has room behind each line of scales.
    let eight_bits = Case { kv: KvType::Q8, window: Some(90), ..fast_case(300) };
    for (case, context) in [fast_case(300), cases().swap_remove(1), eight_bits].into_iter().zip([201, 200, 203]) {
        let model = build(&case);
        let config = RunnerConfig { kv_type: Some(case.kv), context, ..config() };
        let (_backend, mut first) = runner(&model, &config);
        let logits = |runner: &mut dyn Runner, position: u32| {
            let mut logits = Vec::new();
            runner.run(&Step { tokens: &[3, 4], position, logits: LogitsRows::Last }).expect("the step runs");
            runner.read_logits(&mut logits).expect("the logits come back");
            logits
        };
        let prompt = tokens(&mut Rng(71), 150, case.vocab);
        let prefill = |runner: &mut dyn Runner, first: usize| {
            for (i, tokens) in prompt[first..].chunks(config.max_tokens as usize).enumerate() {
                let position = (first + i * config.max_tokens as usize) as u32;
                runner.run(&Step { tokens, position, logits: LogitsRows::None }).expect("the step runs");
            }
        };
        prefill(&mut *first, 0);
        let snapshot = |runner: &mut dyn Runner, n: u32| {
            let mut kept = vec![0; kv_bytes(&model.program, case.kv, n) as usize];
            runner.save_kv(n, &mut kept).expect("the cache is saved");
            kept
        };
        let kept = snapshot(&mut *first, 150);
        let mut copy = first.fork(150, Sharing::Never).expect("a fork");
        assert!(copy.shared().is_none() && copy.bytes() == first.bytes());
        let promised = first.fork_bytes(150, Sharing::Exact);
        let mut forks: Vec<_> = (0..2).map(|_| first.fork(150, Sharing::Exact).expect("a fork")).collect();
        // 128 positions are whole blocks, and all have them in common.
        let shared = forks[0].shared().expect("the start is shared");
        assert_eq!((shared.positions, shared.bytes), (128, kv_bytes(&model.program, case.kv, 128)));
        assert_eq!(forks[1].shared(), Some(shared));
        assert_eq!(forks[0].bytes() + shared.bytes, first.bytes());
        assert_eq!((promised, first.fork_bytes(150, Sharing::Exact)), (first.bytes(), forks[0].bytes()));
        // A fork of a fork, and one of fewer positions than are shared.
        let child = forks[1].fork(150, Sharing::Always).expect("a fork");
        assert_eq!(child.shared(), Some(shared));
        forks.push(child);
        let short = forks[1].fork(100, Sharing::Never).expect("a fork");
        assert!(short.shared().is_none());
        let expected = logits(&mut *first, 150);
        for fork in forks.iter_mut().chain([&mut copy]) {
            assert_eq!(snapshot(&mut **fork, 150), kept);
            assert_eq!(logits(&mut **fork, 150), expected);
        }
        // Nobody writes what is common.
        let refused = forks[0].run(&Step { tokens: &[1], position: 127, logits: LogitsRows::None });
        assert_eq!(refused.expect_err("it is shared").kind(), ErrorKind::InvalidInput);
        assert_eq!(forks[0].load_kv(150, &kept).expect_err("it is shared").kind(), ErrorKind::InvalidInput);
        // The runner they came from may, and lends another start from then on.
        first.run(&Step { tokens: &[9, 8], position: 90, logits: LogitsRows::None }).expect("the step runs");
        let other = first.fork(92, Sharing::Always).expect("a fork").shared().expect("the start is shared");
        assert!(other.id != shared.id && other.positions == 64);
        drop((copy, first));
        assert_eq!(logits(&mut *forks[0], 150), expected);
        assert_eq!(logits(&mut *forks[2], 150), expected);
        // One that has its start for itself goes on from anywhere.
        let mut short = short;
        prefill(&mut *short, 100);
        assert_eq!(snapshot(&mut *short, 100), snapshot(&mut *forks[1], 100));
        let (_other, mut second) = runner(&model, &config);
        second.load_kv(150, &kept).expect("the cache is loaded");
        assert_eq!(logits(&mut *second, 150), expected);
        let mut wrong = kept.clone();
        wrong.pop();
        assert_eq!(second.save_kv(150, &mut wrong).expect_err("too short").kind(), ErrorKind::InvalidInput);
    }
}

#[test]
fn wrong_calls_are_refused() {
    if !is_on_machine("wrong_calls_are_refused", &[&[("AWQUA_MACHINE_MEMORY", "200000000")]]) {
        return;
    }
    let model = build(&fast_case(300));
    let (backend, mut runner) = runner(&model, &config());
    runners::check_refusals(&mut *runner, &model.program, 64);
    let layers = Arc::new(Program { layers: 1_000_000, ..(*model.program).clone() });
    for (program, config) in [
        (&model.program, RunnerConfig { context: u32::MAX, ..config() }),
        (&model.program, RunnerConfig { max_logits_rows: u32::MAX, ..config() }),
        (&layers, RunnerConfig { context: 1_000_000, ..config() }),
    ] {
        let refused = backend.clone().runner(program, &config).err().expect("it can not fit");
        assert_eq!(refused.kind(), ErrorKind::OutOfMemory, "{refused}");
        assert!(refused.message().contains("bytes"), "{refused}");
    }
    let too_many = RunnerConfig { max_tokens: 100_000, ..config() };
    let refused = backend.clone().runner(&model.program, &too_many).err().expect("too many rows");
    assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    runner.run(&Step { tokens: &[1], position: 0, logits: LogitsRows::Last }).expect("the device still works");
    backend.destroy();
    let lost = |kind| assert_eq!(kind, ErrorKind::DeviceLost);
    lost(runner.run(&Step { tokens: &[1], position: 1, logits: LogitsRows::Last }).expect_err("it is gone").kind());
    lost(runner.read_logits(&mut Vec::new()).expect_err("it is gone").kind());
    lost(backend.clone().runner(&model.program, &config()).err().expect("it is gone").kind());
}

/// The lowest priority unless the highest one is asked for; the machine refuses others.
#[test]
fn streams_have_the_priority_that_was_asked_for() {
    let settings: &[&[(&str, &str)]] = &[&[("AWQUA_MACHINE_PRIORITY", "0")], &[("AWQUA_MACHINE_PRIORITY", "-5")]];
    if !is_on_machine("streams_have_the_priority_that_was_asked_for", settings) {
        return;
    }
    let accepted = std::env::var("AWQUA_MACHINE_PRIORITY").ok();
    for high in [false, true] {
        let stream = Gpu::open(&CudaChoice::Best, high).expect("the device opens").stream();
        assert_eq!(stream.is_ok(), accepted.as_ref().is_none_or(|accepted| (accepted != "0") == high));
    }
}

#[test]
fn a_missing_or_broken_driver_is_no_device() {
    const NAME: &str = "a_missing_or_broken_driver_is_no_device";
    if std::env::var_os(CHILD).is_some() {
        let refused = CudaBackend::open(&CudaOptions::default()).err();
        match std::env::var("AWQUA_TEST_EXPECTED").as_deref() {
            Ok("none") => {
                assert_eq!(devices(), []);
                assert_eq!(refused.expect("there is none").kind(), ErrorKind::NoDevice);
            }
            Ok("error") => assert!(refused.is_some()),
            _ => assert!(refused.is_none()),
        }
        let unknown = CudaOptions { device: CudaChoice::Named("no such device".into()), ..CudaOptions::default() };
        assert!(CudaBackend::open(&unknown).is_err());
        return;
    }
    let this = std::env::current_exe().expect("a test has a path");
    let child = |library: &std::path::Path, expected: &str, name: &str, value: &str| {
        run(Command::new(&this)
            .args(["--exact", NAME])
            .env(CHILD, "1")
            .env("AWQUA_TEST_EXPECTED", expected)
            .env(name, value)
            .env("LD_LIBRARY_PATH", library));
    };
    // No driver at all, on machines that have none.
    if devices().is_empty() {
        child(std::path::Path::new("/nonexistent"), "none", "AWQUA", "");
    }
    let Some(folder) = folder() else { return };
    child(&folder, "some", "AWQUA", "");
    child(&folder, "none", "AWQUA_MACHINE_DRIVER", "11080");
    child(&folder, "none", "AWQUA_MACHINE_BROKEN", "cuInit");
    child(&folder, "none", "AWQUA_MACHINE_DEVICES", "0");
    child(&folder, "error", "AWQUA_MACHINE_CAPABILITY", "61");
    for function in [
        "cuDeviceGetCount",
        "cuDeviceGet",
        "cuDeviceGetName",
        "cuDeviceGetAttribute",
        "cuDevicePrimaryCtxRetain",
        "cuModuleLoadData",
        "cuMemAlloc_v2",
        "cuMemHostAlloc",
        "cuStreamCreateWithPriority",
    ] {
        child(&folder, "error", "AWQUA_MACHINE_BROKEN", function);
    }
    // A library of that name that is no driver.
    let empty = folder.join("empty");
    std::fs::create_dir_all(&empty).expect("a folder");
    std::fs::write(empty.join("empty.c"), "int nothing;").expect("a file");
    run(Command::new("gcc").args(["-shared", "-fPIC", "-o"]).arg(empty.join("libcuda.so")).arg(empty.join("empty.c")));
    child(&empty, "none", "AWQUA", "");
}
