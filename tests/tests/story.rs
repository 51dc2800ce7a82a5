//! The project's own story model: its half-precision weights against Transformers, its packed twin as a fixed text,
//! and everything a session promises.

#![allow(clippy::print_stdout, reason = "what is skipped is part of a test's output")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use awqua::session::tokenizer::TextStream;
use awqua::{
    BackendChoice, CancelToken, ErrorKind, GenerateOptions, Generation, HeadBits, LoadOptions, Model, Sampling,
    Session, SessionOptions, StopReason,
};
use serde_json::Value;

/// What the packed model says after [`PROMPT`], always taking the most likely token.
const PROMPT: &str = "It was a fine morning, and Emma";
const TEXT: &str = include_str!("../fixtures/story.txt");

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models").join(name)
}

fn open(name: &str, backend: BackendChoice) -> Arc<Model> {
    Model::open(folder(name), &LoadOptions { backend, ..Default::default() }).unwrap()
}

fn packed() -> Arc<Model> {
    open("tiny-story-w4", BackendChoice::Cpu)
}

fn session(model: &Arc<Model>, options: SessionOptions) -> Session {
    Session::new(model, &SessionOptions { threads: Some(2), ..options }).unwrap()
}

fn greedy(max_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_tokens, sampling: Sampling::greedy(), ignore_eos: true, ..Default::default() }
}

