//! The wgpu backend against a naive interpretation of the same program, on every adapter and kernel variant.
#![cfg(feature = "wgpu")]

use std::sync::Arc;

use awqua::ErrorKind;
use awqua::backend::wgpu::{DeviceChoice, WgpuBackend, WgpuOptions, adapters};
use awqua::backend::{
    AttentionShape, Backend, KvType, LogitsRows, Program, ROW_STEP, Runner, RunnerConfig, Step, WeightId, kv_bytes,
};
use awqua::session::sampler::{SampleRequest, Sampling};
use awqua::tensor::{DenseMatrix, W4Matrix, Weight};
use awqua_tests::constraints;
use awqua_tests::decoder::{
    CONTEXT, Case, MAX_TOKENS, Model, Rng, STEPS, Style, build, cases, config, cuda_cases, error, rope_rows, tokens,
    write_rope,
};
use awqua_tests::oracle::{Dequantised, Oracle};
use awqua_tests::runners;

/// Every other weight arrives in pieces.
fn upload(options: &WgpuOptions, model: &Model) -> Arc<WgpuBackend> {
    let mut backend = WgpuBackend::open(options).expect("the adapter opens");
    for (i, weight) in model.weights.iter().enumerate() {
        let name = format!("weight {i}");
        let stack = model.stacks.iter().find(|(first, count)| (*first..first + count).contains(&(i as u32)));
        let id = if i % 2 == 0 && stack.is_none() {
            backend.upload(&name, weight.clone()).expect("the weight fits")
        } else {
            let shape = weight.shape();
            let id = match stack {
                Some(&(first, count)) => backend.reserve_in_stack(&name, &shape, i - first as usize, count as usize),
                None => backend.reserve(&name, &shape),
            };
            let id = id.expect("the weight fits");
            let rows = weight.shape().rows();
            for first in (0..rows).step_by(ROW_STEP) {
                let part = cut(weight, first..rows.min(first + ROW_STEP));
                backend.fill(id, part).expect("the rows fit");
            }
            id
        };
        assert_eq!(id, WeightId(i as u32));
        let refused = backend.fill(id, cut(weight, 0..1)).expect_err("the weight is full");
        assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    }
    while !backend.upload_is_settled().expect("the device works") {
        backend.wait().expect("the device works");
    }
    Arc::new(backend)
}

fn cut(weight: &Weight, rows: std::ops::Range<usize>) -> Weight {
    match weight {
        Weight::W4(m) => Weight::W4(W4Matrix {
            n: rows.len(),
            qweight: m.qweight[rows.start * m.k / 8..rows.end * m.k / 8].to_vec(),
            group_params: m.group_params[rows.start * m.groups()..rows.end * m.groups()].to_vec(),
            ..*m
        }),
        Weight::Dense(m) => {
            let bytes =
                m.bytes.slice(rows.start * m.row_bytes()..rows.end * m.row_bytes()).expect("rows of the matrix");
            Weight::Dense(DenseMatrix { n: rows.len(), bytes, ..*m })
        }
        Weight::Vector(v) => Weight::Vector(v[rows].to_vec()),
        Weight::Packed(_) | Weight::Blocks(_) | Weight::Order(_) => panic!("no case has such a weight"),
    }
}

fn runner(options: &WgpuOptions, model: &Model, kv: KvType) -> (Arc<WgpuBackend>, Box<dyn Runner>) {
    let backend = upload(options, model);
    let max_logits_rows = if options.limit_binding.is_some() { 1 } else { MAX_TOKENS };
    let config = RunnerConfig { max_logits_rows, kv_type: Some(kv), ..config() };
    let mut runner = backend.clone().runner(&model.program, &config).expect("the runner fits");
    write_rope(&mut *runner, &model.program);
    (backend, runner)
}

