//! The quantizer, from checkpoints of every architecture it knows to checkpoints that are run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use awqua::checkpoint::Checkpoint;
use awqua::model::verify;
use awqua::session::tokenizer::Tokenizer;
use awqua::{Error, ErrorKind};
use awqua_quantizer::calibration::{Calibration, check};
use awqua_quantizer::decoder::{Decoder, Site, Slot};
use awqua_quantizer::evaluate::tasks::{self, Request};
use awqua_quantizer::evaluate::{Comparison, Evaluation, Streams, compare, html};
use awqua_quantizer::math::Threads;
use awqua_quantizer::method::{Method, scale};
use awqua_quantizer::mixed::{self, Granularity};
use awqua_quantizer::quantize::{Format, GroupSize, QuantizeOptions, plan, quantize, tune};
use awqua_quantizer::random::Random;
use serde_json::Value;

#[allow(dead_code, reason = "another test makes tensors with it")]
mod disk;

use disk::Folder;

/// Unquantized fixtures: plain, with biases and a tied head, with norms of the heads, with a sliding window.
const ARCHS: [&str; 4] = ["llama-llama3rope", "qwen2", "qwen3", "mistral"];

fn fixture(arch: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/arch").join(arch)
}

fn reference(arch: &str) -> Value {
    let text = std::fs::read_to_string(fixture(arch).join("reference/reference.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn nll_ids(arch: &str) -> Vec<u32> {
    serde_json::from_value(reference(arch)["nll"]["input_ids"].clone()).unwrap()
}

/// Random ids: enough for a random model.
fn calibration() -> Calibration {
    let mut random = Random::new(6);
    Calibration::of_ids("random", (0..6).map(|_| (0..40).map(|_| random.below(512) as u32).collect()).collect())
}

fn options(method: Method, bits: u32) -> QuantizeOptions {
    let mut options = QuantizeOptions::new(method, bits);
    options.group_size = GroupSize::Features(32);
    options
}

fn run(source: &Path, out: &Path, options: &QuantizeOptions) -> Result<(), Error> {
    quantize(source, out, &calibration(), options, Threads::new(2), &mut |_| Ok(())).map(|_| ())
}

fn evaluate(source: &Path, candidate: &Path, ids: Vec<u32>) -> Comparison {
    let windows = vec![ids];
    let streams = |dir: &Path| Streams::compute(dir, &windows, Threads::new(2), &mut |_, _| Ok(())).unwrap();
    compare(&streams(source), &streams(candidate), &windows, 3, &mut |_, _| Ok(())).unwrap()
}

#[test]
fn blocks_compute_what_the_reference_does() {
    for arch in ARCHS.into_iter().chain(["qwen2-window", "llama-yarn", "qwen2-awq-gemm-g64", "qwen3-ct-asym-g32"]) {
        let found = evaluate(&fixture(arch), &fixture(arch), nll_ids(arch));
        let expected = reference(arch)["nll"]["mean_nll"].as_f64().unwrap();
        assert!((found.candidate.nll - expected).abs() < 1e-4, "{arch}: {} against {expected}", found.candidate.nll);
        assert_eq!((found.kl_mean, found.agreement), (0.0, 1.0), "{arch}");
    }
}

#[test]
fn folding_scales_leaves_the_function_alone() {
    for arch in ARCHS {
        let checkpoint = Checkpoint::open(&fixture(arch)).unwrap();
        let decoder = Decoder::new(&checkpoint, 48, Threads::new(2)).unwrap();
        let exact = decoder.load(&checkpoint, None, 0).unwrap();
        let x = Random::new(8).normals(48 * decoder.config.hidden_size);
        let out = |block: &_| {
            let mut x = x.clone();
            decoder.forward(block, &mut x, &mut |_, _| {});
            x
        };
        let expected = out(&exact);
        let size = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
        for site in Site::ALL {
            let mut scales: Vec<f32> =
                Random::new(site as u64).normals(decoder.width(site)).iter().map(|v| v.exp()).collect();
            if site == Site::Attended {
                // All query heads on one v head have its scales.
                let c = &decoder.config;
                let group = c.num_attention_heads / c.num_key_value_heads;
                for i in 0..scales.len() {
                    let (head, at) = (i / c.head_dim, i % c.head_dim);
                    scales[i] = scales[head / group * group * c.head_dim + at];
                }
            }
            let mut block = exact.clone();
            scale::fold(&decoder, &mut block, site, &scales);
            let changed = Slot::ALL.iter().filter(|&&s| block.linear(s).weight != exact.linear(s).weight).count();
            assert!(changed >= site.slots().len(), "{arch} {site:?}");
            let found = out(&block);
            let worst = expected.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 2e-5 * size, "{arch} {site:?}: {worst} of {size}");
        }
    }
}

#[test]
fn every_method_and_dialect_gives_a_checkpoint_that_loads_and_resembles_its_source() {
    let folder = Folder::new();
    let dialects = [
        (Method::Awq, 4, Format::AwqGemm, GroupSize::Features(64), false),
        (Method::Gptq, 4, Format::GptqV2, GroupSize::Features(32), true),
        (Method::AwqGptq, 3, Format::PackQuantized, GroupSize::Features(32), false),
        (Method::Learned, 2, Format::PackQuantized, GroupSize::Features(32), false),
        (Method::Awq, 5, Format::PackQuantized, GroupSize::Features(32), false),
        (Method::Gptq, 6, Format::PackQuantized, GroupSize::Channel, true),
        (Method::Rtn, 8, Format::GptqV2, GroupSize::Channel, false),
        (Method::Awq, 8, Format::PackQuantized, GroupSize::Channel, true),
        (Method::Gptq, 2, Format::GptqV2, GroupSize::Features(64), false),
        (Method::Gptq, 3, Format::GptqV2, GroupSize::Features(32), false),
        (Method::AwqTuned, 4, Format::AwqGemm, GroupSize::Features(32), false),
    ];
    for (i, (method, bits, format, group_size, symmetric)) in dialects.into_iter().enumerate() {
        let arch = ARCHS[i % ARCHS.len()];
        let out = folder.path().join(format!("{i}"));
        let options = QuantizeOptions { format, group_size, symmetric, ..options(method, bits) };
        run(&fixture(arch), &out, &options).unwrap();
        let checkpoint = Checkpoint::open(&out).unwrap();
        let findings = verify(&checkpoint).unwrap();
        assert!(findings.is_empty(), "{i}: {findings:?}");
        let found = evaluate(&fixture(arch), &out, nll_ids(arch));
        let bound = match bits {
            8 => 0.01,
            5 | 6 => 0.1,
            // Random weights forgive less than trained ones.
            4 => 0.4,
            3 => 2.5,
            _ => 6.0,
        };
        assert!(found.kl_mean < bound, "{i} {method:?} {bits}: {}", found.kl_mean);
        let section = &checkpoint.config()["quantization_config"];
        let record = section.get("awqua").unwrap_or(&section["meta"]["awqua"]);
        assert_eq!(record["method"], method.name());
    }
}

#[test]
fn each_step_up_in_effort_loses_less() {
    let folder = Folder::new();
    let loss = |method: Method| {
        let out = folder.path().join(method.name());
        run(&fixture("qwen3"), &out, &options(method, 3)).unwrap();
        // The calibration tokens themselves: what the methods minimise.
        evaluate(&fixture("qwen3"), &out, calibration().sequences[0].clone()).kl_mean
    };
    let losses = [Method::Rtn, Method::AwqGptq, Method::Learned, Method::Tuned].map(loss);
    assert!(losses.is_sorted_by(|a, b| a > b), "{losses:?}");
    let corrected = loss(Method::Qep);
    assert!(corrected < losses[1], "{corrected} against {losses:?}");
}

#[test]
fn threads_and_interruptions_do_not_change_a_byte() {
    let folder = Folder::new();
    let source = fixture("qwen2");
    let options = options(Method::Learned, 4);
    let whole = folder.path().join("whole");
    quantize(&source, &whole, &calibration(), &options, Threads::new(1), &mut |_| Ok(())).unwrap();
    let broken = folder.path().join("broken");
    // Stops before every block in turn, and before the writing.
    let mut resumed = Vec::new();
    for stop in 1..=4 {
        let result =
            quantize(&source, &broken, &calibration(), &options, Threads::new(3), &mut |p| match p.done == stop
                && stop < 4
            {
                true => Err(Error::new(ErrorKind::Cancelled, "enough")),
                false => Ok(()),
            });
        match result {
            Ok(report) => resumed.push(report.resumed),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Cancelled);
                assert!(!broken.exists(), "nothing under the final name");
            }
        }
    }
    assert_eq!(resumed, [3], "the last run had only to write");
    for file in ["model.safetensors", "config.json", "awqua_report.json"] {
        assert_eq!(std::fs::read(whole.join(file)).unwrap(), std::fs::read(broken.join(file)).unwrap(), "{file}");
    }
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn tuning_goes_on_where_it_stopped() {
    let folder = Folder::new();
    let source = fixture("qwen2");
    let mut options = options(Method::Tuned, 3);
    let mut recipe = Method::Tuned.recipe(3);
    recipe.tune = Some(tune::Options { epochs: 7.0, tokens: 20, scale_rate: 2e-3, vector_rate: 1e-3 });
    options.recipe = Some(recipe);
    let (whole, broken) = (folder.path().join("whole"), folder.path().join("broken"));
    let mut calls = 0;
    let report = quantize(&source, &whole, &calibration(), &options, Threads::new(2), &mut |_| {
        calls += 1;
        Ok(())
    });
    let tuning = report.unwrap().tuning.unwrap();
    assert!(tuning.steps == 84 && tuning.last < tuning.first, "{tuning:?}");
    // Every fortieth call of what reports progress ends the run.
    let mut runs = 0;
    loop {
        let mut calls = 0;
        let result = quantize(&source, &broken, &calibration(), &options, Threads::new(1), &mut |_| {
            calls += 1;
            if calls == 40 { Err(Error::new(ErrorKind::Cancelled, "enough")) } else { Ok(()) }
        });
        runs += 1;
        match result {
            Ok(_) => break,
            Err(error) => assert!(error.kind() == ErrorKind::Cancelled && !broken.exists()),
        }
        assert!(runs < 40, "it gets nowhere");
    }
    assert!(runs > 2, "{runs} runs of {calls} calls");
    for file in ["model.safetensors", "config.json", "awqua_report.json"] {
        assert_eq!(std::fs::read(whole.join(file)).unwrap(), std::fs::read(broken.join(file)).unwrap(), "{file}");
    }
}

