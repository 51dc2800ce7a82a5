//! Loading in pieces: budgets, progress, sources, caps on memory, taking weights away and bringing them back.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use awqua::backend::KvType;
use awqua::checkpoint::Source;
use awqua::tensor::Bytes;
use awqua::{
    BackendChoice, Engine, EngineOptions, ErrorKind, GenerateOptions, Load, LoadBudget, LoadStage, Model, Sampling,
    Session, SessionOptions,
};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny-story-w4")
}

fn engine(backend: BackendChoice) -> Arc<Engine> {
    Engine::new(EngineOptions { backend, ..Default::default() })
}

/// The CPU, and the GPU where there is one.
fn backends() -> Vec<BackendChoice> {
    let gpu = cfg!(feature = "wgpu") && Load::path(&engine(BackendChoice::Wgpu), folder()).run(&mut go_on).is_ok();
    assert!(gpu || std::env::var_os("AWQUA_REQUIRE_GPU").is_none(), "AWQUA_REQUIRE_GPU is set and there is none");
    if gpu { vec![BackendChoice::Cpu, BackendChoice::Wgpu] } else { vec![BackendChoice::Cpu] }
}

fn go_on(_: awqua::LoadProgress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The smallest steps there are.
const SMALLEST: LoadBudget =
    LoadBudget { host: Some(std::time::Duration::ZERO), bytes: Some(1), kernels: Some(1), on_threads: false };

fn loaded(engine: &Arc<Engine>) -> Arc<Model> {
    Load::path(engine, folder()).run(&mut go_on).unwrap()
}

fn say(session: &mut Session) -> String {
    let ids = session.model().tokenizer().unwrap().encode("It was a fine morning, and Emma", true).unwrap();
    let options =
        GenerateOptions { max_tokens: 12, sampling: Sampling::greedy(), ignore_eos: true, ..Default::default() };
    session.generate(&ids, &options, &mut |_| ControlFlow::Continue(())).unwrap().text
}

fn answer(model: &Arc<Model>) -> String {
    say(&mut Session::new(model, &SessionOptions { context: Some(64), ..Default::default() }).unwrap())
}

#[test]
fn smallest_steps_make_the_same_model() {
    for backend in backends() {
        let engine = engine(backend);
        let expected = answer(&loaded(&engine));
        let mut load = Load::path(&engine, folder());
        let (mut ticks, mut before) = (0, load.progress());
        let mut stages = vec![before.stage];
        let model = loop {
            ticks += 1;
            assert!(ticks < 100_000);
            let ready = load.tick(&SMALLEST).unwrap();
            if let Some(model) = ready {
                break model;
            }
            let progress = load.progress();
            assert!(progress.done <= progress.total && progress.total >= before.total, "{progress:?}");
            if progress.stage == before.stage {
                assert!(progress.done >= before.done, "{progress:?} after {before:?}");
            } else {
                stages.push(progress.stage);
            }
            before = progress;
            load.wait().unwrap();
        };
        assert!(ticks > 100, "{ticks} ticks");
        assert_eq!(before.done, before.total);
        assert_eq!(model.progress().stage, LoadStage::Ready);
        assert!(stages.contains(&LoadStage::Files) && stages.contains(&LoadStage::Weights), "{stages:?}");
        assert_eq!(answer(&model), expected);
    }
}

#[test]
fn loading_can_be_given_up_after_every_tick() {
    for backend in backends() {
        let engine = engine(backend);
        // The device stays open with the engine, so every attempt after the first is about the files and weights.
        let expected = answer(&loaded(&engine));
        let mut load = Load::path(&engine, folder());
        let mut stop_at = 0;
        'attempts: loop {
            for _ in 0..stop_at {
                if load.tick(&SMALLEST).unwrap().is_some() {
                    break 'attempts;
                }
                load.wait().unwrap();
            }
            load.restart();
            assert_eq!(load.progress().total, 0);
            assert_eq!(engine.used(), Default::default(), "after {stop_at} ticks");
            stop_at += 1 + stop_at / 4;
        }
        let model = load.run(&mut go_on).unwrap();
        assert_eq!(answer(&model), expected);
    }
}

#[test]
fn a_model_loads_from_memory() {
    let files = std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap()).map(|entry| {
        let bytes = Bytes::owned(std::fs::read(entry.path()).unwrap());
        (entry.file_name().into_string().unwrap(), bytes)
    });
    let source = Source::memory("game.pak", files.collect::<BTreeMap<_, _>>());
    let engine = engine(BackendChoice::Cpu);
    let model = Load::source(&engine, source).run(&mut go_on).unwrap();
    let disk = loaded(&engine);
    assert_eq!(answer(&model), answer(&disk));
    assert_eq!(model.identity(), disk.identity());
}

#[test]
fn caps_are_hard_and_estimates_exact() {
    let kinds = [None, Some(KvType::Q8)];
    for (backend, kv_type) in backends().into_iter().flat_map(|backend| kinds.map(|kind| (backend, kind))) {
        let session = SessionOptions { context: Some(64), kv_type, ..Default::default() };
        let unlimited = engine(backend);
        let estimate = Load::path(&unlimited, folder()).estimate(&session).unwrap();
        let model = loaded(&unlimited);
        assert_eq!(unlimited.used(), estimate.weights);
        let one = Session::new(&model, &session).unwrap();
        let taken = awqua::engine::Bytes {
            host: unlimited.used().host - estimate.weights.host,
            device: unlimited.used().device - estimate.weights.device,
        };
        assert_eq!(taken.host + taken.device, one.bytes());
        assert!(taken.host <= estimate.session.host && taken.device <= estimate.session.device);
        let (most, least) = (estimate.session.host + estimate.session.device, one.bytes());
        assert!(most < 2 * least + (4 << 20), "{most} estimated, {least} taken");
        drop(one);
        assert_eq!(unlimited.used(), estimate.weights);

        let sum = |bytes: awqua::engine::Bytes| bytes.host + bytes.device;
        let capped = |bytes: u64| {
            let budget = Some(bytes);
            Engine::new(EngineOptions { backend, host_budget: budget, device_budget: budget, ..Default::default() })
        };
        let error = Load::path(&capped(sum(estimate.weights) - 1), folder()).run(&mut go_on).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfMemory);
        assert!(error.to_string().contains(&sum(estimate.weights).to_string()), "{error}");
        let tight = capped(sum(estimate.weights) + most);
        let model = loaded(&tight);
        let one = Session::new(&model, &session).unwrap();
        let error = Session::new(&model, &session).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfMemory);
        assert!(error.to_string().contains("bytes of"), "{error}");
        drop(one);
        say(&mut Session::new(&model, &session).unwrap());
        let error = Session::new(&model, &SessionOptions { context: Some(1 << 20), ..session }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn compiled_kernels_survive_a_restart() {
    if backends().len() < 2 {
        return;
    }
    let engine = engine(BackendChoice::Wgpu);
    assert!(engine.pipeline_cache().is_none());
    let expected = answer(&loaded(&engine));
    let Some(saved) = engine.pipeline_cache() else { return };
    let mut damaged = saved.clone();
    *damaged.last_mut().unwrap() ^= 1;
    for cache in [saved.clone(), damaged, saved[..saved.len() / 2].to_vec(), Vec::new(), b"awqpipe1".to_vec()] {
        let pipeline_cache = Some(Arc::new(cache));
        let engine = Engine::new(EngineOptions { backend: BackendChoice::Wgpu, pipeline_cache, ..Default::default() });
        assert_eq!(answer(&loaded(&engine)), expected);
    }
}
