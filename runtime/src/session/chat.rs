//! Chat templates: the Jinja program a checkpoint carries, rendered as Transformers renders it.

use minijinja::{Environment, UndefinedBehavior};
use serde::{Deserialize, Serialize};
use serde_json::Map;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};

mod python;

/// Largest template file read.
const MAX_BYTES: u64 = 1 << 20;
/// Instructions one rendering may take: far more than any real conversation needs, so that a hostile loop ends.
const FUEL: u64 = 20_000_000;
/// Longest rendered conversation, in bytes.
const MAX_RENDERED: usize = 64 << 20;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant` or what else the template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

impl ChatMessage {
    /// A turn of `role` saying `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// What a template sees beside the messages.
#[derive(Debug, Clone, Default)]
pub struct RenderOptions {
    /// End with the opening of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Tool definitions, an array in the shape the model was trained with.
    pub tools: Option<serde_json::Value>,
    /// Further variables, e.g. `enable_thinking` or `date_string`.
    pub variables: Map<String, serde_json::Value>,
    /// Seconds since 1970 that `strftime_now` formats, in UTC; `None` takes the system's clock.
    pub now: Option<i64>,
}

/// A compiled chat template with the special tokens it may mention.
pub struct ChatTemplate {
    source: String,
    /// bos_token, eos_token and so on.
    tokens: Map<String, serde_json::Value>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("bytes", &self.source.len()).finish_non_exhaustive()
    }
}

fn template_error(e: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Template, e.to_string())
}

impl ChatTemplate {
    /// A template from its text; `tokens` holds `bos_token`, `eos_token` and the like.
    ///
    /// # Errors
    /// [`ErrorKind::Template`] if it does not parse.
    pub fn new(source: impl Into<String>, tokens: Map<String, serde_json::Value>) -> Result<Self> {
        // Jinja reads every line end as one line feed.
        let mut source = source.into().replace("\r\n", "\n").replace('\r', "\n");
        // `generation` blocks mark the assistant's text for training masks and print their content unchanged.
        for tag in ["generation", "endgeneration"] {
            for (open, close) in [("{% ", " %}"), ("{%- ", " %}"), ("{% ", " -%}"), ("{%- ", " -%}")] {
                let neutral = if tag == "generation" { "if true" } else { "endif" };
                source = source.replace(&format!("{open}{tag}{close}"), &format!("{open}{neutral}{close}"));
            }
        }
        let template = Self { source, tokens };
        template.environment(None)?;
        Ok(template)
    }

    /// Template of a folder: `chat_template.jinja`, or `chat_template` of `tokenizer_config.json` (a string, or a list
    /// of named ones of which `default` is taken). `None` if there is none.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidFile`] if a file is not what it should be, [`ErrorKind::Template`] if the template does not
    /// parse.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Option<Self>> {
        let config = checkpoint.json("tokenizer_config.json")?;
        let file = checkpoint.read("chat_template.jinja", MAX_BYTES)?;
        let (source, name) = match file {
            Some(bytes) => {
                let path = checkpoint.dir().join("chat_template.jinja");
                let text = String::from_utf8(bytes)
                    .map_err(|_| Error::new(ErrorKind::InvalidFile, "the text is not UTF-8").in_file(path))?;
                (Some(text), "chat_template.jinja")
            }
            None => (config.as_ref().and_then(embedded_template), "tokenizer_config.json"),
        };
        let Some(source) = source else { return Ok(None) };
        let mut tokens = Map::new();
        for (key, value) in config.iter().flat_map(|c| c.as_object()).flatten() {
            // A token is a string, or an object with its text and flags.
            if let Some(text) = value.as_str().or_else(|| value.get("content")?.as_str())
                && key.ends_with("_token")
            {
                tokens.insert(key.clone(), text.into());
            }
        }
        Self::new(source, tokens).map(Some).map_err(|e| e.in_file(checkpoint.dir().join(name)))
    }

    /// Renders messages with string contents.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub fn render_messages(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String> {
        let messages = serde_json::to_value(messages).map_err(template_error)?;
        self.render(&messages, &RenderOptions { add_generation_prompt, ..RenderOptions::default() })
    }

    /// Renders an array of messages, each an object with at least `role` and usually `content`.
    ///
    /// # Errors
    /// [`ErrorKind::Template`] if the template refuses the conversation, fails, or does not end.
    pub fn render(&self, messages: &serde_json::Value, options: &RenderOptions) -> Result<String> {
        let environment = self.environment(options.now)?;
        let mut variables = self.tokens.clone();
        variables.extend(options.variables.clone());
        variables.insert("messages".into(), messages.clone());
        variables.insert("add_generation_prompt".into(), options.add_generation_prompt.into());
        variables.insert("tools".into(), options.tools.clone().unwrap_or_default());
        variables.entry("documents").or_insert(serde_json::Value::Null);
        let template = environment.get_template(NAME).map_err(template_error)?;
        let mut out = Bounded(Vec::new());
        template.render_captured_to(serde_json::Value::Object(variables), &mut out).map_err(template_error)?;
        String::from_utf8(out.0).map_err(template_error)
    }

    fn environment(&self, now: Option<i64>) -> Result<Environment<'_>> {
        let mut environment = Environment::new();
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_formatter(python::print);
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(python::method);
        environment.add_filter("tojson", python::to_json);
        environment.add_filter("trim", python::trim);
        environment.add_test("iterable", python::is_iterable);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, message))
        });
        let now = now.unwrap_or_else(|| {
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64)
        });
        environment.add_function("strftime_now", move |format: String| python::strftime(now, &format));
        environment.add_template(NAME, &self.source).map_err(template_error)?;
        Ok(environment)
    }
}

const NAME: &str = "chat_template";

fn embedded_template(config: &serde_json::Value) -> Option<String> {
    match config.get("chat_template")? {
        serde_json::Value::String(source) => Some(source.clone()),
        serde_json::Value::Array(named) => {
            let find = |name: &str| named.iter().find(|t| t.get("name").and_then(|n| n.as_str()) == Some(name));
            find("default").or(named.first())?.get("template")?.as_str().map(Into::into)
        }
        _ => None,
    }
}

/// A buffer that refuses to grow past [`MAX_RENDERED`].
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_RENDERED {
            return Err(std::io::Error::other("the rendered conversation is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn python_strings_json_and_dates() {
        let source = "{% for m in messages %}{{ m.role.upper() }}:{{ m['content'].strip() }}|{% endfor %}\
                      {{ tools | tojson }}|{{ strftime_now('%d %b %Y') }}|{{ add_generation_prompt }}|{{ none }}";
        let template = ChatTemplate::new(source, Map::new()).unwrap();
        let options = RenderOptions {
            add_generation_prompt: true,
            tools: Some(json!([{"a": 1.5, "b": "<é'>"}])),
            now: Some(1_795_392_000),
            ..Default::default()
        };
        let text = template.render(&json!([{"role": "user", "content": " hi "}]), &options).unwrap();
        assert_eq!(text, "USER:hi|[{\"a\": 1.5, \"b\": \"<é'>\"}]|23 Nov 2026|True|None");
    }

    #[test]
    fn refusals_and_endless_loops_are_errors() {
        for source in [
            "{{ raise_exception('no system role') }}",
            "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
            "{{ messages[0].content.nothing() }}",
        ] {
            let template = ChatTemplate::new(source, Map::new()).unwrap();
            let error = template.render_messages(&[ChatMessage::new("user", "x")], false).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Template, "{source}");
        }
        assert_eq!(ChatTemplate::new("{% if %}", Map::new()).unwrap_err().kind(), ErrorKind::Template);
    }
}