/// Every adapter under every variant; prints a skip where there is none.
fn options() -> Vec<WgpuOptions> {
    let adapters: Vec<_> = adapters().into_iter().filter(|a| a.unusable.is_none()).collect();
    if adapters.is_empty() {
        assert!(std::env::var_os("AWQUA_REQUIRE_GPU").is_none_or(|v| v != "1"), "AWQUA_REQUIRE_GPU=1 and no adapter");
        skip("no usable GPU adapter");
    }
    let mut all = Vec::new();
    for adapter in adapters {
        for (force_f32, force_no_subgroup) in [(false, false), (true, false), (false, true), (true, true)] {
            if (force_f32 || adapter.f16) && (force_no_subgroup || adapter.subgroup.is_some()) {
                let device = DeviceChoice::Named(adapter.index.to_string());
                // Some variants with the kernel for several rows at once, the others without.
                let rows_on_software = force_f32 != force_no_subgroup;
                all.push(WgpuOptions { device, force_f32, force_no_subgroup, rows_on_software, ..Default::default() });
            }
        }
    }
    all
}

#[expect(clippy::print_stderr, reason = "a skipped test has to be visible")]
fn skip(reason: &str) {
    eprintln!("SKIPPED: {reason}");
}

fn compare(case: &Case, options: &WgpuOptions) {
    let model = build(case);
    let (backend, mut runner) = runner(options, &model, case.kv);
    assert_eq!(runner.kv_type(), case.kv);
    assert!(runner.bytes() > 0 && backend.info().weight_bytes > 0);
    let mut oracle = Oracle::new(&model.program, &model.weights, CONTEXT as usize, case.kv, Dequantised::Exact);
    for table in 0..case.rope_tables {
        oracle.write_rope(table as usize, 0, &rope_rows(table, case.shape.rotary_dim / 2));
    }
    // Single precision differs by the order of sums, and a half precision cache can round an element to the other
    // neighbour; half precision products carry 11 bits. In 8 bits a neighbour is a 127th of the largest of its group away,
    // and each such element moves the logits by some thousandths of the largest.
    let tolerance = match (options.force_f32, case.kv) {
        (true, KvType::F32) => 1e-5,
        (true, KvType::F16) => 5e-4,
        (_, KvType::Q8) => 3e-2,
        (false, _) => 1e-2,
    };
    let mut rng = Rng(77);
    let mut logits = Vec::new();
    for &(n, position, rows) in STEPS {
        let tokens = tokens(&mut rng, n, case.vocab);
        // One row of logits is all that fits small bindings.
        let rows = if options.limit_binding.is_some() && n > 1 { LogitsRows::Last } else { rows };
        let expected = oracle.run(&tokens, position as usize, rows);
        runner.run(&Step { tokens: &tokens, position, logits: rows }).expect("the step runs");
        runner.read_logits(&mut logits).expect("the logits come back");
        let mut error = if expected.is_empty() { logits.len() as f32 } else { error(&logits, &expected) };
        // Half precision can prefer the other one of two experts that are nearly equal: few rows may be off.
        if error > tolerance && matches!(case.style, Style::Experts(_)) && !options.force_f32 {
            let rows = logits.chunks(case.vocab).zip(expected.chunks(case.vocab));
            let mut errors: Vec<f32> = rows.map(|(found, expected)| self::error(found, expected)).collect();
            errors.sort_by(f32::total_cmp);
            error = errors[errors.len() * 9 / 10];
        }
        let info = backend.info();
        assert!(
            error <= tolerance,
            "{} on {} ({}), {n} tokens at {position}: error {error} above {tolerance}",
            case.name,
            info.device,
            info.variant
        );
    }
}

#[test]
fn programs_match_the_naive_interpretation() {
    for options in options() {
        for case in cases() {
            compare(&case, &options);
        }
    }
}

#[test]
fn weights_split_over_bindings_match() {
    for options in options() {
        for case in cases() {
            // The embedding and the head take several times the limit, activations and caches just fit it.
            let case = Case { vocab: 6007, ..case };
            compare(&case, &WgpuOptions { limit_binding: Some(96 << 10), ..options.clone() });
        }
    }
}

