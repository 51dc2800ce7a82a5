//! Checkpoints written by other people's software, against the numbers that software computed.
//!
//! Every prompt's last-position logits on the CPU and on every GPU adapter in each variant, and 32 greedy tokens on
//! the CPU. `reference/reference.json` in each folder holds the numbers and says how they were made.

#![allow(clippy::print_stdout, reason = "what is skipped and how close the numbers are is part of a test's output")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use awqua::backend::KvType;
use awqua::{BackendChoice, CancelToken, GenerateOptions, LoadOptions, Model, Sampling, Session, SessionOptions};
use serde_json::Value;

const ARCHS: &[&str] = &[
    "gemma2",
    "gemma3-text",
    "granite",
    "llama-dynamic",
    "llama-linear",
    "llama-llama3rope",
    "llama-llama3rope-awq-gemm-g64",
    "llama-llama3rope-ct-asym-g32",
    "llama-tied-mha",
    "llama-yarn",
    "mistral",
    "mistral-awq-gemm-g64",
    "mistral-ct-asym-g32",
    "mixtral",
    "olmo2",
    "phi3",
    "phi3-longrope",
    "qwen2",
    "qwen2-awq-gemm-g64",
    "qwen2-ct-asym-g32",
    "qwen2-moe",
    "qwen2-window",
    "qwen3",
    "qwen3-awq-gemm-g64",
    "qwen3-ct-asym-g32",
    "qwen3-moe",
    "smollm3",
    "stablelm",
];

/// Greedy choices closer than this can go either way within rounding, so they prove nothing.
const DECIDED: f64 = 1e-3;

fn folders() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let entries = std::fs::read_dir(root.join("formats")).unwrap();
    let mut formats: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    formats.sort();
    formats.into_iter().chain(ARCHS.iter().map(|name| root.join("arch").join(name))).collect()
}

/// What to open of a folder: itself, or the one file that its reference names.
fn path(folder: &Path, reference: &Value) -> PathBuf {
    reference["file"].as_str().map_or_else(|| folder.to_path_buf(), |file| folder.join(file))
}

