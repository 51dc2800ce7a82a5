//! Answers made in ticks: whatever the budgets, whatever was computed before, and whatever is lost meanwhile.

#[cfg(all(feature = "cuda", target_os = "linux", target_arch = "x86_64"))]
mod machine;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use awqua::backend::KvType;
use awqua::engine::Trim;
use awqua::session::{Event, Phase, TickBudget};
use awqua::{
    BackendChoice, CancelToken, Engine, EngineOptions, ErrorKind, GenerateOptions, Load, Model, Sampling, Session,
    SessionOptions, StopReason,
};

const PROMPT: &str = "It was a fine morning, and Emma walked along the river to the old mill. The wheel stood still, \
                      and a small grey cat sat on the step and looked at her. Emma had never seen a cat there.";

fn load(backend: BackendChoice) -> awqua::Result<Arc<Model>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/arch/llama-llama3rope-awq-gemm-g64");
    let engine = Engine::new(EngineOptions { backend, ..Default::default() });
    Load::path(&engine, folder).run(&mut |_| ControlFlow::Continue(()))
}

/// On the CPU, and on the GPU where there is one; shared by the tests that leave them whole.
fn models() -> &'static [Arc<Model>] {
    static MODELS: OnceLock<Vec<Arc<Model>>> = OnceLock::new();
    MODELS.get_or_init(|| [load(BackendChoice::Cpu).ok(), gpu()].into_iter().flatten().collect())
}

fn gpu() -> Option<Arc<Model>> {
    let gpu = if cfg!(feature = "wgpu") { load(BackendChoice::Wgpu).ok() } else { None };
    assert!(gpu.is_some() || std::env::var_os("AWQUA_REQUIRE_GPU").is_none(), "AWQUA_REQUIRE_GPU is set");
    gpu
}

/// The smallest steps, one piece a tick: how many an answer takes depends on no clock.
const SMALLEST: TickBudget = TickBudget { host: Some(Duration::ZERO), device: Some(Duration::ZERO) };

/// Ticks that an answer takes, and some of them, `on_cpu` or half as many.
fn moments(session: &mut Session, options: &GenerateOptions, on_cpu: usize) -> Vec<usize> {
    let prompt = ids(session.model(), PROMPT);
    session.reset();
    session.begin(&prompt, options.clone()).unwrap();
    let (_, ticks) = finish(session, &SMALLEST, &mut |_, _| {});
    assert!(ticks > 20, "{ticks} ticks");
    let count = if session.model().backend_info().backend == "cpu" { on_cpu } else { on_cpu / 2 };
    (0..count).map(|i| i * ticks / count + i % 3).collect()
}

fn ids(model: &Model, text: &str) -> Vec<u32> {
    model.tokenizer().unwrap().encode(text, true).unwrap()
}

fn session(model: &Arc<Model>, deterministic: bool) -> Session {
    let options =
        SessionOptions { context: Some(160), chunk: Some(16), threads: Some(1), deterministic, ..Default::default() };
    Session::new(model, &options).unwrap()
}

fn seeded(max_tokens: usize) -> GenerateOptions {
    let sampling = Sampling { temperature: 0.9, top_k: 20, ..Default::default() };
    GenerateOptions { max_tokens, sampling, seed: 7, ignore_eos: true, ..Default::default() }
}

fn micros(host: u64, device: u64) -> TickBudget {
    TickBudget { host: Some(Duration::from_micros(host)), device: Some(Duration::from_micros(device)) }
}

/// Everything polled so far as text, and the end.
#[derive(Default)]
struct Heard {
    text: String,
    end: Option<StopReason>,
    losses: usize,
}

