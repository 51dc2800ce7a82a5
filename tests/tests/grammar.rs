//! Answers of a given form, on the CPU and on a GPU.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use awqua::session::{Event, Phase, TickBudget};
use awqua::{
    BackendChoice, Engine, EngineOptions, ErrorKind, GenerateOptions, Grammar, Load, Model, Sampling, Session,
    SessionOptions, StopReason,
};

fn models() -> Vec<Arc<Model>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny-story-w4");
    let load = |backend| {
        let engine = Engine::new(EngineOptions { backend, ..Default::default() });
        Load::path(&engine, &folder).run(&mut |_| ControlFlow::Continue(()))
    };
    let gpu = if cfg!(feature = "wgpu") { load(BackendChoice::Wgpu).ok() } else { None };
    assert!(gpu.is_some() || std::env::var_os("AWQUA_REQUIRE_GPU").is_none(), "AWQUA_REQUIRE_GPU is set");
    [load(BackendChoice::Cpu).ok(), gpu].into_iter().flatten().collect()
}

fn session(model: &Arc<Model>) -> Session {
    let options = SessionOptions { context: Some(256), deterministic: true, ..Default::default() };
    Session::new(model, &options).unwrap()
}

fn options(grammar: Grammar, seed: u64) -> GenerateOptions {
    let sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, ..Default::default() };
    GenerateOptions { max_tokens: 120, sampling, seed, grammar: Some(grammar), ..Default::default() }
}

fn say(session: &mut Session, options: &GenerateOptions) -> (String, StopReason) {
    let prompt = session.model().tokenizer().unwrap().encode("The old miller said,", true).unwrap();
    let said = session.generate(&prompt, options, &mut |_| ControlFlow::Continue(())).unwrap();
    (said.text, said.stop)
}

fn ended(stop: &StopReason) -> bool {
    matches!(stop, StopReason::Complete | StopReason::Eos(_))
}

/// Without optional white space, of which a small model makes as much as it is allowed.
const PERSON: &str = r#"{
    "x-guidance": {"whitespace_flexible": false},
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 3, "maximum": 120},
        "friends": {"type": "array", "items": {"enum": ["Emma", "the cat"]}, "minItems": 1, "maxItems": 3}
    },
    "required": ["name", "age", "friends"],
    "additionalProperties": false
}"#;

#[test]
fn answers_have_the_form_that_was_asked_for() {
    for model in models() {
        let mut session = session(&model);
        // A software GPU is slow.
        let seeds = if model.backend_info().backend == "cpu" { 6 } else { 1 };
        for seed in 0..seeds {
            let (text, stop) = say(&mut session, &options(Grammar::JsonSchema(PERSON.into()), seed));
            assert!(ended(&stop), "{stop:?}: {text}");
            let person: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
            assert!(person["name"].as_str().unwrap().chars().count() <= 12, "{text}");
            assert!((3..=120).contains(&person["age"].as_i64().unwrap()), "{text}");
            let friends = person["friends"].as_array().unwrap();
            assert!((1..=3).contains(&friends.len()) && friends.iter().all(|f| f == "Emma" || f == "the cat"));

            let (text, stop) = say(&mut session, &options(Grammar::Regex("[0-9]{3}-[a-f]{2}".into()), seed));
            assert!(ended(&stop));
            let bytes = text.as_bytes();
            assert!(bytes.len() == 6 && bytes[..3].iter().all(u8::is_ascii_digit) && bytes[3] == b'-', "{text}");
            assert!(bytes[4..].iter().all(|b| (b'a'..=b'f').contains(b)), "{text}");

            let lark = "start: (\"left\" | \"right\") \" \" COUNT\nCOUNT: /[1-9]/";
            let (text, stop) = say(&mut session, &options(Grammar::Lark(lark.into()), seed));
            assert!(ended(&stop));
            let (side, count) = text.split_once(' ').unwrap();
            assert!((side == "left" || side == "right") && (1..=9).contains(&count.parse::<u32>().unwrap()));
        }
        // Cut off, it is the start of one.
        let short = GenerateOptions { max_tokens: 2, ..options(Grammar::Regex("(ab){40}".into()), 0) };
        let (text, stop) = say(&mut session, &short);
        assert!(stop == StopReason::MaxTokens && "ab".repeat(40).starts_with(&text) && !text.is_empty());
    }
}

#[test]
fn ticks_and_losses_change_nothing() {
    for model in models() {
        let options = options(Grammar::JsonSchema(PERSON.into()), 3);
        let mut session = session(&model);
        let (expected, _) = say(&mut session, &options);
        let prompt = model.tokenizer().unwrap().encode("The old miller said,", true).unwrap();
        session.begin(&prompt, options.clone()).unwrap();
        let budget = TickBudget { host: Some(Duration::from_micros(50)), device: Some(Duration::from_millis(2)) };
        let (mut text, mut buffer, mut lost) = (String::new(), [0; 16], false);
        loop {
            let tick = session.tick(&budget).unwrap();
            while let Some(event) = session.poll(&mut buffer) {
                match event {
                    Event::Text { written, .. } => text += std::str::from_utf8(&buffer[..written]).unwrap(),
                    Event::Failed(error) => panic!("{error}"),
                    _ => {}
                }
            }
            match tick.phase {
                Phase::Idle => break,
                Phase::Lost => model.engine().recover().unwrap(),
                _ if tick.answer_tokens > 5 && !lost => {
                    model.engine().force_loss();
                    lost = true;
                }
                _ if tick.is_waiting => session.wait().unwrap(),
                _ => {}
            }
        }
        assert_eq!(text, expected);
    }
}

#[test]
fn bad_grammars_are_refused() {
    for model in models() {
        let mut session = session(&model);
        let prompt = model.tokenizer().unwrap().encode("a", true).unwrap();
        for bad in [
            Grammar::JsonSchema("{".into()),
            Grammar::JsonSchema(r#"{"type": "nothing"}"#.into()),
            Grammar::Regex("(".into()),
            Grammar::Lark("begin: \"a\"".into()),
        ] {
            let refused = session.begin(&prompt, options(bad.clone(), 0)).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{bad:?}");
            assert!(!session.is_busy());
        }
    }
}