fn generate(session: &mut Session, prompt: &str, options: &GenerateOptions) -> Generation {
    let ids = session.model().tokenizer().unwrap().encode(prompt, true).unwrap();
    session.generate(&ids, options, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

#[test]
fn half_precision_weights_match_transformers() {
    let path = folder("tiny-story").join("reference.json");
    let reference: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let model = open("tiny-story", BackendChoice::Cpu);
    let mut session = session(&model, SessionOptions::default());
    for case in reference["cases"].as_array().unwrap() {
        let prompt = ids(&case["input_ids"]);
        let encoded = model.tokenizer().unwrap().encode(case["prompt"].as_str().unwrap(), true).unwrap();
        assert_eq!(encoded, prompt);
        session.set_prompt(&prompt, &CancelToken::default()).unwrap();
        let expected = case["last_logits"].as_array().unwrap();
        let largest = expected.iter().map(|v| v.as_f64().unwrap().abs()).fold(0.0, f64::max);
        for (found, expected) in session.logits().unwrap().iter().zip(expected) {
            assert!((f64::from(*found) - expected.as_f64().unwrap()).abs() <= 1e-4 * largest);
        }
        let found = session.generate(&prompt, &greedy(48), &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(found.ids, ids(&case["greedy_ids"]));
    }
}

#[test]
fn the_packed_model_tells_its_story_on_the_cpu() {
    let mut session = session(&packed(), SessionOptions::default());
    assert_eq!(generate(&mut session, PROMPT, &greedy(64)).text, TEXT);
}

/// log softmax
fn log_probabilities(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |most, &l| most.max(l));
    let sum: f64 = logits.iter().map(|&l| f64::from(l - largest).exp()).sum();
    logits.iter().map(|&l| f64::from(l - largest) - sum.ln()).collect()
}

#[test]
fn rounded_activations_predict_as_exact_ones_do() {
    let model = packed();
    let none = CancelToken::default();
    let mut exact = session(&model, SessionOptions { exact: true, ..Default::default() });
    let mut rounded = session(&model, SessionOptions::default());
    // A text that the model finds likely, and not only its likeliest one.
    let sampling = Sampling { temperature: 1.0, ..Sampling::greedy() };
    let ids = generate(&mut exact, PROMPT, &GenerateOptions { sampling, seed: 4, ..greedy(300) }).ids;
    let mut expected = Vec::new();
    exact.score(&ids, &none, &mut |_, logits| expected.push(log_probabilities(logits))).unwrap();
    let mut divergences = Vec::new();
    rounded
        .score(&ids, &none, &mut |position, logits| {
            let (p, q) = (&expected[position], log_probabilities(logits));
            divergences.push(p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>());
        })
        .unwrap();
    let mean = divergences.iter().sum::<f64>() / divergences.len() as f64;
    println!("mean KL {mean:.1e} over {} tokens", divergences.len());
    assert!(divergences.len() == 300 && mean > 0.0 && mean <= 1e-4, "{mean:e}");
}

#[cfg(feature = "wgpu")]
#[test]
fn the_packed_model_tells_its_story_on_a_gpu() {
    for portable_kernels in [false, true] {
        let options = LoadOptions { backend: BackendChoice::Wgpu, portable_kernels, ..Default::default() };
        match Model::open(folder("tiny-story-w4"), &options) {
            Ok(model) => {
                let mut session = session(&model, SessionOptions { context: Some(128), ..Default::default() });
                // Half-precision kernels may settle a near tie differently, but not right away.
                let text = generate(&mut session, PROMPT, &greedy(16)).text;
                assert!(TEXT.starts_with(&text) && text.len() > 30, "portable {portable_kernels}: {text}");
            }
            Err(e) if e.kind() == ErrorKind::NoDevice => {
                assert!(std::env::var_os("AWQUA_REQUIRE_GPU").is_none(), "{e}");
                println!("skipped: {e}");
            }
            Err(e) => panic!("{e}"),
        }
    }
}

#[test]
fn chunks_threads_reuse_and_neighbours_change_nothing() {
    let model = packed();
    let prompt = "The sun was low when the travellers came down to the river, and ".repeat(4);
    let mut plain = session(&model, SessionOptions::default());
    let expected = generate(&mut plain, &prompt, &greedy(24)).ids;
    for chunk in [1, 7, 64] {
        let mut session = session(&model, SessionOptions { chunk: Some(chunk), ..Default::default() });
        assert_eq!(generate(&mut session, &prompt, &greedy(24)).ids, expected, "chunk {chunk}");
    }
    // Two sessions take turns on one model; one of them extends, rewinds and repeats its prompt.
    let (mut a, mut b) = (session(&model, SessionOptions::default()), session(&model, SessionOptions::default()));
    let first = generate(&mut a, &prompt, &greedy(24));
    let other = generate(&mut b, PROMPT, &greedy(24));
    assert_eq!((first.ids, first.reused), (expected.clone(), 0));
    let again = generate(&mut a, &prompt, &greedy(24));
    assert!(again.reused + 1 >= again.prefill_tokens && again.reused > 20, "{} reused", again.reused);
    assert_eq!(again.ids, expected);
    assert_eq!(generate(&mut b, PROMPT, &greedy(24)).ids, other.ids);
}

#[test]
fn streamed_text_is_whole_and_stops_where_told() {
    let model = packed();
    let mut session = session(&model, SessionOptions::default());
    let ids = model.tokenizer().unwrap().encode(PROMPT, true).unwrap();
    let stop = &TEXT[20..26];
    let options = GenerateOptions { stop: vec![stop.into(), "never said".into()], ..greedy(64) };
    let mut streamed = String::new();
    let found = session
        .generate(&ids, &options, &mut |text| {
            streamed.push_str(text);
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(found.stop, StopReason::StopString(stop.into()));
    assert_eq!(streamed, found.text);
    assert_eq!(found.text, TEXT.split_once(stop).unwrap().0);

    let mut pieces = 0;
    let found = session
        .generate(&ids, &greedy(64), &mut |_| {
            pieces += 1;
            if pieces == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
    assert_eq!((found.stop, pieces), (StopReason::Cancelled, 3));
}

#[test]
fn characters_of_several_tokens_are_never_split() {
    let model = packed();
    let tokenizer = model.tokenizer().unwrap();
    let text = "naïve 🙂 你好 — ﷽ e\u{301}";
    let mut stream = TextStream::default();
    let mut out = String::new();
    for id in tokenizer.encode(text, false).unwrap() {
        stream.push(tokenizer, id, &mut out).unwrap();
        assert!(!out.contains('\u{fffd}'), "{out:?}");
    }
    stream.finish(tokenizer, &mut out).unwrap();
    assert_eq!(out, text);
    // An unfinished character comes out, marked as broken, only at the end.
    let ids = tokenizer.encode("🙂", false).unwrap();
    assert!(ids.len() > 1);
    out.clear();
    stream.push(tokenizer, ids[0], &mut out).unwrap();
    assert_eq!(out, "");
    stream.finish(tokenizer, &mut out).unwrap();
    assert_eq!(out, "\u{fffd}");
}

#[test]
fn seeds_repeat_and_differ() {
    let model = packed();
    let mut session = session(&model, SessionOptions::default());
    let options = |seed| GenerateOptions { max_tokens: 24, seed, ..Default::default() };
    let one = generate(&mut session, PROMPT, &options(1)).ids;
    assert_eq!(generate(&mut session, PROMPT, &options(1)).ids, one);
    assert_ne!(generate(&mut session, PROMPT, &options(2)).ids, one);
}

#[test]
fn a_full_context_ends_or_shifts() {
    let model = packed();
    let small = SessionOptions { context: Some(24), ..Default::default() };
    let mut session = session(&model, small);
    let found = generate(&mut session, PROMPT, &greedy(100));
    assert_eq!(found.stop, StopReason::ContextFull);
    assert!(TEXT.starts_with(&found.text));
    let shift = Some(awqua::session::ContextShift { keep: 4 });
    let found = generate(&mut session, PROMPT, &GenerateOptions { shift, ..greedy(100) });
    assert_eq!((found.stop, found.ids.len()), (StopReason::MaxTokens, 100));
    assert!(session.tokens().len() <= 24);
}

#[test]
fn bad_requests_are_errors_and_leave_the_session_usable() {
    let model = packed();
    let mut session = session(&model, SessionOptions { context: Some(64), ..Default::default() });
    let none = CancelToken::default();
    let kind = |result: awqua::Result<usize>| result.unwrap_err().kind();
    assert_eq!(kind(session.set_prompt(&[], &none)), ErrorKind::InvalidInput);
    assert_eq!(kind(session.set_prompt(&[1, 4096], &none)), ErrorKind::InvalidInput);
    assert_eq!(kind(session.set_prompt(&[1; 65], &none)), ErrorKind::ContextFull);
    assert_eq!(session.logits().unwrap_err().kind(), ErrorKind::InvalidInput);
    let cancelled = CancelToken::default();
    cancelled.cancel();
    assert_eq!(kind(session.set_prompt(&[1, 2], &cancelled)), ErrorKind::Cancelled);
    let bad = GenerateOptions { sampling: Sampling { top_p: 2.0, ..Default::default() }, ..Default::default() };
    let refused = session.generate(&[1], &bad, &mut |_| ControlFlow::Continue(()));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(generate(&mut session, PROMPT, &greedy(8)).ids.len(), 8);

    let absurd = SessionOptions { context: Some(u32::MAX), ..Default::default() };
    let error = Session::new(&model, &absurd).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    assert!(error.message().contains("bytes"), "{error}");
    let empty = SessionOptions { context: Some(0), ..Default::default() };
    assert_eq!(Session::new(&model, &empty).unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
fn loading_can_be_cancelled() {
    let mut calls = 0;
    let result = Model::open_with_progress(
        folder("tiny-story-w4"),
        &LoadOptions { backend: BackendChoice::Cpu, ..Default::default() },
        &mut |p| {
            calls += 1;
            assert!(p.done <= p.total);
            if calls == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        },
    );
    assert_eq!((result.unwrap_err().kind(), calls), (ErrorKind::Cancelled, 3));
}

/// A copy of the packed model with one file changed.
fn changed(name: &str, file: &str, change: impl FnOnce(&mut Value)) -> awqua::Error {
    let copy = std::env::temp_dir().join(format!("awqua-story-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&copy).unwrap();
    for entry in std::fs::read_dir(folder("tiny-story-w4")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    let path = copy.join(file);
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(&path, json.to_string()).unwrap();
    let options = LoadOptions { backend: BackendChoice::Cpu, ..Default::default() };
    let error = Model::open(&copy, &options).expect_err(name);
    std::fs::remove_dir_all(&copy).unwrap();
    error
}

#[test]
fn folders_that_contradict_themselves_are_refused_by_name() {
    let config = |name: &str, kind: ErrorKind, names: &str, change: fn(&mut Value)| {
        let error = changed(name, "config.json", change);
        assert_eq!(error.kind(), kind, "{name}: {error}");
        assert!(error.to_string().contains(names), "{name}: {error}");
    };
    config("unknown class", ErrorKind::Unsupported, "MambaForCausalLM", |c| {
        c["architectures"] = serde_json::json!(["MambaForCausalLM"]);
    });
    config("wider", ErrorKind::InvalidTensor, "model.embed_tokens.weight", |c| c["hidden_size"] = 512.into());
    config("absurd", ErrorKind::InvalidConfig, "hidden_size", |c| c["hidden_size"] = (1u64 << 60).into());
    config("negative", ErrorKind::InvalidConfig, "num_hidden_layers", |c| c["num_hidden_layers"] = (-1).into());
    config("deeper", ErrorKind::InvalidTensor, "model.layers.6", |c| c["num_hidden_layers"] = 7.into());
    config("untied", ErrorKind::InvalidTensor, "lm_head", |c| c["tie_word_embeddings"] = false.into());
    config("heads", ErrorKind::InvalidConfig, "num_attention_heads", |c| c["num_key_value_heads"] = 3.into());
    config("method", ErrorKind::Unsupported, "aqlm", |c| c["quantization_config"]["quant_method"] = "aqlm".into());
    config("rope", ErrorKind::Unsupported, "spiral", |c| {
        c["rope_scaling"] = serde_json::json!({"rope_type": "spiral", "factor": 4.0});
    });
    config("longrope", ErrorKind::InvalidConfig, "short_factor", |c| {
        c["rope_scaling"] = serde_json::json!({"rope_type": "longrope", "factor": 4.0});
    });
    config("bounded", ErrorKind::Unsupported, "attn_logit_softcapping", |c| c["attn_logit_softcapping"] = 50.into());
    config("activation", ErrorKind::Unsupported, "relu", |c| c["hidden_act"] = "relu".into());
    let error = changed("eos", "generation_config.json", |c| c["eos_token_id"] = 5000.into());
    assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
    assert!(error.to_string().contains("generation_config.json: `eos_token_id`"), "{error}");
    let error = changed("tokenizer", "tokenizer.json", |t| {
        let vocab = t["model"]["vocab"].as_object_mut().unwrap();
        *vocab.values_mut().last().unwrap() = 70_000.into();
    });
    assert_eq!(error.kind(), ErrorKind::Tokenizer, "{error}");
    let error = changed("template", "tokenizer_config.json", |t| t["chat_template"] = "{% if %}".into());
    assert_eq!(error.kind(), ErrorKind::Template, "{error}");
}

/// Mean divergence of a model with a head of so many bits from one with the head as it is stored.
fn divergence_of_head(backend: BackendChoice, head_bits: HeadBits) -> Option<f64> {
    let open = |head_bits| match Model::open(
        folder("tiny-story"),
        &LoadOptions { backend, head_bits, ..Default::default() },
    ) {
        Ok(model) => Some(model),
        Err(e) if e.kind() == ErrorKind::NoDevice => {
            assert!(std::env::var_os("AWQUA_REQUIRE_GPU").is_none(), "{e}");
            None
        }
        Err(e) => panic!("{e}"),
    };
    let none = CancelToken::default();
    let (plain, rounded) = (open(HeadBits::Sixteen)?, open(head_bits)?);
    // The embedding stays as it is, and the head comes on top of it.
    assert!(rounded.backend_info().weight_bytes != plain.backend_info().weight_bytes);
    let options = || SessionOptions { context: Some(320), exact: true, ..Default::default() };
    let mut ids = plain.tokenizer().unwrap().encode(TEXT, true).unwrap();
    // Software GPUs take their time.
    ids.truncate(if backend == BackendChoice::Cpu { 300 } else { 40 });
    let mut plain = session(&plain, options());
    let mut expected = Vec::new();
    plain.score(&ids, &none, &mut |_, logits| expected.push(log_probabilities(logits))).unwrap();
    let mut divergences = Vec::new();
    session(&rounded, options())
        .score(&ids, &none, &mut |position, logits| {
            let (p, q) = (&expected[position], log_probabilities(logits));
            divergences.push(p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>());
        })
        .unwrap();
    let mean = divergences.iter().sum::<f64>() / divergences.len() as f64;
    println!("{backend:?}, {head_bits:?}: mean KL {mean:.1e} over {} tokens", divergences.len());
    Some(mean)
}

#[test]
fn a_rounded_head_predicts_about_the_same() {
    for backend in [BackendChoice::Cpu, BackendChoice::Wgpu] {
        if backend == BackendChoice::Wgpu && !cfg!(feature = "wgpu") {
            continue;
        }
        for (bits, most) in [(HeadBits::Eight, 3e-4), (HeadBits::Four, 0.05)] {
            if let Some(mean) = divergence_of_head(backend, bits) {
                assert!(mean > 0.0 && mean <= most, "{backend:?}, {bits:?}: {mean:e}");
            }
        }
    }
}