impl Heard {
    fn listen(&mut self, session: &mut Session) {
        let mut buffer = [0; 24];
        while let Some(event) = session.poll(&mut buffer) {
            match event {
                Event::Text { written, .. } => self.text += std::str::from_utf8(&buffer[..written]).unwrap(),
                Event::Done(reason) => self.end = Some(reason),
                Event::DeviceLost => self.losses += 1,
                Event::Progress { done, total } => assert!(done <= total),
                Event::MemoryPressure => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

/// Ticks the answer to its end, `each` between two ticks with their number.
fn finish(session: &mut Session, budget: &TickBudget, each: &mut dyn FnMut(&mut Session, usize)) -> (Heard, usize) {
    let mut heard = Heard::default();
    for ticks in 0.. {
        let tick = session.tick(budget).unwrap();
        heard.listen(session);
        if tick.phase == Phase::Idle {
            return (heard, ticks);
        }
        each(session, ticks);
        if tick.is_waiting && tick.phase != Phase::Lost {
            session.wait().unwrap();
        }
        assert!(ticks < 1_000_000);
    }
    unreachable!()
}

fn answer(session: &mut Session, text: &str, options: &GenerateOptions, budget: &TickBudget) -> String {
    let prompt = ids(session.model(), text);
    session.begin(&prompt, options.clone()).unwrap();
    let (heard, _) = finish(session, budget, &mut |_, _| {});
    assert_eq!(heard.end, Some(StopReason::MaxTokens));
    heard.text
}

#[test]
fn budgets_change_nothing() {
    for model in models() {
        let options = seeded(20);
        let mut first = session(model, true);
        let prompt = ids(model, PROMPT);
        let expected = first.generate(&prompt, &options, &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!((expected.ids.len(), expected.prefill_tokens), (20, prompt.len()));
        for budget in [TickBudget::UNLIMITED, SMALLEST, micros(30, 900), micros(2000, 9000), micros(100, 1 << 40)] {
            assert_eq!(answer(&mut session(model, true), PROMPT, &options, &budget), expected.text, "{budget:?}");
        }
        // Nor does what the session said before, though some of it is used again.
        assert_eq!(answer(&mut first, PROMPT, &options, &micros(20, 5000)), expected.text);
        answer(&mut first, "The travellers came down to the river, and", &seeded(9), &micros(500, 20_000));
        answer(&mut first, &PROMPT[..120], &seeded(3), &micros(500, 20_000));
        let found = first.generate(&prompt, &options, &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(found.text, expected.text);
        let again = first.generate(&prompt, &options, &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!((&again.text, again.reused % 16), (&expected.text, 0));
        assert!(again.reused + 16 >= prompt.len(), "{} reused", again.reused);
    }
}

#[test]
fn ticks_report_what_they_did() {
    for model in models() {
        let mut session = session(model, false);
        let prompt = ids(model, PROMPT);
        session.begin(&prompt, seeded(6)).unwrap();
        assert_eq!(session.phase(), Phase::Prefill);
        let refused = session.begin(&prompt, seeded(6)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput);
        let (mut done, mut made, mut phases) = (0, 0, vec![Phase::Prefill]);
        loop {
            let tick = session.tick(&SMALLEST).unwrap();
            assert!(tick.prompt_done >= done && tick.prompt_total == prompt.len(), "{tick:?}");
            made += tick.new_tokens;
            assert_eq!(tick.answer_tokens, made);
            done = tick.prompt_done;
            if phases.last() != Some(&tick.phase) {
                phases.push(tick.phase);
            }
            if tick.phase == Phase::Idle {
                break;
            }
            if tick.is_waiting {
                session.wait().unwrap();
            }
        }
        assert_eq!((phases, done, made), (vec![Phase::Prefill, Phase::Decode, Phase::Idle], prompt.len(), 6));
        assert_eq!(session.tick(&TickBudget::UNLIMITED).unwrap().phase, Phase::Idle);
    }
}

#[test]
fn cancelling_works_after_every_tick() {
    for model in models() {
        let mut session = session(model, true);
        let options = seeded(8);
        let expected = answer(&mut session, PROMPT, &options, &TickBudget::UNLIMITED);
        let prompt = ids(model, PROMPT);
        let moments = moments(&mut session, &options, 14);
        for (stop_at, from_outside) in moments.into_iter().flat_map(|at| [(at, true), (at, false)]) {
            session.reset();
            let cancel = CancelToken::default();
            session.begin(&prompt, GenerateOptions { cancel: cancel.clone(), ..options.clone() }).unwrap();
            let mut heard = Heard::default();
            for _ in 0..stop_at {
                if session.tick(&SMALLEST).unwrap().is_waiting {
                    session.wait().unwrap();
                }
            }
            if session.phase() == Phase::Idle {
                continue;
            }
            if from_outside {
                cancel.cancel()
            } else {
                session.cancel().unwrap()
            }
            assert_eq!(session.tick(&micros(0, 0)).unwrap().phase, Phase::Idle);
            heard.listen(&mut session);
            assert_eq!(heard.end, Some(StopReason::Cancelled));
            assert!(expected.starts_with(&heard.text));
            // It can be asked again at once, and goes on from what it has.
            if stop_at % 3 == 0 {
                assert_eq!(answer(&mut session, PROMPT, &options, &TickBudget::UNLIMITED), expected);
            }
        }
    }
}

#[test]
fn biases_and_bans_are_kept() {
    for model in models() {
        let mut session = session(model, false);
        let prompt = ids(model, PROMPT);
        let greedy = GenerateOptions { sampling: Sampling::greedy(), ..seeded(1) };
        let mut say = |options: &GenerateOptions| {
            session.generate(&prompt, options, &mut |_| ControlFlow::Continue(())).unwrap().ids[0]
        };
        let first = say(&greedy);
        let second = say(&GenerateOptions { banned: vec![first], ..greedy.clone() });
        assert_ne!(second, first);
        let bias = vec![(first, f32::NEG_INFINITY), (second, -1e4)];
        let third = say(&GenerateOptions { bias, ..greedy.clone() });
        assert!(third != first && third != second);
        assert_eq!(say(&GenerateOptions { bias: vec![(third, 1e4)], ..greedy.clone() }), third);
        let sampled = seeded(1);
        assert_eq!(say(&GenerateOptions { bias: vec![(third, 1e4)], ..sampled }), third);
        for bad in [
            GenerateOptions { banned: vec![1 << 20], ..greedy.clone() },
            GenerateOptions { bias: vec![(1 << 20, 0.0)], ..greedy.clone() },
            GenerateOptions { bias: vec![(1, f32::NAN)], ..greedy.clone() },
            GenerateOptions { bias: vec![(1, f32::INFINITY)], ..greedy },
        ] {
            let refused = session.begin(&prompt, bad).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::InvalidInput);
        }
    }
}

#[test]
fn weights_can_go_and_come_back_at_any_moment() {
    for model in [load(BackendChoice::Cpu).ok(), gpu()].into_iter().flatten() {
        let options = seeded(8);
        let mut session = session(&model, true);
        let expected = answer(&mut session, PROMPT, &options, &TickBudget::UNLIMITED);
        let weights = model.engine().used();
        let prompt = ids(&model, PROMPT);
        for at in moments(&mut session, &options, 6) {
            session.reset();
            session.begin(&prompt, options.clone()).unwrap();
            let (heard, _) = finish(&mut session, &SMALLEST, &mut |session, tick| {
                if tick == at {
                    model.evict();
                    let left = model.engine().used();
                    assert!(left.host + left.device < weights.host + weights.device);
                    assert_eq!(model.backend_info().backend, "none");
                    let refused = session.tick(&TickBudget::UNLIMITED).unwrap_err();
                    assert_eq!(refused.kind(), ErrorKind::Evicted);
                    model.restore();
                }
            });
            assert_eq!((heard.text.as_str(), heard.end), (expected.as_str(), Some(StopReason::MaxTokens)), "{at}");
        }
        assert_eq!(model.engine().used(), weights);
        model.evict();
        assert_eq!(Session::new(&model, &SessionOptions::default()).unwrap_err().kind(), ErrorKind::Evicted);
        model.evict();
        model.restore();
        model.restore();
    }
}

#[test]
fn a_lost_device_changes_no_token() {
    let Some(model) = gpu() else { return };
    let options = seeded(8);
    let mut session = session(&model, true);
    let expected = answer(&mut session, PROMPT, &options, &TickBudget::UNLIMITED);
    let prompt = ids(&model, PROMPT);
    let moments = moments(&mut session, &options, 6);
    for at in moments {
        session.reset();
        session.begin(&prompt, options.clone()).unwrap();
        let mut lost = false;
        let (heard, ticks) = finish(&mut session, &SMALLEST, &mut |session, tick| {
            if tick == at {
                model.engine().force_loss();
                lost = true;
            }
            if lost && session.phase() == Phase::Lost {
                // Nothing happens before the engine recovers, and nothing is lost by asking.
                assert_eq!(session.tick(&TickBudget::UNLIMITED).unwrap().phase, Phase::Lost);
                assert!(model.engine().is_lost());
                model.engine().recover().unwrap();
                model.engine().recover().unwrap();
                lost = false;
            }
        });
        assert!(ticks > at);
        assert_eq!((heard.text.as_str(), heard.end, heard.losses), (expected.as_str(), Some(StopReason::MaxTokens), 1));
    }
    // The fourth loss within minutes is one too many where the CPU is no choice.
    model.engine().force_loss();
    session.begin(&prompt, options).unwrap();
    while session.tick(&TickBudget::UNLIMITED).unwrap().phase != Phase::Lost {}
    assert_eq!(model.engine().recover().unwrap_err().kind(), ErrorKind::DeviceLost);
    assert_eq!(session.tick(&TickBudget::UNLIMITED).unwrap().phase, Phase::Lost);
    session.cancel().unwrap();
}

#[test]
fn blocking_calls_survive_a_loss() {
    let Some(model) = gpu() else { return };
    let mut session = session(&model, true);
    let options = seeded(8);
    let expected = answer(&mut session, PROMPT, &options, &TickBudget::UNLIMITED);
    let prompt = ids(&model, PROMPT);
    session.set_prompt(&prompt, &CancelToken::default()).unwrap();
    model.engine().force_loss();
    let lost = session.generate(&prompt, &options, &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert_eq!(lost.kind(), ErrorKind::DeviceLost);
    let lost = session.set_prompt(&prompt, &CancelToken::default()).unwrap_err();
    assert_eq!(lost.kind(), ErrorKind::DeviceLost);
    model.engine().recover().unwrap();
    // What was in the cache is computed again before something is put behind it.
    session.set_prompt(&prompt[..20], &CancelToken::default()).unwrap();
    session.append(&prompt[20..], &CancelToken::default()).unwrap();
    assert_eq!(session.tokens(), prompt);
    let found = session.generate(&prompt, &options, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(found.text, expected);
}

#[test]
fn sessions_save_restore_and_fork() {
    for model in models() {
        let options = seeded(8);
        let mut first = session(model, true);
        let expected = answer(&mut first, PROMPT, &options, &TickBudget::UNLIMITED);
        let prompt = ids(model, PROMPT);
        let save = |session: &mut Session| {
            let mut bytes = vec![0; session.snapshot_bytes() as usize];
            session.save(&mut bytes).unwrap();
            bytes
        };
        let saved = save(&mut first);
        let mut second = session(model, true);
        second.restore(&saved).unwrap();
        assert_eq!(second.tokens(), first.tokens());
        assert_eq!(save(&mut second), saved);
        // Both go on as if the other one did not exist.
        let mut fork = second.fork().unwrap();
        for session in [&mut second, &mut fork, &mut first] {
            let found = session.generate(&prompt, &options, &mut |_| ControlFlow::Continue(())).unwrap();
            assert_eq!(found.text, expected);
            assert!(found.reused >= 32, "{} reused", found.reused);
            answer(session, "The sun was low", &seeded(5), &TickBudget::UNLIMITED);
        }
        // The shared tokens survive whoever computed them, and a fork of a fork.
        let mut root = session(model, false);
        root.set_prompt(&prompt, &CancelToken::default()).unwrap();
        let mut child = root.fork().unwrap();
        let mut grandchild = child.fork().unwrap();
        root.reset();
        drop(root);
        child.append(&prompt[..9], &CancelToken::default()).unwrap();
        let found = grandchild.generate(&prompt, &options, &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(found.reused, prompt.len() - 1);

        let restore = |bytes: &[u8]| session(model, true).restore(bytes).unwrap_err();
        for at in (0..saved.len()).step_by(saved.len() / 97) {
            let mut damaged = saved.clone();
            damaged[at] ^= 0x40;
            assert_eq!(restore(&damaged).kind(), ErrorKind::InvalidInput, "byte {at}");
        }
        for len in [0, 7, 40, saved.len() - 1] {
            assert_eq!(restore(&saved[..len]).kind(), ErrorKind::InvalidInput, "{len} bytes");
        }
        let other = SessionOptions { context: Some(8), ..Default::default() };
        let refused = Session::new(model, &other).unwrap().restore(&saved).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ContextFull);
        assert_eq!(first.save(&mut [0; 3]).unwrap_err().kind(), ErrorKind::InvalidInput);
        // Another type of cache: the tokens are computed again.
        let kv_type = Some(match first.kv_type() {
            KvType::F16 => KvType::F32,
            KvType::F32 | KvType::Q8 => KvType::F16,
        });
        let mut wider =
            Session::new(model, &SessionOptions { kv_type, context: Some(160), ..Default::default() }).unwrap();
        wider.restore(&saved).unwrap();
        wider.append(&prompt[..3], &CancelToken::default()).unwrap();
        let count = saved_tokens(&saved);
        assert_eq!(wider.tokens().len(), count + 3);
        // Nothing at all is a state as well.
        let mut empty = session(model, true);
        let nothing = save(&mut empty);
        empty.restore(&nothing).unwrap();
        assert!(empty.fork().unwrap().tokens().is_empty());
    }
}

#[test]
fn caches_of_8_bits_are_kept_and_shared() {
    for model in models() {
        let open = |kv_type| {
            let options = SessionOptions {
                kv_type: Some(kv_type),
                context: Some(160),
                chunk: Some(16),
                threads: Some(1),
                deterministic: true,
                ..Default::default()
            };
            Session::new(model, &options).unwrap()
        };
        let options = seeded(8);
        let mut first = open(KvType::Q8);
        assert_eq!(first.kv_type(), KvType::Q8);
        let (small, large) = (first.bytes(), open(KvType::F16).bytes());
        assert!(small < large, "{small} bytes beside {large}");
        let expected = answer(&mut first, PROMPT, &options, &TickBudget::UNLIMITED);
        let prompt = ids(model, PROMPT);
        let mut saved = vec![0xa5; first.snapshot_bytes() as usize];
        first.save(&mut saved).unwrap();
        let mut second = open(KvType::Q8);
        second.restore(&saved).unwrap();
        let mut again = vec![0x5a; second.snapshot_bytes() as usize];
        second.save(&mut again).unwrap();
        assert!(again == saved);
        let mut fork = second.fork().unwrap();
        // Half precision takes the tokens alone.
        let mut other = open(KvType::F16);
        other.restore(&saved).unwrap();
        other.append(&prompt[..3], &CancelToken::default()).unwrap();
        assert_eq!(other.tokens().len(), saved_tokens(&saved) + 3);
        for session in [&mut second, &mut fork, &mut first] {
            let found = session.generate(&prompt, &options, &mut |_| ControlFlow::Continue(())).unwrap();
            assert_eq!(found.text, expected);
            assert!(found.reused >= 32, "{} reused", found.reused);
            answer(session, "The sun was low", &seeded(5), &TickBudget::UNLIMITED);
            let found = answer(session, PROMPT, &options, &micros(300, 3000));
            assert_eq!(found, expected);
        }
    }
}

/// Forks of one session keep their common start once on a GPU, and answer as a session that computed it; deterministic
/// ones through wgpu where they are to.
#[test]
fn forks_keep_their_start_once() {
    // Engines of their own, whose memory nobody else uses.
    for model in [load(BackendChoice::Cpu).ok(), gpu()].into_iter().flatten() {
        forks_share(&model, &[(false, None), (true, None), (true, Some(KvType::Q8))], true);
    }
}

/// Deterministic ones on CUDA in any case.
#[cfg(all(feature = "cuda", target_os = "linux", target_arch = "x86_64"))]
#[test]
fn forks_keep_their_start_once_on_cuda() {
    if machine::is_on_machine("forks_keep_their_start_once_on_cuda", &machine::ALL_CAPABILITIES[..1]) {
        let model = load(BackendChoice::Cuda).expect("the fixture loads");
        forks_share(&model, &[(true, None), (false, Some(KvType::Q8))], false);
    }
}

/// For each of `kinds`, whether sessions are deterministic and their caches' type; `asks` for shared memory where it
/// has to be asked for.
fn forks_share(model: &Arc<Model>, kinds: &[(bool, Option<KvType>)], asks: bool) {
    for &(deterministic, kv_type) in kinds {
        let name = model.backend_info().backend;
        let device = || model.engine().used().device;
        let options = SessionOptions {
            context: Some(448),
            chunk: Some(64),
            threads: Some(1),
            deterministic,
            share_forks: deterministic && asks,
            kv_type,
            ..Default::default()
        };
        let vocab = model.config().vocab_size as u32;
        let prompt: Vec<u32> = (0..210).map(|i| (3 + 37 * i) % vocab).collect();
        let greedy = GenerateOptions { sampling: Sampling::greedy(), ..seeded(6) };
        let question = |i: u32| [prompt.clone(), vec![20 + i, 30 + 2 * i, 40]].concat();
        let answer = |session: &mut Session, i: u32| {
            session.generate(&question(i), &greedy, &mut |_| ControlFlow::Continue(())).unwrap().ids
        };
        // What a session says that has its start for itself.
        let alone = |i: u32| {
            let mut session = Session::new(model, &options).unwrap();
            session.set_prompt(&prompt, &CancelToken::default()).unwrap();
            answer(&mut session, i)
        };
        let before = device();
        let mut root = Session::new(model, &options).unwrap();
        let whole = device() - before;
        root.set_prompt(&prompt, &CancelToken::default()).unwrap();
        let mut forks: Vec<Session> = (0..4).map(|_| root.fork().unwrap()).collect();
        let taken = device() - before - whole;
        let plain = Session::new(model, &options).unwrap();
        if name != "cpu" {
            // 192 of 448 positions are common.
            let position = (root.snapshot_bytes() - plain.snapshot_bytes()) / 210 - 4;
            let kv = 192 * position;
            assert_eq!(taken, 4 * (plain.bytes() - kv) + kv, "{name}");
            assert_eq!(forks[0].bytes(), plain.bytes() - kv);
        }
        drop(plain);
        // Everybody goes on, the root last and first, as if alone.
        for i in [0, 3, 1, 2] {
            assert_eq!(answer(&mut forks[i as usize], i), alone(i), "{name}, fork {i}");
        }
        assert_eq!(answer(&mut root, 9), alone(9), "{name}, the root");
        // Forks of forks, and of a root that has gone on.
        let mut grandchild = forks[1].fork().unwrap();
        assert_eq!(grandchild.tokens(), forks[1].tokens());
        let saved = {
            let mut bytes = vec![0; grandchild.snapshot_bytes() as usize];
            grandchild.save(&mut bytes).unwrap();
            bytes
        };
        let mut again = vec![0; saved.len()];
        forks[1].save(&mut again).unwrap();
        assert!(saved == again, "{name}");
        assert_eq!(answer(&mut grandchild, 5), alone(5), "{name}");
        // One that overwrites what is common gets a copy of its own, and the others do not notice.
        let other: Vec<u32> = prompt.iter().rev().copied().take(80).collect();
        forks[0].truncate(70);
        let short = GenerateOptions { max_tokens: 3, ..greedy.clone() };
        let said = forks[0].generate(&other, &short, &mut |_| ControlFlow::Continue(())).unwrap().ids;
        let mut fresh = Session::new(model, &options).unwrap();
        assert_eq!(said, fresh.generate(&other, &short, &mut |_| ControlFlow::Continue(())).unwrap().ids, "{name}");
        assert_eq!(forks[0].bytes(), fresh.bytes());
        forks[2].restore(&saved).unwrap();
        assert_eq!(forks[2].tokens(), forks[1].tokens());
        assert_eq!(answer(&mut forks[3], 4), alone(4), "{name}");
        drop((root, forks, grandchild, fresh));
        assert_eq!(device(), before, "{name}");
    }
}

/// Tokens of a snapshot: the second word behind the two checksums.
fn saved_tokens(snapshot: &[u8]) -> usize {
    u32::from_le_bytes(snapshot[28..32].try_into().unwrap()) as usize
}

#[test]
fn embeddings_are_means_of_hidden_states() {
    let mut found = Vec::new();
    for model in models() {
        // Chunks of other sizes would round differently.
        let mut session = session(model, true);
        let prompt = ids(model, PROMPT);
        let whole = session.embed(&prompt).unwrap();
        assert_eq!(whole.len(), model.config().hidden_size);
        session.begin_embedding(&prompt, CancelToken::default()).unwrap();
        assert!(session.embedding().is_none());
        let (heard, ticks) = finish(&mut session, &SMALLEST, &mut |_, _| {});
        assert_eq!(heard.end, Some(StopReason::Complete));
        assert!(ticks > 3);
        assert_eq!(session.embedding().unwrap(), whole);
        session.begin_embedding(&prompt, CancelToken::default()).unwrap();
        session.tick(&SMALLEST).unwrap();
        session.cancel().unwrap();
        assert!(session.embedding().is_none());
        // A text twice is not the same as once: positions and contexts differ.
        let other = session.embed(&prompt[..5]).unwrap();
        assert_ne!(other, whole);
        assert!(!answer(&mut session, PROMPT, &seeded(3), &TickBudget::UNLIMITED).is_empty());
        found.push(whole);
    }
    if let [cpu, gpu] = found.as_slice() {
        let largest = cpu.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert!(cpu.iter().zip(gpu).all(|(a, b)| (a - b).abs() < 0.01 * largest));
    }
}

#[test]
fn memory_is_given_back_on_request() {
    let model = load(BackendChoice::Cpu).unwrap();
    let options = seeded(4);
    let (mut busy, mut idle) = (session(&model, true), session(&model, true));
    let expected = answer(&mut idle, PROMPT, &options, &TickBudget::UNLIMITED);
    let before = model.engine().used();
    busy.begin(&ids(&model, PROMPT), options.clone()).unwrap();
    model.engine().request_trim(Trim::Sessions);
    let mut pressed = 0;
    for session in [&mut idle, &mut busy] {
        session.tick(&micros(0, 0)).unwrap();
        while let Some(event) = session.poll(&mut [0; 64]) {
            pressed += usize::from(matches!(event, Event::MemoryPressure));
        }
    }
    assert_eq!((pressed, idle.bytes()), (2, 0));
    assert!(model.engine().used().host < before.host && busy.bytes() > 0);
    assert_eq!(answer(&mut idle, PROMPT, &options, &TickBudget::UNLIMITED), expected);
    busy.cancel().unwrap();
    model.engine().request_trim(Trim::Weights);
    idle.tick(&micros(0, 0)).unwrap();
    assert_eq!(model.engine().used().host, busy.bytes());
    model.restore();
    assert_eq!(answer(&mut idle, PROMPT, &options, &TickBudget::UNLIMITED), expected);
}
