//! Sessions that decode together: the tokens of each are those it makes alone, whoever comes and goes meanwhile.

#[cfg(all(feature = "cuda", target_os = "linux", target_arch = "x86_64"))]
mod machine;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use awqua::backend::{Backend, Budget, KvType, LogitsRows, Members, Next, Progress, Runner, RunnerConfig, Step};
use awqua::session::sampler::SampleRequest;
use awqua::session::{Event, Phase, TickBudget};
use awqua::{
    BackendChoice, Batch, CancelToken, Engine, EngineOptions, ErrorKind, GenerateOptions, Load, Model, Sampling,
    Session, SessionOptions, StopReason,
};
use awqua_tests::decoder::{CONTEXT, Case, Rng, Style, build, cases, config, error, rope_rows, tokens, write_rope};
use awqua_tests::oracle::{Dequantised, Oracle};

const TOPICS: [&str; 5] = [
    "It was a fine morning, and Emma walked along the river to the old mill.",
    "The cat",
    "The old miller said that nobody had seen the wheel turn since the flood, and that was that.",
    "In the evening the lamps were lit, one after the other, and the street was quiet.",
    "A grey cat sat on the step and looked at her. Emma had never seen a cat there before, and she stopped and waited",
];

fn load(backend: BackendChoice) -> awqua::Result<Arc<Model>> {
    load_on(&Engine::new(EngineOptions { backend, ..Default::default() }))
}

fn load_on(engine: &Arc<Engine>) -> awqua::Result<Arc<Model>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/arch/llama-llama3rope-awq-gemm-g64");
    Load::path(engine, folder).run(&mut |_| ControlFlow::Continue(()))
}

fn cpu() -> Arc<Model> {
    static MODEL: OnceLock<Arc<Model>> = OnceLock::new();
    MODEL.get_or_init(|| load(BackendChoice::Cpu).expect("the fixture loads")).clone()
}

/// Runs `test` on the CPU, and on the GPU where there is one, which one test has at a time: wgpu 30 fails, seldom, when a
/// thread waits for a device while others submit to it.
fn on_each_model(test: impl Fn(&Arc<Model>)) {
    test(&cpu());
    on_gpu(test);
}

/// The model on the GPU, once one was looked for.
static GPU: Mutex<Option<Option<Arc<Model>>>> = Mutex::new(None);

/// The second half of [`on_each_model`].
fn on_gpu(test: impl Fn(&Arc<Model>)) {
    let mut gpu = GPU.lock().unwrap_or_else(PoisonError::into_inner);
    let open = || if cfg!(feature = "wgpu") { load(BackendChoice::Wgpu).ok() } else { None };
    match gpu.get_or_insert_with(open) {
        Some(gpu) => test(gpu),
        None => assert!(std::env::var_os("AWQUA_REQUIRE_GPU").is_none(), "AWQUA_REQUIRE_GPU is set"),
    }
}

fn is_exact(model: &Model) -> bool {
    model.backend_info().backend == "cpu"
}

fn options(deterministic: bool) -> SessionOptions {
    SessionOptions { context: Some(128), chunk: Some(16), threads: Some(1), deterministic, ..Default::default() }
}

fn sessions(model: &Arc<Model>, n: usize) -> Vec<Session> {
    (0..n).map(|_| Session::new(model, &options(false)).unwrap()).collect()
}

fn prompt(model: &Model, i: usize) -> Vec<u32> {
    model.tokenizer().unwrap().encode(TOPICS[i % TOPICS.len()], true).unwrap()
}

/// Greedy, drawn, with penalties (which are chosen by the host after each pass), and from the whole vocabulary; of
/// lengths of their own.
fn request(i: usize) -> GenerateOptions {
    let drawn = Sampling { temperature: 0.9, top_k: 20, ..Default::default() };
    let sampling = match i % 4 {
        0 => Sampling::greedy(),
        1 => drawn,
        2 => Sampling { repetition_penalty: 1.3, ..Sampling::greedy() },
        _ => Sampling { top_k: 0, ..drawn },
    };
    GenerateOptions { max_tokens: 9 + 4 * i, sampling, seed: i as u64, ignore_eos: true, ..Default::default() }
}