#[test]
fn a_module_that_stays_dense_keeps_its_function_when_scales_are_folded() {
    let folder = Folder::new();
    let out = folder.path().join("out");
    let dense = ["self_attn.v_proj", "mlp.up_proj", "self_attn.k_proj"];
    let bits_of = (0..3).flat_map(|layer| dense.map(|module| (format!("model.layers.{layer}.{module}"), 16))).collect();
    run(&fixture("qwen2"), &out, &QuantizeOptions { bits_of, ..options(Method::Awq, 8) }).unwrap();
    let found = evaluate(&fixture("qwen2"), &out, nll_ids("qwen2"));
    assert!(found.kl_mean < 1e-3, "{}", found.kl_mean);
}

#[test]
fn bits_follow_the_measured_loss_and_meet_the_budget() {
    let folder = Folder::new();
    let source = fixture("qwen3");
    let asked = options(Method::Awq, 4);
    let measure = |granularity, threads| {
        mixed::measure(&source, &calibration(), &asked, granularity, Threads::new(threads), &mut |_, _| Ok(())).unwrap()
    };
    let sensitivity = measure(Granularity::Fused, 2);
    assert_eq!(sensitivity, measure(Granularity::Fused, 1));
    assert_eq!(sensitivity.units.len(), 3 * 4);
    assert_eq!(measure(Granularity::Module, 2).units.len(), 3 * 7);
    for unit in &sensitivity.units {
        assert!(unit.losses.is_sorted_by(|a, b| a >= b) && unit.losses[0] > 0.0, "{unit:?}");
    }
    let mut losses = Vec::new();
    for (i, (target, format)) in [(3.0, Format::GptqV2), (4.0, Format::PackQuantized)].into_iter().enumerate() {
        let widths: Vec<u32> = mixed::WIDTHS.into_iter().filter(|&bits| format.holds(bits)).collect();
        let allocation = sensitivity.for_mean_bits(target, &widths).unwrap();
        assert!(allocation.mean_bits <= target + 1e-6);
        let out = folder.path().join(format!("{i}"));
        let options = QuantizeOptions { bits_of: allocation.bits_of, format, ..options(Method::Gptq, 4) };
        let plan = plan(&source, &calibration(), &options, Threads::new(1)).unwrap();
        run(&source, &out, &options).unwrap();
        let written = Checkpoint::open(&out).unwrap().bytes_on_disk();
        assert_eq!(plan.packed_bytes().unwrap(), written);
        losses.push(evaluate(&source, &out, nll_ids("qwen3")).kl_mean);
        // Modules that engines fuse have the same bits.
        let bits = |module: &str| options.bits_of[&format!("model.layers.1.{module}")];
        assert_eq!(bits("self_attn.q_proj"), bits("self_attn.v_proj"));
    }
    assert!(losses[1] < losses[0], "{losses:?}");
}