fn open(folder: &Path, reference: &Value, options: &LoadOptions) -> Arc<Model> {
    let path = path(folder, reference);
    Model::open(&path, options).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn reference(folder: &Path) -> Value {
    let path = folder.join("reference/reference.json");
    serde_json::from_slice(&std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

/// Largest difference of last-position logits over all prompts, as a share of the largest logit.
fn worst_logits(model: &Arc<Model>, reference: &Value, options: &SessionOptions) -> f32 {
    let mut session = Session::new(model, options).unwrap();
    let mut worst = 0.0f32;
    for prompt in reference["prompts"].as_array().unwrap() {
        session.reset();
        session.set_prompt(&ids(&prompt["input_ids"]), &CancelToken::default()).unwrap();
        let expected: Vec<f32> =
            prompt["last_logits"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
        let found = session.logits().unwrap();
        assert_eq!(found.len(), expected.len());
        let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        for (f, e) in found.iter().zip(&expected) {
            assert!(f.is_finite());
            worst = worst.max((f - e).abs() / scale);
        }
    }
    worst
}

#[test]
fn cpu_logits_match_the_peer() {
    let options = LoadOptions { backend: BackendChoice::Cpu, ..Default::default() };
    for folder in folders() {
        let reference = reference(&folder);
        let model = open(&folder, &reference, &options);
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        // A chunk that divides no prompt, and whole prompts, must give the same.
        for (kv_type, chunk, exact, bound) in [
            (KvType::F32, None, true, 2e-3),
            (KvType::F32, Some(7), true, 2e-3),
            (KvType::F16, None, true, 5e-3),
            (KvType::Q8, None, true, 5e-2),
            (KvType::F32, None, false, 5e-3),
        ] {
            let session =
                SessionOptions { kv_type: Some(kv_type), chunk, exact, threads: Some(2), ..Default::default() };
            let worst = worst_logits(&model, &reference, &session);
            println!("{name} cpu {kv_type:?} chunk {chunk:?} exact {exact}: {worst:.1e}");
            assert!(worst <= bound, "{name} {kv_type:?} chunk {chunk:?} exact {exact}: {worst:e}");
        }
    }
}

#[test]
fn cpu_greedy_tokens_match_the_peer() {
    let options = LoadOptions { backend: BackendChoice::Cpu, ..Default::default() };
    let mut compared = 0;
    for folder in folders() {
        let reference = reference(&folder);
        let model = open(&folder, &reference, &options);
        let mut session =
            Session::new(&model, &SessionOptions { threads: Some(2), exact: true, ..Default::default() }).unwrap();
        for prompt in reference["prompts"].as_array().unwrap() {
            if prompt["greedy32_min_gap"].as_f64().unwrap() <= DECIDED {
                continue;
            }
            let generate = GenerateOptions {
                max_tokens: 32,
                sampling: Sampling::greedy(),
                ignore_eos: true,
                ..Default::default()
            };
            let found = session
                .generate(&ids(&prompt["input_ids"]), &generate, &mut |_| std::ops::ControlFlow::Continue(()))
                .unwrap();
            assert_eq!(found.ids, ids(&prompt["greedy32_ids"]), "{}", folder.display());
            compared += 1;
        }
    }
    assert!(compared > 2 * folders().len(), "only {compared} prompts were decided");
}

#[test]
fn cpu_likelihoods_match_the_peer() {
    let options = LoadOptions { backend: BackendChoice::Cpu, ..Default::default() };
    for folder in folders() {
        let reference = reference(&folder);
        let model = open(&folder, &reference, &options);
        let ids = ids(&reference["nll"]["input_ids"]);
        let mut session = Session::new(
            &model,
            &SessionOptions { threads: Some(2), context: Some(ids.len() as u32), exact: true, ..Default::default() },
        )
        .unwrap();
        let mut nll = 0.0;
        session
            .score(&ids, &CancelToken::default(), &mut |position, logits| {
                if let Some(&next) = ids.get(position + 1) {
                    let max = logits.iter().fold(f32::NEG_INFINITY, |m, &l| m.max(l));
                    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
                    nll += sum.ln() - f64::from(logits[next as usize] - max);
                }
            })
            .unwrap();
        let found = nll / (ids.len() - 1) as f64;
        let expected = reference["nll"]["mean_nll"].as_f64().unwrap();
        assert!((found - expected).abs() < 1e-3, "{}: {found} != {expected}", folder.display());
    }
}

#[cfg(feature = "wgpu")]
fn gpu_logits_match(portable_kernels: bool) {
    let adapters = awqua::backend::wgpu::adapters();
    if adapters.is_empty() {
        assert!(std::env::var_os("AWQUA_REQUIRE_GPU").is_none(), "AWQUA_REQUIRE_GPU is set and there is no adapter");
        println!("skipped: no GPU adapter");
        return;
    }
    for adapter in adapters {
        let options = LoadOptions {
            backend: BackendChoice::Wgpu,
            device: Some(adapter.name.clone()),
            portable_kernels,
            ..Default::default()
        };
        for folder in folders() {
            let reference = reference(&folder);
            let model = open(&folder, &reference, &options);
            let name = folder.file_name().unwrap().to_string_lossy().into_owned();
            // 8 bits lose what they lose on the CPU, besides half precision.
            for (kv_type, bound) in [(KvType::F16, 1e-2), (KvType::Q8, 5e-2 + 1e-2)] {
                let session = SessionOptions { kv_type: Some(kv_type), ..Default::default() };
                let worst = worst_logits(&model, &reference, &session);
                println!("{name} {} portable {portable_kernels} {kv_type:?}: {worst:.1e}", adapter.name);
                assert!(
                    worst <= bound,
                    "{name} on {} portable {portable_kernels} {kv_type:?}: {worst:e}",
                    adapter.name
                );
            }
        }
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn gpu_logits_match_the_peer() {
    gpu_logits_match(false);
}

// Apart from the others, so that a software GPU, which leaves all but one core idle, does both at a time.
#[cfg(feature = "wgpu")]
#[test]
fn portable_gpu_logits_match_the_peer() {
    gpu_logits_match(true);
}

#[cfg(all(feature = "cuda", target_os = "linux", target_arch = "x86_64"))]
mod machine;

#[cfg(all(feature = "cuda", target_os = "linux", target_arch = "x86_64"))]
#[test]
fn cuda_logits_match_the_peer() {
    if !machine::is_on_machine("cuda_logits_match_the_peer", &machine::ALL_CAPABILITIES[..1]) {
        return;
    }
    let options = LoadOptions { backend: BackendChoice::Cuda, ..Default::default() };
    let mut computed = 0;
    for folder in folders() {
        let session = SessionOptions { context: Some(256), ..Default::default() };
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let reference = reference(&folder);
        let path = path(&folder, &reference);
        let model = match Model::open(&path, &options) {
            Ok(model) => model,
            Err(refused) => {
                assert_eq!(refused.kind(), awqua::ErrorKind::Unsupported, "{name}: {refused}");
                assert!(!ARCHS.contains(&name.as_str()), "{name}: {refused}");
                println!("{name}: {refused}");
                // Another backend takes it without being asked.
                let any = Model::open(&path, &LoadOptions::default()).unwrap();
                assert_ne!(any.backend_info().backend, "cuda", "{name}");
                continue;
            }
        };
        computed += 1;
        let worst = worst_logits(&model, &reference, &session);
        println!("{name} {}: {worst:.1e}", model.backend_info().device);
        assert!(worst <= 1e-2, "{name}: {worst:e}");
    }
    assert!(computed >= 10, "{computed} models were computed");
}