fn greedy(max_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_tokens, sampling: Sampling::greedy(), ignore_eos: true, ..Default::default() }
}

/// What each session makes alone.
fn alone(model: &Arc<Model>, n: usize, request: &dyn Fn(usize) -> GenerateOptions) -> Vec<String> {
    let make = |(i, mut session): (usize, Session)| {
        session.generate(&prompt(model, i), &request(i), &mut |_| ControlFlow::Continue(())).unwrap().text
    };
    sessions(model, n).into_iter().enumerate().map(make).collect()
}

#[derive(Default)]
struct Heard {
    text: String,
    end: Option<StopReason>,
}

impl Heard {
    fn listen(&mut self, session: &mut Session) {
        let mut buffer = [0; 24];
        while let Some(event) = session.poll(&mut buffer) {
            match event {
                Event::Text { written, .. } => self.text += std::str::from_utf8(&buffer[..written]).unwrap(),
                Event::Done(reason) => self.end = Some(reason),
                Event::Progress { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

fn micros(host: u64, device: u64) -> TickBudget {
    TickBudget { host: Some(Duration::from_micros(host)), device: Some(Duration::from_micros(device)) }
}

/// Whether `answer` follows `prompt` by likely tokens, where a choice between two that are about equal may go either way.
fn is_greedy(model: &Arc<Model>, prompt: &[u32], answer: &[u32]) -> bool {
    let ids: Vec<u32> = prompt.iter().chain(answer).copied().collect();
    let options = SessionOptions { context: Some(256), ..options(false) };
    let mut session = Session::new(model, &options).unwrap();
    let mut good = true;
    let mut visit = |position: usize, logits: &[f32]| {
        if let Some(&next) = ids.get(position + 1).filter(|_| position + 1 >= prompt.len()) {
            let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let largest = logits.iter().fold(0.0f32, |largest, logit| largest.max(logit.abs()));
            good &= logits[next as usize] >= best - 0.01 * largest;
        }
    };
    session.score(&ids, &CancelToken::default(), &mut visit).unwrap();
    good
}

/// Ticks all of them to the end; the sessions' texts.
fn together(batch: &mut Batch, sessions: &mut [Session], budget: &TickBudget) -> Vec<String> {
    let mut heard: Vec<Heard> = sessions.iter().map(|_| Heard::default()).collect();
    let mut ticks = Vec::new();
    for turn in 0.. {
        batch.tick(sessions, budget, &mut ticks).unwrap();
        assert_eq!(ticks.len(), sessions.len());
        let mut waiting = true;
        for ((session, heard), tick) in sessions.iter_mut().zip(&mut heard).zip(&ticks) {
            heard.listen(session);
            let tick = tick.as_ref().unwrap();
            waiting &= tick.is_waiting || tick.phase == Phase::Idle;
        }
        if sessions.iter().all(|session| !session.is_busy()) {
            break;
        }
        if waiting {
            batch.wait(sessions).unwrap();
        }
        assert!(turn < 1_000_000, "{budget:?}, {} passes: {ticks:?}", batch.passes());
    }
    heard
        .into_iter()
        .map(|heard| {
            assert_eq!(heard.end, Some(StopReason::MaxTokens));
            heard.text
        })
        .collect()
}

fn each_answers_as_alone(model: &Arc<Model>) {
    let n = TOPICS.len();
    // Numbers on GPUs depend on the number of rows a little: only greedy choices can be judged there.
    let asked: &dyn Fn(usize) -> GenerateOptions = if is_exact(model) { &request } else { &|i| greedy(9 + 4 * i) };
    let expected = alone(model, n, asked);
    let exact = [(8, micros(20, 0)), (2, TickBudget::UNLIMITED), (8, TickBudget::UNLIMITED), (3, micros(300, 5000))];
    for &(most, budget) in if is_exact(model) { &exact[..] } else { &exact[2..] } {
        let mut batch = Batch::new(model, most, &options(false)).unwrap();
        let mut sessions = sessions(model, n);
        for (i, session) in sessions.iter_mut().enumerate() {
            session.begin(&prompt(model, i), asked(i)).unwrap();
        }
        let found = together(&mut batch, &mut sessions, &budget);
        if is_exact(model) {
            assert_eq!(found, expected, "at most {most}, {budget:?}");
        }
        for (i, session) in sessions.iter().enumerate() {
            let (before, after) = session.tokens().split_at(prompt(model, i).len());
            assert!(before == prompt(model, i) && after.len() >= asked(i).max_tokens - 1);
            assert!(is_exact(model) || is_greedy(model, before, after), "session {i}, at most {most}, {budget:?}");
        }
        // Nobody makes more tokens in fewer passes than one a token; sessions that a budget keeps apart may meet in few.
        if batch.shares_passes() && most == 8 {
            assert!(batch.passes() > 8, "{} passes", batch.passes());
        }
    }
}

#[test]
fn sessions_answer_as_they_do_alone() {
    on_each_model(each_answers_as_alone);
}

/// Members are missing from ticks, ticked by themselves, cancelled and dropped in the middle of passes.
fn any_may_come_and_go(model: &Arc<Model>) {
    let n = TOPICS.len();
    let asked: &dyn Fn(usize) -> GenerateOptions = if is_exact(model) { &request } else { &|i| greedy(9 + 4 * i) };
    let expected = alone(model, n, asked);
    let small = if is_exact(model) { micros(10, 0) } else { micros(0, 2000) };
    for seed in 0..if is_exact(model) { 6 } else { 1 } {
        let mut rng = Rng(seed + 5);
        let mut chance = |one_in: u32| rng.word().is_multiple_of(one_in);
        let mut batch = Batch::new(model, 4, &options(false)).unwrap();
        let mut other = Batch::new(model, 2, &options(false)).unwrap();
        let mut all = sessions(model, n + 2);
        let mut heard: Vec<Heard> = all.iter().map(|_| Heard::default()).collect();
        for (i, session) in all.iter_mut().enumerate() {
            session.begin(&prompt(model, i), if i < n { asked(i) } else { greedy(60) }).unwrap();
        }
        let mut ticks = Vec::new();
        let mut turns = 0;
        while all[..n].iter().any(Session::is_busy) {
            turns += 1;
            assert!(turns < 1_000_000);
            // The last two are only there to go away.
            if turns == 20 {
                all[n].cancel().unwrap();
                all.truncate(n + 1);
            }
            if turns == 30 {
                all[n].truncate(1);
            }
            let budget = if chance(4) { micros(2000, 20_000) } else { small };
            if chance(9) {
                let i = turns % all.len();
                all[i].tick(&budget).unwrap();
            }
            let away = turns % 7 % all.len();
            let leave = chance(3);
            let mut here: Vec<&mut Session> =
                all.iter_mut().enumerate().filter(|(i, _)| !leave || *i != away).map(|(_, session)| session).collect();
            if chance(5) {
                here.reverse();
            }
            let (few, rest) = here.split_at_mut(2);
            if chance(6) {
                other.tick(few, &budget, &mut ticks).unwrap();
                batch.tick(rest, &budget, &mut ticks).unwrap();
            } else {
                batch.tick(&mut here, &budget, &mut ticks).unwrap();
            }
            assert!(ticks.iter().all(Result::is_ok), "{ticks:?}");
            all.iter_mut().zip(&mut heard).for_each(|(session, heard)| heard.listen(session));
            if !is_exact(model) {
                all.iter_mut().for_each(|session| session.wait().unwrap());
            }
        }
        for i in 0..n {
            assert_eq!(heard[i].end, Some(StopReason::MaxTokens));
            if is_exact(model) {
                assert_eq!(heard[i].text, expected[i], "session {i} of seed {seed}");
            } else {
                let (before, after) = all[i].tokens().split_at(prompt(model, i).len());
                assert!(is_greedy(model, before, after), "session {i} of seed {seed}");
            }
        }
        assert_eq!(heard[n].end, Some(StopReason::Cancelled));
    }
}

#[test]
fn members_come_and_go_at_any_time() {
    on_each_model(any_may_come_and_go);
}

#[test]
fn deterministic_sessions_are_stepped_alone() {
    on_each_model(|model| {
        let expected = {
            let mut session = Session::new(model, &options(true)).unwrap();
            let mut make = |i: usize| {
                session.generate(&prompt(model, i), &request(i), &mut |_| ControlFlow::Continue(())).unwrap().text
            };
            [make(0), make(1), make(3)]
        };
        let mut batch = Batch::new(model, 4, &options(true)).unwrap();
        let mut sessions: Vec<_> = (0..3).map(|_| Session::new(model, &options(true)).unwrap()).collect();
        for (session, i) in sessions.iter_mut().zip([0, 1, 3]) {
            session.begin(&prompt(model, i), request(i)).unwrap();
        }
        assert_eq!(together(&mut batch, &mut sessions, &TickBudget::UNLIMITED), expected);
        assert_eq!(batch.passes(), 0);
    });
}

#[test]
fn one_that_fails_or_is_cancelled_leaves_the_others_alone() {
    on_each_model(|model| {
        let mut batch = Batch::new(model, 4, &options(false)).unwrap();
        let mut members = sessions(model, 3);
        let cancel = CancelToken::default();
        members[0].begin(&prompt(model, 0), GenerateOptions { cancel: cancel.clone(), ..greedy(60) }).unwrap();
        // Its answer does not fit the context.
        members[1].begin(&prompt(model, 4), greedy(200)).unwrap();
        let mut ticks = Vec::new();
        let mut heard = [Heard::default(), Heard::default(), Heard::default()];
        for turn in 0..100_000 {
            batch.tick(&mut members, &micros(200, 20_000), &mut ticks).unwrap();
            members.iter_mut().zip(&mut heard).for_each(|(session, heard)| heard.listen(session));
            if ticks[0].as_ref().unwrap().answer_tokens >= 12 {
                cancel.cancel();
            }
            if turn == 3 {
                members[2].begin(&prompt(model, 1), greedy(5)).unwrap();
            }
            if heard.iter().all(|heard| heard.end.is_some()) {
                break;
            }
            batch.wait(&mut members).unwrap();
        }
        let ends: Vec<_> = heard.iter().map(|heard| heard.end.clone()).collect();
        let expected = [StopReason::Cancelled, StopReason::ContextFull, StopReason::MaxTokens];
        assert_eq!(ends, expected.map(Some));
        let answer = &members[1].tokens()[prompt(model, 4).len()..];
        assert!(is_greedy(model, &prompt(model, 4), answer));
    });
}

#[test]
fn weights_may_go_and_come_back() {
    on_each_model(|model| {
        // A model of its own, as others would notice.
        let model = &load_on(model.engine()).unwrap();
        let expected = alone(model, 2, &|_| greedy(20));
        let mut batch = Batch::new(model, 2, &options(false)).unwrap();
        let mut members = sessions(model, 2);
        let mut heard = [Heard::default(), Heard::default()];
        for (i, session) in members.iter_mut().enumerate() {
            session.begin(&prompt(model, i), greedy(20)).unwrap();
        }
        let mut ticks = Vec::new();
        let mut evictions = 0;
        for turn in 1..100_000 {
            batch.tick(&mut members, &micros(100, 20_000), &mut ticks).unwrap();
            members.iter_mut().zip(&mut heard).for_each(|(session, heard)| heard.listen(session));
            if heard.iter().all(|heard| heard.end.is_some()) {
                break;
            }
            if ticks.iter().all(Result::is_ok) {
                batch.wait(&mut members).unwrap();
            } else {
                assert!(ticks.iter().all(|t| t.as_ref().err().is_none_or(|e| e.kind() == ErrorKind::Evicted)));
                model.restore();
            }
            if turn % 9 == 0 && evictions < 3 {
                model.evict();
                evictions += 1;
            }
        }
        assert!(evictions > 0);
        for (i, heard) in heard.iter().enumerate() {
            assert_eq!(heard.end, Some(StopReason::MaxTokens));
            assert!(!is_exact(model) || heard.text == expected[i], "{:?} is not {:?}", heard.text, expected[i]);
        }
    });
}

#[test]
fn a_timed_pass_leaves_sessions_as_they_were() {
    on_gpu(|model| {
        let (n, turns) = (TOPICS.len(), 2);
        let talk = |profiled: bool| -> Vec<Vec<u32>> {
            let mut batch = Batch::new(model, 8, &options(false)).unwrap();
            let mut sessions = sessions(model, n);
            for turn in 0..turns {
                for (i, session) in sessions.iter_mut().enumerate() {
                    let ids = [session.tokens(), &prompt(model, i)].concat();
                    session.begin(&ids, greedy(6)).unwrap();
                }
                together(&mut batch, &mut sessions, &TickBudget::UNLIMITED);
                if profiled && turn == 0 && batch.shares_passes() {
                    let times = batch.profile(&mut sessions, 7).unwrap();
                    assert!(!times.is_empty() && times.iter().all(|op| op.seconds.is_finite()));
                    let too_few = batch.profile(&mut sessions[..1], 7).unwrap_err();
                    assert_eq!(too_few.kind(), ErrorKind::Unsupported);
                    assert_eq!(batch.profile(&mut sessions, u32::MAX).unwrap_err().kind(), ErrorKind::InvalidInput);
                }
            }
            sessions.iter().map(|session| session.tokens().to_vec()).collect()
        };
        assert_eq!(talk(true), talk(false));
    });
    let mut sessions = sessions(&cpu(), 4);
    let mut batch = Batch::new(&cpu(), 4, &options(false)).unwrap();
    assert_eq!(batch.profile(&mut sessions, 7).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn timing_leaves_a_pass_under_way_alone() {
    on_gpu(|model| {
        let mut batch = Batch::new(model, 8, &options(false)).unwrap();
        let mut idle = sessions(model, 3);
        for (i, session) in idle.iter_mut().enumerate() {
            session.generate(&prompt(model, i), &greedy(1), &mut |_| ControlFlow::Continue(())).unwrap();
        }
        let mut busy = sessions(model, 3);
        for (i, session) in busy.iter_mut().enumerate() {
            session.begin(&prompt(model, i), greedy(30)).unwrap();
        }
        let (mut ticks, mut refused) = (Vec::new(), 0);
        // All have to make tokens before little at a time is enough for a pass.
        while batch.passes() == 0 && batch.shares_passes() {
            batch.tick(&mut busy, &micros(2000, 20_000), &mut ticks).unwrap();
        }
        while refused < 3 && busy.iter().any(Session::is_busy) {
            batch.tick(&mut busy, &micros(0, 1), &mut ticks).unwrap();
            assert!(ticks.iter().all(Result::is_ok), "{ticks:?}");
            if let Err(error) = batch.profile(&mut idle, 7) {
                assert!(!batch.shares_passes() || error.message() == "a pass is under way", "{error}");
                refused += 1;
            }
        }
        assert!(refused > 0 || !batch.shares_passes(), "no pass was under way");
        together(&mut batch, &mut busy, &TickBudget::UNLIMITED);
        for (i, session) in busy.iter().enumerate() {
            let (before, after) = session.tokens().split_at(prompt(model, i).len());
            assert!(after.len() >= 29 && is_greedy(model, before, after), "session {i}");
        }
    });
}

#[test]
fn wrong_calls_are_refused() {
    let model = cpu();
    let other = load(BackendChoice::Cpu).unwrap();
    assert_eq!(Batch::new(&model, 0, &options(false)).unwrap_err().kind(), ErrorKind::InvalidInput);
    let mut batch = Batch::new(&model, 2, &options(false)).unwrap();
    let mut members = [Session::new(&model, &options(false)).unwrap(), Session::new(&other, &options(false)).unwrap()];
    let mut ticks = Vec::new();
    let refused = batch.tick(&mut members, &TickBudget::UNLIMITED, &mut ticks).unwrap_err();
    assert!(refused.kind() == ErrorKind::InvalidInput && ticks.is_empty());
    // Nothing to do is nothing wrong.
    batch.tick(&mut members[..1], &TickBudget::UNLIMITED, &mut ticks).unwrap();
    assert_eq!(ticks[0].as_ref().unwrap().phase, Phase::Idle);
    batch.tick::<Session>(&mut [], &TickBudget::UNLIMITED, &mut ticks).unwrap();
    batch.wait(&mut members[..1]).unwrap();
    assert!(ticks.is_empty() && batch.bytes() > 0 && batch.shares_passes());
}

#[cfg(all(feature = "cuda", target_os = "linux", target_arch = "x86_64"))]
#[test]
fn sessions_decode_together_on_cuda() {
    if machine::is_on_machine("sessions_decode_together_on_cuda", &machine::ALL_CAPABILITIES[..1]) {
        let model = load(BackendChoice::Cuda).expect("the fixture loads");
        assert!(Batch::new(&model, 4, &options(false)).unwrap().shares_passes());
        each_answers_as_alone(&model);
        any_may_come_and_go(&model);
    }
}

#[cfg(all(feature = "cuda", target_os = "linux", target_arch = "x86_64"))]
#[test]
fn passes_on_cuda_match_the_naive_interpretation() {
    use awqua_tests::decoder::{cuda_cases, q8_error};
    if machine::is_on_machine("passes_on_cuda_match_the_naive_interpretation", machine::ALL_CAPABILITIES) {
        for (i, case) in cuda_cases().iter().enumerate() {
            let options = awqua::backend::cuda::CudaOptions { force_no_graphs: i % 2 == 1, ..Default::default() };
            assert!(passes_match(
                &|| awqua::backend::cuda::open(&options).expect("the device opens"),
                case,
                6e-3,
                false
            ));
            let case = Case { kv: KvType::Q8, ..case.clone() };
            assert!(passes_match(
                &|| awqua::backend::cuda::open(&options).expect("the device opens"),
                &case,
                q8_error(6e-3),
                false
            ));
        }
    }
}

/// The weights of `model` on a backend.
fn upload(mut backend: Box<dyn Backend>, model: &awqua_tests::decoder::Model) -> Arc<dyn Backend> {
    model.upload(&mut *backend);
    backend.into()
}

/// Passes of a backend against the naive interpretation, with steps of the members alone in between, and with `is_exact`
/// against runners that make the same steps alone, bit by bit; whether it computes passes. Half precision and caches of 8
/// bits can prefer the other one of two experts that are nearly equal, and a session that went through it stays off: half of
/// the steps of mixtures have to be within what is allowed then, all of them otherwise.
fn passes_match(open: &dyn Fn() -> Box<dyn Backend>, case: &Case, allowed: f32, is_exact: bool) -> bool {
    // More than a dispatch of any backend takes.
    const MEMBERS: usize = 11;
    let model = build(case);
    let backend = upload(open(), &model);
    let config = RunnerConfig { kv_type: Some(case.kv), ..config() };
    let most = RunnerConfig { max_tokens: MEMBERS as u32, ..config.clone() };
    let Some(mut group) = backend.clone().group(&model.program, &most).expect("the group fits") else {
        return false;
    };
    let mut rng = Rng(case.vocab as u64 + 3);
    let mut members = Vec::new();
    let mut alone = Vec::new();
    let mut lengths = [0usize; MEMBERS];
    for (i, length) in lengths.iter_mut().enumerate() {
        let mut runner = backend.clone().runner(&model.program, &config).expect("the runner fits");
        write_rope(&mut *runner, &model.program);
        assert!(group.takes(&*runner));
        let mut oracle = Oracle::new(&model.program, &model.weights, CONTEXT as usize, case.kv, Dequantised::Exact);
        for table in 0..case.rope_tables {
            oracle.write_rope(table as usize, 0, &rope_rows(table, case.shape.rotary_dim / 2));
        }
        *length = 3 + 3 * i;
        let prompt = tokens(&mut rng, *length, case.vocab);
        oracle.run(&prompt, 0, LogitsRows::None);
        let step = Step { tokens: &prompt, position: 0, logits: LogitsRows::None };
        runner.run(&step).expect("the step runs");
        if is_exact {
            let mut twin = backend.clone().runner(&model.program, &config).expect("the runner fits");
            write_rope(&mut *twin, &model.program);
            twin.run(&step).expect("the step runs");
            alone.push(twin);
        }
        members.push((runner, oracle));
    }
    let decides = (case.kv == KvType::Q8 || !is_exact) && matches!(case.style, Style::Experts(_));
    let mut errors = Vec::new();
    let mut check = |label: String, found: f32| match decides {
        true => errors.push(found),
        false => assert!(found <= allowed, "{}, {:?}, {label}: error {found}", case.name, case.kv),
    };
    let mut logits = Vec::new();
    let mut twin_logits = Vec::new();
    let greedy = Sampling::greedy();
    for pass in 0..4 {
        // Not all of them, and in another order.
        let mut rows: Vec<usize> = (0..MEMBERS).filter(|i| pass == 0 || (i + pass) % 3 != 0).collect();
        rows.rotate_left(pass);
        let mut ids: Vec<u32> = rows.iter().map(|_| tokens(&mut rng, 1, case.vocab)[0]).collect();
        let mut chosen = Vec::new();
        for (row, (&i, id)) in rows.iter().zip(&mut ids).enumerate() {
            let (runner, position) = (&mut *members[i].0, lengths[i] as u32);
            // After the first pass, when all have logits, two of three are chosen: the best, and what a bias makes the best.
            if pass > 0 && row % 3 > 0 {
                let bias = [(*id, 1e6)];
                let greedy = SampleRequest::new(&greedy);
                let request = if row % 3 == 1 { greedy } else { SampleRequest { bias: &bias, ..greedy } };
                runner.read_logits(&mut logits).expect("the logits come back");
                let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0);
                if group.join(runner, &Next::Chosen(&request), position).expect("it joins") {
                    *id = if row % 3 == 1 { best as u32 } else { *id };
                    chosen.push((i, *id));
                    continue;
                }
            }
            assert!(group.join(runner, &Next::Token(*id), position).expect("it joins"));
        }
        let budget = match pass % 2 {
            0 => Budget::UNLIMITED,
            _ => Budget { deadline: Some(std::time::Instant::now()), device: Some(Duration::from_nanos(1)) },
        };
        struct Rows<'a, 'm>(&'a mut Vec<(Box<dyn Runner>, Oracle<'m>)>, &'a [usize]);
        impl Members for Rows<'_, '_> {
            fn runner(&mut self, row: usize) -> awqua::Result<&mut dyn Runner> {
                Ok(&mut *self.0[self.1[row]].0)
            }
        }
        let mut calls = 0;
        while group.advance(&mut Rows(&mut members, &rows), &budget).expect("it goes on") != Progress::Done {
            group.wait().expect("the device goes on");
            calls += 1;
        }
        assert!(pass % 2 == 0 || calls > 0, "{}: a pass in one piece", case.name);
        for (i, id) in chosen {
            let runner = &mut members[i].0;
            let token = loop {
                match runner.poll_ahead().expect("the token comes back") {
                    Some(token) => break token,
                    None => runner.wait().expect("the device goes on"),
                }
            };
            assert_eq!(token, id, "{}, {:?}, pass {pass}, session {i}", case.name, case.kv);
        }
        for (&i, &id) in rows.iter().zip(&ids) {
            let (runner, oracle) = &mut members[i];
            let expected = oracle.run(&[id], lengths[i], LogitsRows::Last);
            runner.read_logits(&mut logits).expect("the logits come back");
            if let Some(twin) = alone.get_mut(i) {
                let step = Step { tokens: &[id], position: lengths[i] as u32, logits: LogitsRows::Last };
                twin.run(&step).expect("the step runs");
                twin.read_logits(&mut twin_logits).expect("the logits come back");
                assert!(logits == twin_logits, "{}, {:?}, pass {pass}, session {i}", case.name, case.kv);
            }
            lengths[i] += 1;
            check(format!("pass {pass}, session {i}"), error(&logits, &expected));
        }
        // One goes on alone.
        let (runner, oracle) = &mut members[pass];
        let ids = tokens(&mut rng, 2, case.vocab);
        let expected = oracle.run(&ids, lengths[pass], LogitsRows::Last);
        let step = Step { tokens: &ids, position: lengths[pass] as u32, logits: LogitsRows::Last };
        runner.run(&step).expect("the step runs");
        if let Some(twin) = alone.get_mut(pass) {
            twin.run(&step).expect("the step runs");
        }
        lengths[pass] += 2;
        runner.read_logits(&mut logits).expect("the logits come back");
        check(format!("session {pass} alone"), error(&logits, &expected));
    }
    errors.sort_by(f32::total_cmp);
    if let Some(median) = errors.get(errors.len() / 2) {
        assert!(*median <= allowed, "{}, {:?}: a median error of {median}", case.name, case.kv);
    }
    let mut stranger = upload(open(), &model).runner(&model.program, &config).expect("the runner fits");
    assert!(!group.takes(&*stranger));
    let mut refused = |runner: &mut dyn Runner, id, position| {
        group.join(runner, &Next::Token(id), position).expect_err("it can not join").kind()
    };
    assert_eq!(refused(&mut *stranger, 1, 0), ErrorKind::InvalidInput);
    assert_eq!(refused(&mut *members[0].0, model.program.vocab_size, 0), ErrorKind::InvalidInput);
    assert_eq!(refused(&mut *members[0].0, 1, CONTEXT), ErrorKind::ContextFull);
    true
}

#[test]
fn passes_on_the_cpu_match_the_naive_interpretation() {
    for case in cases() {
        assert!(passes_match(&awqua::backend::cpu::open, &case, 2e-3, true));
        // Last bits round some elements of an 8-bit cache to the other neighbour, each of which moves the logits by some
        // thousandths of the largest.
        assert!(passes_match(&awqua::backend::cpu::open, &Case { kv: KvType::Q8, ..case }, 3e-2, true));
    }
}

#[cfg(feature = "wgpu")]
fn passes_through_wgpu_match(portable: bool) {
    use awqua::backend::wgpu::{self, DeviceChoice, WgpuOptions};
    for adapter in wgpu::adapters().into_iter().filter(|adapter| adapter.unusable.is_none()) {
        let options = WgpuOptions {
            device: DeviceChoice::Named(adapter.index.to_string()),
            force_f32: portable,
            force_no_subgroup: portable,
            limit_binding: portable.then_some(96 << 10),
            ..Default::default()
        };
        // Heads of whole eights; half precision may prefer the other one of two experts that are nearly equal.
        let handled = |case: &&Case| {
            let is_decided = portable || !matches!(case.style, Style::Experts(_));
            case.shape.head_dim.is_multiple_of(8) && is_decided
        };
        for case in cases().iter().filter(handled) {
            let open = || wgpu::open(&options).expect("the device opens");
            assert!(passes_match(&open, case, 6e-3, false));
            // As on the CPU.
            assert!(passes_match(&open, &Case { kv: KvType::Q8, ..case.clone() }, 3e-2, false));
        }
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn passes_through_wgpu_match_the_naive_interpretation() {
    passes_through_wgpu_match(false);
}

#[cfg(feature = "wgpu")]
#[test]
fn passes_through_portable_wgpu_match_the_naive_interpretation() {
    passes_through_wgpu_match(true);
}

/// Forks keep the memory of their common start once, and go on together behind it, beside a session of another start.
fn forks_go_on_together(model: &Arc<Model>) {
    let options = SessionOptions { context: Some(256), ..options(false) };
    let mut first = Session::new(model, &options).unwrap();
    let start = prompt(model, 4).repeat(3);
    first.set_prompt(&start, &CancelToken::default()).unwrap();
    let mut members: Vec<Session> = (0..3).map(|_| first.fork().unwrap()).collect();
    assert!(members.iter().all(|fork| fork.bytes() < first.bytes()));
    members.insert(1, Session::new(model, &options).unwrap());
    let mut prompts = vec![[&start[..], &prompt(model, 1)].concat(); 4];
    prompts[1] = prompt(model, 0);
    for (i, (session, prompt)) in members.iter_mut().zip(&mut prompts).enumerate() {
        prompt.push(20 + i as u32);
        session.begin(prompt, greedy(12)).unwrap();
    }
    let mut batch = Batch::new(model, 4, &options).unwrap();
    together(&mut batch, &mut members, &TickBudget::UNLIMITED);
    assert!(!batch.shares_passes() || batch.passes() > 8);
    for (session, prompt) in members.iter().zip(&prompts) {
        let (before, after) = session.tokens().split_at(prompt.len());
        assert!(before == prompt && is_greedy(model, before, after));
    }
}

#[test]
fn forks_decode_together() {
    on_gpu(forks_go_on_together);
}

#[cfg(all(feature = "cuda", target_os = "linux", target_arch = "x86_64"))]
#[test]
fn forks_decode_together_on_cuda() {
    if machine::is_on_machine("forks_decode_together_on_cuda", &machine::ALL_CAPABILITIES[..1]) {
        forks_go_on_together(&load(BackendChoice::Cuda).expect("the fixture loads"));
    }
}
