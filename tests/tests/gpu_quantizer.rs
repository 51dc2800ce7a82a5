//! Quantizing with a GPU's help, on every adapter.
#![cfg(feature = "wgpu")]

use std::path::Path;
use std::sync::Arc;

use awqua::backend::wgpu::{DeviceChoice, WgpuOptions, adapters, products};
use awqua::backend::{Products, RoundingGrid};
use awqua_quantizer::calibration::Calibration;
use awqua_quantizer::device::{Accelerator, Compute};
use awqua_quantizer::evaluate::{Streams, compare};
use awqua_quantizer::math::{Threads, times_transposed};
use awqua_quantizer::method::Method;
use awqua_quantizer::quantize::{GroupSize, QuantizeOptions, quantize};
use awqua_quantizer::random::Random;

#[allow(dead_code, reason = "another test makes tensors with it")]
mod disk;

/// Every usable adapter, with each of these limits of what a kernel sees at once.
#[expect(clippy::print_stderr, reason = "a skipped test has to be visible")]
fn devices(limits: &[Option<u64>]) -> Vec<Arc<dyn Products>> {
    let mut found = Vec::new();
    for adapter in adapters().iter().filter(|adapter| adapter.unusable.is_none()) {
        for &limit_binding in limits {
            let device = DeviceChoice::Named(adapter.index.to_string());
            found.push(products(&WgpuOptions { device, limit_binding, ..Default::default() }).unwrap());
        }
    }
    if found.is_empty() {
        assert!(std::env::var_os("AWQUA_REQUIRE_GPU").is_none(), "AWQUA_REQUIRE_GPU is set and there is no adapter");
        eprintln!("skipped: no GPU adapter");
    }
    found
}

#[test]
fn products_are_those_of_the_processor() {
    // Small bindings split matrices into parts, and rows into pieces.
    for device in devices(&[None, Some(8192)]) {
        let mut random = Random::new(1);
        for (m, n, k) in [(1, 1, 8), (3, 130, 24), (65, 20, 33), (40, 64, 128)] {
            let (x, w) = (random.normals(m * k), random.normals(n * k));
            let expected = times_transposed(Threads::new(2), &x, &w, k);
            let matrix = device.upload(&w, k).unwrap();
            let mut out = vec![f32::NAN; m * n];
            device.multiply(&x, &matrix, &mut out).unwrap();
            let worst = expected.iter().zip(&out).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-5 * k as f32, "{device:?} {m} {n} {k}: {worst}");
        }
        assert!(device.peak_bytes() > 0);
        let matrix = device.upload(&random.normals(64), 8).unwrap();
        assert!(device.multiply(&[1.0; 9], &matrix, &mut [0.0; 8]).is_err());
        let grid = RoundingGrid { max_code: 15, group_size: 3, symmetric: false };
        assert!(device.rounded(&matrix, &[1.0; 8], &grid).is_err());
    }
}

#[test]
fn quantizing_with_a_gpu_loses_as_little_as_without() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/arch/qwen2");
    let mut random = Random::new(6);
    let sequences: Vec<Vec<u32>> = (0..6).map(|_| (0..40).map(|_| random.below(512) as u32).collect()).collect();
    let calibration = Calibration::of_ids("random", sequences);
    let windows = vec![calibration.sequences[0].clone()];
    let streams = |dir: &Path| Streams::compute(dir, &windows, Threads::new(2), &mut |_, _| Ok(())).unwrap();
    let mut options = QuantizeOptions::new(Method::Awq, 3);
    options.group_size = GroupSize::Features(32);
    let folder = disk::Folder::new();
    let lost = |name: &str, compute: Compute| {
        let out = folder.path().join(name);
        quantize(&source, &out, &calibration, &options, compute, &mut |_| Ok(())).unwrap();
        compare(&streams(&source), &streams(&out), &windows, 0, &mut |_, _| Ok(())).unwrap().kl_mean
    };
    let plain = lost("plain", Threads::new(2).into());
    for (i, device) in devices(&[None]).into_iter().enumerate() {
        let accelerator = Accelerator::new(device).from_work(1 << 20);
        let compute = Compute { threads: Threads::new(2), device: Some(accelerator.clone()) };
        let found = lost(&i.to_string(), compute);
        assert!(accelerator.take_failure().is_none());
        assert!((found - plain).abs() < 0.1 * plain, "{found} against {plain}");
        assert!(accelerator.products().peak_bytes() > 100_000);
    }
}
