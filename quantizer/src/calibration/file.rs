//! Calibration texts from a user's file: plain text, or one JSON value a line.

use std::path::Path;

use awqua::session::chat::{ChatTemplate, RenderOptions};
use awqua::{Error, ErrorKind, Result};
use serde_json::Value;

/// Reads the texts of `path`.
///
/// A name that ends in `.jsonl` or `.ndjson` has one value a line: a string, an object with `text`, or an object with
/// `messages` (or `conversations`, with `from` and `value`) that `template` renders as the model was trained to see it.
/// Any other file is one text.
///
/// # Errors
/// [`ErrorKind::Io`]; [`ErrorKind::InvalidFile`] naming the line that is none of these or not UTF-8;
/// [`ErrorKind::Template`] for conversations without a template or that it refuses.
pub fn read_texts(path: &Path, template: Option<&ChatTemplate>) -> Result<Vec<String>> {
    let bytes = std::fs::read(path).map_err(|error| Error::io(path, &error))?;
    let text = String::from_utf8(bytes)
        .map_err(|error| Error::new(ErrorKind::InvalidFile, format!("expected UTF-8 text: {error}")).in_file(path))?;
    let by_line = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("jsonl") || e.eq_ignore_ascii_case("ndjson"));
    if !by_line {
        return Ok(vec![text]);
    }
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(i, line)| {
            let at =
                |error: Error| Error::new(error.kind(), format!("line {}: {}", i + 1, error.message())).in_file(path);
            let value = serde_json::from_str(line)
                .map_err(|error| at(Error::new(ErrorKind::InvalidFile, format!("expected JSON: {error}"))))?;
            text_of(&value, template).map_err(at)
        })
        .collect()
}

fn text_of(value: &Value, template: Option<&ChatTemplate>) -> Result<String> {
    if let Some(text) = value.as_str().or_else(|| value["text"].as_str()) {
        return Ok(text.to_owned());
    }
    let Some(messages) = messages(value) else {
        let message = "expected a string, an object with `text`, or an object with `messages`";
        return Err(Error::new(ErrorKind::InvalidFile, message));
    };
    let template = template.ok_or_else(|| {
        Error::new(ErrorKind::Template, "the model has no chat template to render a conversation with")
    })?;
    template.render(&messages, &RenderOptions { now: Some(0), ..Default::default() })
}

/// The messages of a conversation, also of the older form that names its speakers `human` and `gpt`.
fn messages(value: &Value) -> Option<Value> {
    if value["messages"].is_array() {
        return Some(value["messages"].clone());
    }
    let turns = value["conversations"].as_array()?.iter().map(|turn| {
        let role = match turn["from"].as_str()? {
            "human" => "user",
            "gpt" => "assistant",
            other => other,
        };
        Some(serde_json::json!({ "role": role, "content": turn["value"].as_str()? }))
    });
    turns.collect::<Option<Vec<_>>>().map(Value::Array)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, content: &str) -> Result<Vec<String>> {
        let folder = std::env::temp_dir().join(format!("awqua-calibration-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join(name);
        std::fs::write(&path, content).unwrap();
        let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}";
        read_texts(&path, Some(&ChatTemplate::new(source, Default::default()).unwrap()))
    }

    #[test]
    fn every_form_gives_its_texts() {
        assert_eq!(read("plain.txt", "{\"not\": json").unwrap(), ["{\"not\": json"]);
        let lines = concat!(
            "\"one\"\n\n",
            r#"{"text": "two"}"#,
            "\n",
            r#"{"messages": [{"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}]}"#,
            "\n",
            r#"{"conversations": [{"from": "human", "value": "five"}, {"from": "gpt", "value": "six"}]}"#,
        );
        let expected = ["one", "two", "<user>three<assistant>four", "<user>five<assistant>six"];
        assert_eq!(read("lines.JSONL", lines).unwrap(), expected);
    }

    #[test]
    fn a_line_that_is_no_text_is_named() {
        for (content, part) in [("\"a\"\n{", "line 2"), ("{\"a\": 1}", "line 1: expected a string"), ("3", "line 1")] {
            let error = read("bad.jsonl", content).unwrap_err();
            assert!(error.kind() == ErrorKind::InvalidFile && error.message().starts_with(part), "{error}");
        }
    }
}