#[test]
fn what_a_file_says_of_losses_is_checked() {
    let source = fixture("qwen3");
    let asked = options(Method::Awq, 4);
    let measure = |options: &QuantizeOptions| {
        mixed::measure(&source, &calibration(), options, Granularity::Fused, Threads::new(2), &mut |_, _| Ok(()))
    };
    let sensitivity = measure(&asked).unwrap();
    let good = serde_json::to_value(&sensitivity).unwrap();
    let read = |value: &Value, options: &QuantizeOptions| {
        let json = value.to_string();
        mixed::Sensitivity::from_json(json.as_bytes(), &source, &calibration(), options, Granularity::Fused)
    };
    let bits = |sensitivity: &mixed::Sensitivity| sensitivity.for_mean_bits(3.5, &mixed::WIDTHS).unwrap().bits_of;
    assert_eq!(bits(&read(&good, &asked).unwrap()), bits(&sensitivity));
    for (path, value) in [
        ("/units/1/modules", serde_json::json!([])),
        ("/units/0/weights", u64::MAX.into()),
        ("/units/0/weights", (-1).into()),
        ("/units/2/losses/0", 0.into()),
        ("/units/2/losses/6", (-1).into()),
        ("/units/2/losses", serde_json::json!([1, 0.5])),
        ("/units", Value::Null),
    ] {
        let mut bad = good.clone();
        *bad.pointer_mut(path).unwrap() = value;
        assert_eq!(read(&bad, &asked).unwrap_err().kind(), ErrorKind::InvalidFile, "{path}");
    }
    let mut other = good.clone();
    other["measured"]["seed"] = 99.into();
    assert_eq!(read(&other, &asked).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(read(&good, &options(Method::Gptq, 4)).unwrap_err().kind(), ErrorKind::InvalidInput);
    // What cannot be rounded cannot be measured either.
    for group_size in [GroupSize::Features(48), GroupSize::Features(0), GroupSize::Features(1000)] {
        let refused = measure(&QuantizeOptions { group_size, ..asked.clone() }).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{refused}");
        assert!(refused.to_string().contains("group size"), "{refused}");
    }
}

#[test]
fn the_measured_loss_is_what_rounding_a_module_costs() {
    let folder = Folder::new();
    let mut random = Random::new(31);
    let sequences: Vec<Vec<u32>> = (0..24).map(|_| (0..48).map(|_| random.below(512) as u32).collect()).collect();
    let calibration = Calibration::of_ids("random", sequences.clone());
    // Short sequences are measured on as they are.
    let probed = sequences;
    for arch in ["qwen2", "qwen3"] {
        let source = fixture(arch);
        let streams = |dir: &Path| Streams::compute(dir, &probed, Threads::new(2), &mut |_, _| Ok(())).unwrap();
        let exact = streams(&source);
        // Rounding to nearest, so that the errors measured are the ones that are made.
        let asked = options(Method::Rtn, 5);
        let sensitivity =
            mixed::measure(&source, &calibration, &asked, Granularity::Fused, Threads::new(2), &mut |_, _| Ok(()))
                .unwrap();
        let all: Vec<&String> = sensitivity.units.iter().flat_map(|unit| &unit.modules).collect();
        let true_loss = |rounded: &[String]| {
            let dense = all.iter().filter(|name| !rounded.contains(name)).map(|name| ((*name).clone(), 16));
            let options = QuantizeOptions { bits_of: dense.collect(), ..asked.clone() };
            let out = folder.path().join(format!("{arch}-{}-{}", rounded.len(), rounded[0]));
            quantize(&source, &out, &calibration, &options, Threads::new(2), &mut |_| Ok(())).unwrap();
            compare(&exact, &streams(&out), &probed, 0, &mut |_, _| Ok(())).unwrap().kl_mean
        };
        let at = mixed::WIDTHS.iter().position(|&bits| bits == 5).unwrap();
        let (mut predicted, mut summed) = (0.0, 0.0);
        for unit in &sensitivity.units {
            let (loss, found) = (unit.losses[at], true_loss(&unit.modules));
            assert!((loss / found).ln().abs() < 0.2, "{:?}: {loss} predicted, {found} found", unit.modules);
            predicted += loss;
            summed += found;
        }
        let names: Vec<String> = all.iter().map(|name| (*name).clone()).collect();
        let whole = true_loss(&names);
        assert!((predicted / summed).ln().abs() < 0.08, "{predicted} predicted, {summed} found one by one");
        assert!((predicted / whole).ln().abs() < 0.15, "{predicted} predicted, {whole} found at once");
    }
}

#[test]
fn a_text_unlike_the_calibration_is_told_from_one_like_it() {
    let folder = Folder::new();
    let out = folder.path().join("out");
    let ids = |seed: u64, first: usize| -> Vec<Vec<u32>> {
        let mut random = Random::new(seed);
        (0..6).map(|_| (0..60).map(|_| (first + random.below(4)) as u32).collect()).collect()
    };
    let calibration = Calibration::of_ids("low", ids(1, 0));
    quantize(&fixture("qwen2"), &out, &calibration, &options(Method::Awq, 4), Threads::new(2), &mut |_| Ok(()))
        .unwrap();
    let shift = |ids: Vec<Vec<u32>>| check::check(&out, &ids, Threads::new(2), &mut |_, _| Ok(())).unwrap();
    let (like, unlike) = (shift(ids(2, 0)), shift(ids(3, 300)));
    assert!(!like.differs && unlike.differs && unlike.ratio > 2.0 * like.ratio, "{} {}", like.ratio, unlike.ratio);
    assert_eq!(like.sites.len(), 3 * 4);

    std::fs::write(out.join(check::FILE), b"not a record").unwrap();
    let check = || check::check(&out, &ids(2, 0), Threads::new(1), &mut |_, _| Ok(())).unwrap_err();
    assert_eq!(check().kind(), ErrorKind::InvalidFile);
    std::fs::remove_file(out.join(check::FILE)).unwrap();
    assert_eq!(check().kind(), ErrorKind::Unsupported);
}

#[test]
fn a_task_costs_the_bits_that_the_likelihood_says() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/formats/fp16");
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let tokenizer = Tokenizer::from_checkpoint(&checkpoint, 512).unwrap().unwrap();
    let (context, continuation) = ("The borrow checker", " refuses two mutable references to one value.");
    let request = |continuation: &str, question| Request {
        context: context.into(),
        continuation: continuation.into(),
        question,
        label: Some(0),
    };
    let requests = [request(continuation, 0), request(" zzzz", 0), request(continuation, 1)];
    let threads = Threads::new(2);
    let found = tasks::score(&dir, "t", &requests, &tokenizer, threads, &mut |_, _| Ok(())).unwrap();
    assert_eq!((found.questions, found.requests, found.accuracy_unconditional), (2, 3, None));
    assert!(found.accuracy.is_some());

    let before = tokenizer.encode(context, false).unwrap().len();
    let ids = tokenizer.encode(&format!("{context}{continuation}"), false).unwrap();
    let nll = |ids: &[u32]| {
        let windows = vec![ids.to_vec()];
        let streams = Streams::compute(&dir, &windows, threads, &mut |_, _| Ok(())).unwrap();
        let found = compare(&streams, &streams, &windows, 0, &mut |_, _| Ok(())).unwrap();
        found.candidate.nll * (ids.len() - 1) as f64
    };
    let expected = (nll(&ids) - nll(&ids[..before])) / std::f64::consts::LN_2 / continuation.len() as f64;
    assert!((found.bits_per_byte - expected).abs() < 1e-4, "{} {expected}", found.bits_per_byte);
}

