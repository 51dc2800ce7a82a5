//! Tuning: candidates are checked and measured, and what is found is used where it fits and ignored elsewhere.
#![cfg(feature = "wgpu")]
#![expect(clippy::print_stderr, reason = "a skipped test has to be visible")]

use std::sync::Arc;

use awqua::backend::wgpu::{self, Candidate, DeviceChoice, MatrixShape, WgpuOptions, adapters};
use awqua::{BackendChoice, Engine, GenerateOptions, Load, Model, Sampling, Session, SessionOptions};
use awqua::{EngineOptions, ErrorKind};
use std::ops::ControlFlow;
use std::path::Path;

/// The adapters that can be used; prints a skip where there is none.
fn usable() -> Vec<WgpuOptions> {
    let all: Vec<_> = adapters().into_iter().filter(|adapter| adapter.unusable.is_none()).collect();
    if all.is_empty() {
        assert!(std::env::var_os("AWQUA_REQUIRE_GPU").is_none_or(|v| v != "1"), "AWQUA_REQUIRE_GPU=1 and no adapter");
        eprintln!("SKIPPED: no usable GPU adapter");
    }
    let named = |index: usize| DeviceChoice::Named(index.to_string());
    all.iter().map(|adapter| WgpuOptions { device: named(adapter.index), ..Default::default() }).collect()
}

fn load(tuning: Option<Vec<u8>>, device: DeviceChoice) -> Arc<Model> {
    let options =
        EngineOptions { backend: BackendChoice::Wgpu, device, tuning: tuning.map(Arc::new), ..Default::default() };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/arch/llama-llama3rope-awq-gemm-g64");
    Load::path(&Engine::new(options), folder).run(&mut |_| ControlFlow::Continue(())).expect("the fixture loads")
}

fn answer(model: &Arc<Model>) -> Vec<u32> {
    let mut session = Session::new(model, &SessionOptions::default()).expect("a session");
    let options =
        GenerateOptions { max_tokens: 8, sampling: Sampling::greedy(), ignore_eos: true, ..Default::default() };
    session.generate(&[1, 5, 9], &options, &mut |_| ControlFlow::Continue(())).expect("an answer");
    session.tokens().to_vec()
}

#[test]
fn what_is_found_is_used_on_its_adapter_alone() {
    for options in usable() {
        let model = load(None, options.device.clone());
        let untuned = model.backend_info().variant;
        assert!(!untuned.contains("tun"), "{untuned}");
        let mut shapes = wgpu::shapes_of(&model).expect("the model is there");
        assert!(!shapes.is_empty());
        shapes.push(MatrixShape { n: 77, k: 640, group_size: 128 });
        shapes.push(MatrixShape { n: 34, k: 72, group_size: 24 });
        let mut products: Vec<Vec<Candidate>> = Vec::new();
        let tuned = wgpu::tune(&options, &shapes, None, &mut |candidates| products.push(candidates.to_vec()));
        let tuned = tuned.expect("the adapter is tuned");
        // One row with an output and with two an invocation, where the outputs are even in number, and several rows.
        let even = shapes.iter().filter(|shape| shape.n % 2 == 0).count();
        assert_eq!(products.len(), 2 * shapes.len() + even);
        for candidates in &products {
            assert!(candidates.iter().all(|candidate| candidate.seconds.as_ref().is_ok_and(|s| *s > 0.0)));
            let count = |is: fn(&Candidate) -> bool| candidates.iter().filter(|candidate| is(candidate)).count();
            assert_eq!((count(|c| c.is_usual), count(|c| c.is_chosen)), (1, 1), "{candidates:?}");
        }
        let text = String::from_utf8(tuned.saved.clone()).expect("it is text");
        assert_eq!(text.lines().filter(|line| line.starts_with("size ")).count(), products.len());

        let model_tuned = load(Some(tuned.saved.clone()), options.device.clone());
        assert!(model_tuned.backend_info().variant.ends_with("; tuned"), "{}", model_tuned.backend_info().variant);
        // Larger workgroups add up in another order: greedy choices that are not close stay.
        assert_eq!(answer(&model_tuned)[..4], answer(&model)[..4]);

        // Another driver's is not taken, and what is none of ours is told of.
        let other = text.replace(" / ", " / another ").into_bytes();
        assert_eq!(load(Some(other), options.device.clone()).backend_info().variant, untuned);
        for hostile in [b"\xff\xfe".to_vec(), b"awqua tuning 1\nsize".to_vec(), text.replace("size", "\0").into_bytes()]
        {
            let variant = load(Some(hostile), options.device.clone()).backend_info().variant;
            assert!(variant.starts_with(&untuned) && variant.contains("; the tuning is ignored: "), "{variant}");
        }
    }
}

#[test]
fn impossible_shapes_are_refused() {
    for options in usable() {
        let refused = |shapes: &[MatrixShape]| {
            wgpu::tune(&options, shapes, None, &mut |_| {}).expect_err("there is nothing to tune for").kind()
        };
        assert_eq!(refused(&[]), ErrorKind::InvalidInput);
        for (n, k, group_size) in [(0, 64, 32), (8, 0, 8), (8, 60, 4), (8, 64, 48), (8, 64, 0)] {
            assert_eq!(refused(&[MatrixShape { n, k, group_size }]), ErrorKind::InvalidInput);
        }
    }
}