/// Cases of 8 bits: heads of one and of several words of scales, those that a product can bring to the cache itself and
/// others, one query head for each of keys and several.
fn q8_cases() -> Vec<Case> {
    let mut all = cuda_cases();
    let is_plain = |case: &&Case| case.shape.head_dim == 64 && !matches!(case.style, Style::Experts(_));
    let one = all.iter().find(is_plain).expect("there is one").clone();
    let shape = |head_dim| AttentionShape { heads: 3, kv_heads: 3, head_dim, rotary_dim: head_dim };
    all.push(Case { name: "heads of 64 of their own", shape: shape(64), ..one.clone() });
    all.push(Case { name: "heads of 128 of their own", shape: shape(128), ..one.clone() });
    all.push(Case { name: "heads of 256 of their own", shape: shape(256), ..one });
    all.extend(cases().into_iter().filter(|case| matches!(case.style, Style::Experts(_))));
    all.retain(|case| case.shape.head_dim.is_multiple_of(4));
    all.into_iter().map(|case| Case { kv: KvType::Q8, ..case }).collect()
}

#[test]
fn caches_of_8_bits_match_the_naive_interpretation() {
    for options in options() {
        for case in q8_cases() {
            compare(&case, &options);
            // Small bindings beside the kernels that run everywhere; activations have to fit them, which those of many
            // experts do not.
            let portable = options.force_f32 && options.force_no_subgroup && !matches!(case.style, Style::Experts(_));
            if portable && (case.shape.heads + 2 * case.shape.kv_heads) * case.shape.head_dim <= 600 {
                let limit_binding = Some(96 << 10);
                compare(&Case { vocab: 6007, ..case }, &WgpuOptions { limit_binding, ..options.clone() });
            }
        }
    }
}

#[test]
fn caches_of_8_bits_need_whole_words() {
    let Some(options) = options().into_iter().next() else { return };
    let case = cases().into_iter().find(|case| !case.shape.head_dim.is_multiple_of(4)).expect("such a case");
    let model = build(&case);
    let config = RunnerConfig { kv_type: Some(KvType::Q8), ..config() };
    let refused = upload(&options, &model).runner(&model.program, &config).err().expect("it is refused");
    assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
}

/// The CPU's cache, of 8 bits or half precision, brought here, gives the CPU's logits, and comes back as it was; a context that
/// is no multiple of four positions.
#[test]
fn caches_move_between_backends() {
    let cases = q8_cases().into_iter().filter(|case| !matches!(case.style, Style::Experts(_)));
    let cases: Vec<_> = cases.enumerate().map(|(i, case)| (case, [KvType::Q8, KvType::F16][i % 2])).collect();
    for options in options() {
        for (case, kv) in &cases {
            let (model, kv) = (build(case), *kv);
            let config = RunnerConfig { kv_type: Some(kv), context: 93, ..config() };
            let mut cpu = awqua::backend::cpu::open();
            let mut gpu = upload(&options, &model).runner(&model.program, &config).expect("the runner fits");
            for (i, weight) in model.weights.iter().enumerate() {
                cpu.upload(&format!("weight {i}"), weight.clone()).expect("the weight fits");
            }
            let cpu: Arc<dyn Backend> = cpu.into();
            let mut cpu = cpu.runner(&model.program, &config).expect("the runner fits");
            for runner in [&mut cpu, &mut gpu] {
                for table in 0..model.program.rope_tables {
                    let rows = &rope_rows(table, case.shape.rotary_dim / 2)[..93 * case.shape.rotary_dim as usize];
                    runner.write_rope(table, 0, rows).expect("rows fit");
                }
            }
            let mut rng = Rng(case.vocab as u64);
            let prompt = tokens(&mut rng, 37, case.vocab);
            cpu.run(&Step { tokens: &prompt, position: 0, logits: LogitsRows::None }).expect("the step runs");
            for n in [1, 37] {
                let mut saved = vec![0xa5; kv_bytes(&model.program, kv, n) as usize];
                cpu.save_kv(n, &mut saved).expect("it is saved");
                gpu.load_kv(n, &saved).expect("it is taken");
                let mut again = vec![0x5a; saved.len()];
                gpu.save_kv(n, &mut again).expect("it is saved");
                assert!(saved == again, "{}, {n} positions", case.name);
            }
            let next = tokens(&mut rng, 1, case.vocab);
            let step = Step { tokens: &next, position: 37, logits: LogitsRows::Last };
            let (mut expected, mut found) = (Vec::new(), Vec::new());
            cpu.run(&step).expect("the step runs");
            gpu.run(&step).expect("the step runs");
            cpu.read_logits(&mut expected).expect("the logits come back");
            gpu.read_logits(&mut found).expect("the logits come back");
            let cached = |runner: &mut dyn Runner| {
                let mut saved = vec![0; kv_bytes(&model.program, kv, 38) as usize];
                runner.save_kv(38, &mut saved).expect("it is saved");
                saved
            };
            // Of the last position, which is rounded here: codes that became their neighbours, and bytes of scales.
            let differ = cached(&mut *cpu).iter().zip(&cached(&mut *gpu)).filter(|(a, b)| a != b).count();
            // The same cache differs by the order of sums, or by products of 11 bits; each code moves the logits by some
            // thousandths of the largest, and no more than if all did.
            let of_products = if options.force_f32 { 1e-5 } else { 1e-2 };
            let allowed = of_products + (differ as f32 * 4e-3).min(2e-2);
            let error = error(&found, &expected);
            assert!(error <= allowed, "{}: {error} above {allowed}, {differ} bytes differ", case.name);
        }
    }
}