#[test]
fn layers_drift_apart_and_the_page_shows_it() {
    let folder = Folder::new();
    let out = folder.path().join("out");
    let source = fixture("qwen2");
    run(&source, &out, &options(Method::Rtn, 4)).unwrap();
    let windows = vec![nll_ids("qwen2")];
    let (a, b, layers) = Streams::compute_pair(&source, &out, &windows, Threads::new(2), &mut |_, _| Ok(())).unwrap();
    assert_eq!(layers.len(), 3);
    assert!(layers.iter().all(|l| l.relative_error > 1e-3 && l.relative_error < 1.0), "{layers:?}");
    let mut found = compare(&a, &b, &windows, 2, &mut |_, _| Ok(())).unwrap();
    found.layers = Some(layers);
    let (candidate_dir, reference_dir) = ("<candidate>".to_owned(), "reference".to_owned());
    let page = html(&Evaluation { candidate_dir, reference_dir, comparison: Some(found), tasks: vec![] }, None);
    assert!(page.contains("&lt;candidate&gt;") && page.matches("<svg").count() == 5 && !page.contains("NaN"));
    assert!(!page.contains("http://") || page.matches("http://").count() == page.matches("http://www.w3.org").count());
}

#[test]
fn another_run_does_not_continue_where_a_different_one_stopped() {
    let folder = Folder::new();
    let out = folder.path().join("out");
    let source = fixture("mistral");
    let stopped = quantize(&source, &out, &calibration(), &options(Method::Gptq, 4), Threads::new(2), &mut |p| {
        if p.done == 2 { Err(Error::new(ErrorKind::Cancelled, "enough")) } else { Ok(()) }
    });
    assert_eq!(stopped.unwrap_err().kind(), ErrorKind::Cancelled);
    let other = quantize(&source, &out, &calibration(), &options(Method::Gptq, 3), Threads::new(2), &mut |_| Ok(()));
    assert_eq!(other.unwrap().resumed, 0);
}

