//! Tokenization and chat templates against what `tokenizers` and Transformers produce; see the fixtures' README.

#![allow(clippy::print_stdout, reason = "what is skipped and how close the numbers are is part of a test's output")]

use std::path::{Path, PathBuf};

use awqua::session::chat::{ChatTemplate, RenderOptions};
use awqua::session::tokenizer::{TextStream, Tokenizer};
use serde_json::{Map, Value};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/conformance")
}

fn read(name: &str) -> Value {
    let path = fixtures().join(name);
    serde_json::from_slice(&std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}

/// Noon of 2026-11-23 UTC, the clock of the fixtures.
const NOW: i64 = 1_795_435_200;

/// Folder that `fetch.sh` filled, if there is one: vocabularies are not in the repository.
fn fetched(family: &str, file: &str) -> Option<PathBuf> {
    let path = PathBuf::from(std::env::var_os("AWQUA_TOKENIZERS")?).join(family).join(file);
    path.exists().then_some(path)
}

fn render_options(case: &Value) -> RenderOptions {
    RenderOptions {
        add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap_or(true),
        tools: case.get("tools").cloned(),
        variables: case.get("kwargs").and_then(Value::as_object).cloned().unwrap_or_default(),
        now: Some(NOW),
    }
}

#[test]
fn conversations_render_as_in_transformers() {
    let conversations = read("conversations.json");
    let cases = conversations["cases"].as_array().unwrap();
    let (mut compared, mut failures) = (0, Vec::new());
    for family in ["smollm2", "qwen2_5", "qwen3", "deepseek_v3", "llama3", "llama3_1", "gemma3"] {
        let expected = read(&format!("{family}.chat.json"));
        let committed = fixtures().join(format!("{family}.jinja"));
        let Some(path) = Some(committed).filter(|p| p.exists()).or_else(|| fetched(family, "chat_template.jinja"))
        else {
            println!("skipped: {family}: its template is fetched, and AWQUA_TOKENIZERS does not have it");
            continue;
        };
        let tokens: Map<String, Value> = expected["special_tokens"]
            .as_object()
            .unwrap()
            .iter()
            .filter(|(_, v)| !v.is_null())
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        let template = ChatTemplate::new(std::fs::read_to_string(path).unwrap(), tokens).unwrap();
        for (case, expected) in cases.iter().zip(expected["rendered"].as_array().unwrap()) {
            let found = template.render(&case["messages"], &render_options(case));
            let same = match (&found, expected) {
                (Ok(found), Value::String(expected)) => found == expected,
                (Err(_), Value::Object(error)) => error["error"] == true,
                _ => false,
            };
            compared += 1;
            if !same {
                failures.push(format!("{family}, {}:\n  expected {expected}\n  found {found:?}", case["name"]));
            }
        }
    }
    assert!(compared >= 4 * 30, "only {compared} conversations were compared");
    assert!(failures.is_empty(), "{} of {compared} differ:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn small_templates_render_as_in_jinja() {
    let features = read("features.json");
    let mut failures = Vec::new();
    for case in features["cases"].as_array().unwrap() {
        let mut variables = case.get("variables").and_then(Value::as_object).cloned().unwrap_or_default();
        let messages = variables.shift_remove("messages").unwrap_or_else(|| features["messages"].clone());
        let tools = variables.shift_remove("tools").filter(|t| !t.is_null());
        let options = RenderOptions { add_generation_prompt: true, tools, variables, now: Some(NOW) };
        let found = ChatTemplate::new(case["template"].as_str().unwrap(), Map::new())
            .and_then(|template| template.render(&messages, &options));
        let same = match (&found, &case["rendered"]) {
            (Ok(found), Value::String(expected)) => found == expected,
            (Err(_), Value::Object(error)) => error["error"] == true,
            _ => false,
        };
        let name = case["name"].as_str().unwrap();
        if !same {
            failures.push(format!("{name}: {}\n  expected {}\n  found {found:?}", case["template"], case["rendered"]));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn strings_encode_as_in_tokenizers() {
    let strings = read("strings.json");
    let strings = strings["strings"].as_array().unwrap();
    assert!(strings.len() >= 200);
    for family in ["llama2", "llama3", "llama3_1", "qwen2_5", "qwen3", "gemma3", "deepseek_v3", "gptoss", "smollm2"] {
        let Some(path) = fetched(family, "tokenizer.json") else {
            println!("skipped: {family}: its vocabulary is fetched, and AWQUA_TOKENIZERS does not have it");
            continue;
        };
        let tokenizer = Tokenizer::from_json(&std::fs::read(path).unwrap()).unwrap();
        assert!(tokenizer.vocabulary().is_some(), "{family}: text is not streamed token by token");
        compare(family, &tokenizer, strings);
    }
}

fn compare(family: &str, tokenizer: &Tokenizer, strings: &[Value]) {
    let expected = read(&format!("{family}.json"));
    let ids =
        |value: &Value| -> Vec<u32> { value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect() };
    let (prefix, suffix) = (ids(&expected["special_prefix"]), ids(&expected["special_suffix"]));
    for (i, (text, plain)) in strings.iter().zip(expected["encode"].as_array().unwrap()).enumerate() {
        let (text, plain) = (text.as_str().unwrap(), ids(plain));
        assert_eq!(tokenizer.encode(text, false).unwrap(), plain, "{family}: string {i}: {text:?}");
        let special = [&prefix[..], &plain[..], &suffix[..]].concat();
        assert_eq!(tokenizer.encode(text, true).unwrap(), special, "{family}: string {i}: {text:?}");
        for (key, skip) in [("decode_skip", true), ("decode_keep", false)] {
            let decoded = expected[key].get(i.to_string()).map_or(text, |v| v.as_str().unwrap());
            assert_eq!(tokenizer.decode(&plain, skip).unwrap(), decoded, "{family}: string {i}: {text:?}");
            if skip {
                let (mut stream, mut streamed) = (TextStream::default(), String::new());
                for &id in &plain {
                    stream.push(tokenizer, id, &mut streamed).unwrap();
                }
                stream.finish(tokenizer, &mut streamed).unwrap();
                assert_eq!(streamed, decoded, "{family}: string {i}: {text:?}");
            }
        }
    }
}