/// GPUs take the rows of a short prompt at once, software where it is asked to, and nobody a single row.
#[test]
fn few_rows_go_through_packed_matrices_at_once() {
    let case = &cases()[0];
    let model = build(case);
    for options in options() {
        let DeviceChoice::Named(index) = &options.device else { panic!("adapters are named by their index") };
        let is_software = adapters().iter().any(|a| a.index.to_string() == *index && a.kind == "cpu");
        let (_, mut runner) = runner(&options, &model, case.kv);
        for n in [1, 5] {
            let tokens = tokens(&mut Rng(5), n, case.vocab);
            let times = match runner.profile(&Step { tokens: &tokens, position: 0, logits: LogitsRows::Last }) {
                Err(refused) if refused.kind() == ErrorKind::Unsupported => return skip("the device has no clock"),
                times => times.expect("the step is timed"),
            };
            let at_once = times.iter().any(|op| op.name.contains("gemv_w4_rows"));
            assert_eq!(at_once, n > 1 && (!is_software || options.rows_on_software), "{n} rows, {options:?}");
        }
    }
}

#[test]
fn steps_split_over_submissions_match() {
    for options in options() {
        compare(&cases()[0], &WgpuOptions { submission_flops: Some(1000), ..options.clone() });
    }
}

#[test]
fn tokens_are_picked_as_on_the_cpu() {
    let case = Case { vocab: 5003, ..cases().swap_remove(0) };
    let model = build(&case);
    for options in options() {
        let (_, mut runner) = runner(&options, &model, case.kv);
        runners::check_choices(&mut *runner, case.vocab, &[0.0, 0.111, 0.333, 0.5, 0.777, 0.95, 0.999]);
    }
}

/// Over vocabularies that end within a word of a mask.
#[test]
fn constrained_tokens_are_picked_as_on_the_cpu() {
    let mut rng = Rng(21);
    // All variants pick with the same kernels.
    let Some(options) = options().into_iter().next() else { return };
    for vocab in [31, 96, 1025, 5003] {
        let case = Case { vocab, ..cases().swap_remove(0) };
        let (_, mut runner) = runner(&options, &build(&case), case.kv);
        let mut row = Vec::new();
        runner.run(&Step { tokens: &[3, 1], position: 0, logits: LogitsRows::Last }).expect("the step runs");
        runner.read_logits(&mut row).expect("the logits come back");
        constraints::check(&mut *runner, &row, &mut rng, &[0.0, 0.313, 0.75, constraints::LARGEST]);
    }
}