#[test]
fn single_modules_can_have_other_bits() {
    let folder = Folder::new();
    for format in [Format::PackQuantized, Format::GptqV2] {
        let out = folder.path().join(format!("{format:?}"));
        let bits_of = BTreeMap::from([
            ("model.layers.0.mlp.down_proj".to_owned(), 8),
            ("model.layers.1.self_attn.v_proj".to_owned(), 16),
            ("model.layers.2.mlp.gate_proj".to_owned(), 2),
        ]);
        run(&fixture("qwen2"), &out, &QuantizeOptions { format, bits_of, ..options(Method::Gptq, 4) }).unwrap();
        let checkpoint = Checkpoint::open(&out).unwrap();
        assert!(checkpoint.tensor("model.layers.1.self_attn.v_proj.weight").is_some());
        let found = evaluate(&fixture("qwen2"), &out, nll_ids("qwen2"));
        assert!(found.kl_mean < 1.0, "{format:?}: {}", found.kl_mean);
    }
}

#[test]
fn what_cannot_work_is_refused_by_name_and_leaves_nothing() {
    let folder = Folder::new();
    let out = folder.path().join("out");
    let source = fixture("qwen2");
    let refused = |source: &Path, calibration: &Calibration, options: &QuantizeOptions| {
        let error = quantize(source, &out, calibration, options, Threads::new(2), &mut |_| Ok(())).unwrap_err();
        assert!(!out.exists());
        error
    };
    let good = options(Method::Awq, 4);
    let cases = [
        (calibration(), QuantizeOptions { bits: 7, ..good.clone() }, ErrorKind::InvalidInput, "bits"),
        (
            calibration(),
            QuantizeOptions { format: Format::GptqV2, ..options(Method::Rtn, 5) },
            ErrorKind::Unsupported,
            "2, 3, 4 or 8 bits",
        ),
        (
            calibration(),
            QuantizeOptions { group_size: GroupSize::Features(48), ..good.clone() },
            ErrorKind::InvalidInput,
            "group size 48",
        ),
        (
            calibration(),
            QuantizeOptions { format: Format::AwqGemm, ..options(Method::Rtn, 3) },
            ErrorKind::Unsupported,
            "4 bits",
        ),
        (
            calibration(),
            QuantizeOptions { bits_of: BTreeMap::from([("lm_head".to_owned(), 8)]), ..good.clone() },
            ErrorKind::InvalidInput,
            "lm_head",
        ),
        (Calibration::none(), good.clone(), ErrorKind::InvalidInput, "no calibration"),
        (Calibration::of_ids("x", vec![vec![1], vec![]]), good.clone(), ErrorKind::InvalidInput, "empty"),
        (Calibration::of_ids("x", vec![vec![1, 512]]), good.clone(), ErrorKind::InvalidInput, "512"),
    ];
    for (calibration, options, kind, part) in cases {
        let error = refused(&source, &calibration, &options);
        assert!(error.kind() == kind && error.to_string().contains(part), "{error}");
    }
    let packed = refused(&fixture("qwen2-awq-gemm-g64"), &calibration(), &good);
    assert_eq!(packed.kind(), ErrorKind::Unsupported);
}

