//! Small decoders of every architecture whose weights come from a seed, against the logits Transformers computed.
//!
//! `tests/archs/generate.py` makes the cases and says how. Each runs on the CPU whole, in small chunks, token by token
//! and with a continuation; the GPU adapters run some of every architecture. `AWQUA_ARCH_CASES=DIR` takes the cases from a
//! folder instead and runs all of them everywhere: that is how a sweep over random configurations is run by hand.

#![allow(clippy::print_stdout, reason = "how close the numbers are is part of a test's output")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use awqua::backend::KvType;
use awqua::{BackendChoice, CancelToken, GenerateOptions, LoadOptions, Model, Sampling, Session, SessionOptions};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

/// Greedy choices closer than this can go either way within rounding, so they prove nothing.
const DECIDED: f64 = 1e-3;

struct Case {
    name: String,
    data: Value,
    /// The checkpoint, written to a temporary folder.
    folder: PathBuf,
}

impl Drop for Case {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// 64-bit number `i` of a seed, as in `generate.py`.
fn number(seed: u64, i: u64) -> u64 {
    let mut z = seed.wrapping_add(i).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The bytes of a tensor of a case: name, type, shape, seed, exponent, center.
fn tensor(entry: &Value) -> (String, Dtype, Vec<usize>, Vec<u8>) {
    let shape: Vec<usize> = entry[2].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect();
    let (seed, exponent) = (entry[3].as_u64().unwrap(), entry[4].as_i64().unwrap() as i32);
    let center = entry[5].as_f64().unwrap() as f32;
    let n: usize = shape.iter().product();
    let uniform = |i: usize| {
        let bits = (number(seed, i as u64) >> 56) as f32;
        (bits - 128.0) * 2.0f32.powi(exponent - 7) + center
    };
    let (dtype, bytes) = match entry[1].as_str().unwrap() {
        "F32" => (Dtype::F32, (0..n).flat_map(|i| uniform(i).to_le_bytes()).collect()),
        "BF16" => (Dtype::BF16, (0..n).flat_map(|i| half::bf16::from_f32(uniform(i)).to_le_bytes()).collect()),
        "F16" => {
            let scale = |i: usize| {
                let bits = (number(seed, i as u64) >> 54) as f32;
                half::f16::from_f32((bits + 1024.0) * 2.0f32.powi(exponent - 10))
            };
            (Dtype::F16, (0..n).flat_map(|i| scale(i).to_le_bytes()).collect())
        }
        "I32" => (Dtype::I32, (0..n).flat_map(|i| ((number(seed, i as u64) >> 32) as u32).to_le_bytes()).collect()),
        other => panic!("type {other}"),
    };
    (entry[0].as_str().unwrap().to_owned(), dtype, shape, bytes)
}

/// The cases, their checkpoints written for `test`.
fn cases(test: &str) -> Vec<Case> {
    let folder = std::env::var_os("AWQUA_ARCH_CASES").map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/archs"));
    let mut paths: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let cases = paths.into_iter().filter(|path| path.extension().is_some_and(|e| e == "json")).map(|path| {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let data: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let folder = std::env::temp_dir().join(format!("awqua-archs-{}-{test}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("config.json"), data["config"].to_string()).unwrap();
        let tensors: Vec<_> = data["tensors"].as_array().unwrap().iter().map(tensor).collect();
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
        safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
        Case { name, data, folder }
    });
    cases.collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

/// Largest difference as a share of the largest expected logit.
fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().all(|v| v.is_finite()));
    let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    found.iter().zip(expected).fold(0.0f32, |m, (f, e)| m.max((f - e).abs())) / scale
}

/// Largest difference of the last logits over all prompts.
fn worst(model: &Arc<Model>, case: &Case, options: &SessionOptions) -> f32 {
    let mut session = Session::new(model, options).unwrap();
    let mut worst = 0.0f32;
    for prompt in case.data["prompts"].as_array().unwrap() {
        session.reset();
        session.set_prompt(&ids(&prompt["ids"]), &CancelToken::default()).unwrap();
        worst = worst.max(difference(session.logits().unwrap(), &floats(&prompt["last_logits"])));
    }
    worst
}

#[test]
fn cpu_logits_match_transformers() {
    let options = LoadOptions { backend: BackendChoice::Cpu, ..Default::default() };
    let mut failures = Vec::new();
    for case in cases("cpu") {
        let model = match Model::open(&case.folder, &options) {
            Ok(model) => model,
            Err(error) => {
                failures.push(format!("{}: {error}", case.name));
                continue;
            }
        };
        // As one step, in chunks that divide nothing, and token by token.
        for chunk in [Some(128), Some(7), Some(1)] {
            let session = SessionOptions {
                context: Some(128),
                kv_type: Some(KvType::F32),
                chunk,
                exact: true,
                ..Default::default()
            };
            let worst = worst(&model, &case, &session);
            println!("{} cpu chunk {chunk:?}: {worst:.1e}", case.name);
            if worst > 1e-3 {
                failures.push(format!("{} chunk {chunk:?}: {worst:e}", case.name));
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn cpu_greedy_tokens_match_transformers() {
    let options = LoadOptions { backend: BackendChoice::Cpu, ..Default::default() };
    let (mut compared, mut failures) = (0, Vec::new());
    for case in cases("greedy") {
        let Ok(model) = Model::open(&case.folder, &options) else { continue };
        let session = SessionOptions { context: Some(128), exact: true, ..Default::default() };
        let mut session = Session::new(&model, &session).unwrap();
        for greedy in case.data["greedy"].as_array().unwrap() {
            if greedy["min_gap"].as_f64().unwrap() <= DECIDED {
                continue;
            }
            let expected = ids(&greedy["new"]);
            let generate = GenerateOptions {
                max_tokens: expected.len(),
                sampling: Sampling::greedy(),
                ignore_eos: true,
                ..Default::default()
            };
            let found = session
                .generate(&ids(&greedy["ids"]), &generate, &mut |_| std::ops::ControlFlow::Continue(()))
                .unwrap();
            if found.ids != expected {
                failures.push(format!("{}: {:?} instead of {expected:?}", case.name, found.ids));
            }
            compared += 1;
        }
    }
    assert!(compared > 0 && failures.is_empty(), "{} of {compared} differ:\n{}", failures.len(), failures.join("\n"));
}

/// What a session reuses, shifts or computes again must be what a new session computes.
#[test]
fn sessions_agree_with_new_ones() {
    let options = LoadOptions { backend: BackendChoice::Cpu, ..Default::default() };
    let none = CancelToken::default();
    for case in cases("sessions") {
        let Ok(model) = Model::open(&case.folder, &options) else { continue };
        let session = |context| {
            let options = SessionOptions { context: Some(context), chunk: Some(13), ..Default::default() };
            Session::new(&model, &options).unwrap()
        };
        let agrees = |used: &mut Session, ids: &[u32], what: &str| {
            used.set_prompt(ids, &none).unwrap();
            let mut fresh = session(128);
            fresh.set_prompt(ids, &none).unwrap();
            let difference = difference(used.logits().unwrap(), fresh.logits().unwrap());
            assert!(difference < 1e-4, "{}: {what}: {difference:e}", case.name);
        };
        let prompts: Vec<_> = case.data["prompts"].as_array().unwrap().iter().map(|p| ids(&p["ids"])).collect();
        let longest = prompts.iter().max_by_key(|ids| ids.len()).unwrap();
        let mut used = session(128);
        // From long to short and back, over every length at which a rotation may change, with shared beginnings.
        for end in [longest.len(), 5, 30, 18, 70, 17, 16, longest.len() - 1] {
            agrees(&mut used, &longest[..end.min(longest.len())], "a shared beginning");
        }

        // With dynamic scaling cached keys keep their rotation, as in Transformers, so a new session differs.
        if case.data["config"].to_string().contains("dynamic") {
            continue;
        }
        used.truncate(9);
        used.append(&longest[9..40], &none).unwrap();
        let tokens = used.tokens().to_vec();
        agrees(&mut used, &tokens, "after appending");
        let mut used = session(32);
        let generate = GenerateOptions {
            max_tokens: 40,
            sampling: Sampling::greedy(),
            ignore_eos: true,
            shift: Some(awqua::session::ContextShift { keep: 4 }),
            ..Default::default()
        };
        used.generate(&longest[..20], &generate, &mut |_| std::ops::ControlFlow::Continue(())).unwrap();
        let tokens = used.tokens().to_vec();
        assert!(tokens.len() <= 32, "{}", case.name);
        agrees(&mut used, &tokens, "after a shift");
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn gpu_logits_match_transformers() {
    let adapters = awqua::backend::wgpu::adapters();
    if adapters.is_empty() {
        assert!(std::env::var_os("AWQUA_REQUIRE_GPU").is_none(), "AWQUA_REQUIRE_GPU is set and there is no adapter");
        println!("skipped: no GPU adapter");
        return;
    }
    let mut failures = Vec::new();
    for adapter in adapters {
        for portable_kernels in [false, true] {
            let options = LoadOptions {
                backend: BackendChoice::Wgpu,
                device: Some(adapter.name.clone()),
                portable_kernels,
                ..Default::default()
            };
            // Opening a device and compiling kernels for each takes long: the packed cases in half precision, and dense
            // ones in single precision.
            let some = if portable_kernels { "-0" } else { "-2" };
            let sweep = std::env::var_os("AWQUA_ARCH_CASES").is_some();
            for case in cases("gpu").into_iter().filter(|case| sweep || case.name.ends_with(some)) {
                let model = match Model::open(&case.folder, &options) {
                    Ok(model) => model,
                    Err(error) => {
                        failures.push(format!("{}: {error}", case.name));
                        continue;
                    }
                };
                for chunk in [Some(128), Some(3)] {
                    let session = SessionOptions { context: Some(128), chunk, ..Default::default() };
                    let worst = worst(&model, &case, &session);
                    println!("{} {} portable {portable_kernels} chunk {chunk:?}: {worst:.1e}", case.name, adapter.name);
                    if worst > 1e-2 {
                        failures.push(format!("{} portable {portable_kernels} chunk {chunk:?}: {worst:e}", case.name));
                    }
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}