#[test]
fn a_lost_device_is_an_error() {
    let model = build(&cases()[0]);
    for options in options() {
        let (backend, mut runner) = runner(&options, &model, KvType::F16);
        let step = Step { tokens: &[5], position: 0, logits: LogitsRows::Last };
        runner.run(&step).expect("the step runs");
        backend.destroy();
        let sampling = Sampling::greedy();
        let request = SampleRequest::new(&sampling);
        for _ in 0..2 {
            let lost = |kind| assert_eq!(kind, ErrorKind::DeviceLost);
            lost(runner.run(&step).expect_err("the device is gone").kind());
            lost(runner.read_logits(&mut Vec::new()).expect_err("the device is gone").kind());
            lost(runner.sample(&request).expect_err("the device is gone").kind());
            lost(runner.write_rope(0, 0, &rope_rows(0, 8)).expect_err("the device is gone").kind());
            let another = backend.clone().runner(&model.program, &config());
            lost(another.err().expect("the device is gone").kind());
        }
        let mut backend = WgpuBackend::open(&options).expect("the adapter opens again");
        backend.destroy();
        let upload = backend.upload("weight", model.weights[0].clone());
        assert_eq!(upload.expect_err("the device is gone").kind(), ErrorKind::DeviceLost);
    }
}

#[test]
fn absurd_capacities_are_refused() {
    let model = build(&cases()[0]);
    let Some(options) = options().pop() else { return };
    let backend = upload(&options, &model);
    let layers = Arc::new(Program { layers: 1_000_000, ..(*model.program).clone() });
    let with = |change: fn(&mut RunnerConfig)| {
        let mut config = config();
        change(&mut config);
        config
    };
    for (program, config) in [
        (&model.program, with(|c| c.context = u32::MAX)),
        (&model.program, with(|c| c.context = 100_000_000)),
        (&model.program, with(|c| c.max_logits_rows = u32::MAX)),
        (&layers, with(|c| c.context = 1_000_000)),
    ] {
        // Only running into the limit tells a device's free memory, and the other tests need some of it.
        if Arc::ptr_eq(program, &layers) && adapters()[0].kind == "discrete" {
            continue;
        }
        let refused = backend.clone().runner(program, &config).err().expect("it can not fit");
        assert_eq!(refused.kind(), ErrorKind::OutOfMemory, "{refused}");
        assert!(refused.message().contains("bytes"), "{refused}");
    }
    let too_many = with(|c| c.max_tokens = 100_000);
    let refused = backend.clone().runner(&model.program, &too_many).err().expect("too many rows for a dispatch");
    assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    // The device still works.
    let mut runner = backend.runner(&model.program, &config()).expect("the runner fits");
    runner.run(&Step { tokens: &[1], position: 0, logits: LogitsRows::Last }).expect("the step runs");
}

#[test]
fn bad_steps_are_refused() {
    let model = build(&cases()[0]);
    let Some(options) = options().pop() else { return };
    let (_, mut runner) = runner(&options, &model, KvType::F16);
    runners::check_refusals(&mut *runner, &model.program, 16);
}

#[test]
fn an_unknown_adapter_is_no_device() {
    let options = WgpuOptions { device: DeviceChoice::Named("no such adapter".into()), ..WgpuOptions::default() };
    assert_eq!(WgpuBackend::open(&options).err().expect("there is none").kind(), ErrorKind::NoDevice);
}

/// Runs this test again in a process whose Vulkan loader finds no driver.
#[test]
#[cfg(target_os = "linux")]
fn a_missing_driver_is_no_device() {
    const CHILD: &str = "AWQUA_TEST_WITHOUT_DRIVER";
    if std::env::var_os(CHILD).is_some() {
        assert_eq!(adapters(), []);
        let refused = WgpuBackend::open(&WgpuOptions::default()).err().expect("there is none");
        assert_eq!(refused.kind(), ErrorKind::NoDevice);
        return;
    }
    let this = std::env::current_exe().expect("a test has a path");
    let output = std::process::Command::new(this)
        .args(["--exact", "a_missing_driver_is_no_device"])
        .env(CHILD, "1")
        .env("VK_DRIVER_FILES", "/nonexistent.json")
        .env("VK_ICD_FILENAMES", "/nonexistent.json")
        .output()
        .expect("the test starts again");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