/// A copy of a fixture whose weight file was changed.
fn changed(folder: &Folder, arch: &str, change: impl Fn(&mut Vec<u8>, &Checkpoint)) -> PathBuf {
    let copy = folder.path().join("source");
    std::fs::create_dir_all(&copy).unwrap();
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(fixture(arch).join(file), copy.join(file)).unwrap();
    }
    let mut bytes = std::fs::read(copy.join("model.safetensors")).unwrap();
    change(&mut bytes, &Checkpoint::open(&copy).unwrap());
    std::fs::write(copy.join("model.safetensors"), bytes).unwrap();
    copy
}

/// Where the data of a tensor is in the file.
fn position(bytes: &[u8], checkpoint: &Checkpoint, name: &str) -> usize {
    let tensor = &checkpoint.tensor(name).unwrap().bytes().unwrap();
    bytes.windows(64).position(|window| *window == tensor[..64]).unwrap()
}

#[test]
fn weights_that_are_not_finite_are_named() {
    let folder = Folder::new();
    let name = "model.layers.1.mlp.up_proj.weight";
    let source = changed(&folder, "qwen2", |bytes, checkpoint| {
        let at = position(bytes, checkpoint, name);
        bytes[at + 10..at + 12].copy_from_slice(&[0x80, 0x7f]);
    });
    let error = run(&source, &folder.path().join("out"), &options(Method::Gptq, 4)).unwrap_err();
    assert_eq!((error.kind(), error.tensor()), (ErrorKind::InvalidTensor, name.strip_suffix(".weight")));
    assert!(error.message().contains("inf"), "{error}");
}

#[test]
fn dead_channels_and_constant_groups_get_finite_codes() {
    let folder = Folder::new();
    let source = changed(&folder, "qwen2", |bytes, checkpoint| {
        // Zero norm weights make dead channels; a constant run of weights makes constant groups.
        let norm = position(bytes, checkpoint, "model.layers.0.input_layernorm.weight");
        bytes[norm..norm + 40].fill(0);
        let gate = position(bytes, checkpoint, "model.layers.0.mlp.gate_proj.weight");
        (gate..gate + 512).step_by(2).for_each(|i| bytes[i..i + 2].copy_from_slice(&[0x80, 0x3f]));
        let down = position(bytes, checkpoint, "model.layers.0.mlp.down_proj.weight");
        bytes[down..down + 1280].fill(0);
    });
    for method in [Method::Awq, Method::Learned] {
        let out = folder.path().join(method.name());
        run(&source, &out, &options(method, 4)).unwrap();
        assert!(verify(&Checkpoint::open(&out).unwrap()).unwrap().is_empty());
        let found = evaluate(&source, &out, nll_ids("qwen2"));
        assert!(found.kl_mean < 1.0, "{method:?}: {}", found.kl_mean);
    }
}

#[test]
fn a_source_that_changes_meanwhile_is_noticed() {
    let folder = Folder::new();
    let source = changed(&folder, "qwen2", |_, _| {});
    let out = folder.path().join("out");
    let result = quantize(&source, &out, &calibration(), &options(Method::Rtn, 4), Threads::new(1), &mut |p| {
        if p.done == 2 {
            let file = std::fs::File::options().append(true).open(source.join("model.safetensors")).unwrap();
            file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        }
        Ok(())
    });
    let error = result.unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidFile && error.message().contains("changed"), "{error}");
    assert!(!out.exists());
}
