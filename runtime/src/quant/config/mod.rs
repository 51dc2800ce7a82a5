//! The quantization section of a configuration: which dialect, and which modules it applies to.

use fancy_regex::{Regex, RegexBuilder};
use serde_json::Value;

use super::Dialect;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};

mod awq;
mod bitsandbytes;
mod compressed;
mod gptq;
mod mlx;
mod modelopt;

/// Most entries of a list of modules or targets, and longest entry in bytes.
const MAX_ENTRIES: usize = 4096;
const MAX_ENTRY: usize = 512;
/// Longest regular expression, bytes.
const MAX_PATTERN: usize = 256;

/// How one module is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheme {
    /// Layout on disk.
    pub dialect: Dialect,
    /// Bits of a code: 2 to 6 or 8; always 4 in the AWQ dialects.
    pub bits: u32,
    /// Input features that share a scale; `None`: one group a row.
    pub group_size: Option<usize>,
    /// Whether every zero point is the middle of the range; some dialects then store none.
    pub symmetric: bool,
    /// Whether groups may follow another order than that of the input features.
    pub act_order: bool,
    /// How zero points are stored.
    pub zeros: ZeroPoints,
}

/// How a GPTQ file stores zero points.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ZeroPoints {
    /// As they are.
    #[default]
    Plain,
    /// Each less one, before it was packed.
    FieldsLessOne,
    /// Packed, then a constant taken from each word, which borrows between fields: the one for codes of so many bits,
    /// those of the checkpoint as a whole even where a module has others. The constant for 3 bits is not ones in every
    /// field.
    WordsLessOne(u32),
}

impl Scheme {
    /// A scheme with groups in the order of the input features and plain zero points.
    pub fn new(dialect: Dialect, bits: u32, group_size: Option<usize>, symmetric: bool) -> Self {
        Self { dialect, bits, group_size, symmetric, act_order: false, zeros: ZeroPoints::Plain }
    }
}

/// The quantization section of a checkpoint.
#[derive(Debug, Clone)]
pub struct Quantization {
    dialect: Dialect,
    writer: Option<String>,
    /// The first one that matches decides.
    rules: Vec<(Pattern, Option<Scheme>)>,
    ignore: Vec<Pattern>,
    groups: Vec<Group>,
}

#[derive(Debug, Clone)]
struct Group {
    targets: Vec<Pattern>,
    scheme: Scheme,
}

#[derive(Debug, Clone)]
enum Pattern {
    /// Matches a module whose name contains this.
    Contains(String),
    /// Matches the module of this name, or every linear module if it is the class name `Linear`.
    Exact(String),
    /// Matches a module whose name starts with a match, as Python's `re.match` does.
    Regex(Box<Regex>),
}

impl Quantization {
    /// The quantization of an open checkpoint, or `None` if it is not quantized.
    ///
    /// # Errors
    /// As [`Quantization::from_config`], with the file.
    pub fn of(checkpoint: &Checkpoint) -> Result<Option<Self>> {
        let config = checkpoint.config();
        if checkpoint.is_gguf() {
            return Ok(Some(Self::uniform(Scheme::new(Dialect::Gguf, 4, Some(32), false), None, Vec::new())));
        }
        let found = Self::from_config(config, None);
        let found = found.map_err(|error| error.in_file(checkpoint.dir().join("config.json")))?;
        // Some exports of ModelOpt say the group size only in their own file.
        let complete = |q: &Self| q.dialect != Dialect::ModelOpt || modelopt::has_group_size(config);
        if found.as_ref().is_some_and(complete) {
            return Ok(found);
        }
        // Files of their own, as AutoAWQ, AutoGPTQ and ModelOpt wrote them in their earlier versions.
        for name in ["quant_config.json", "quantize_config.json", "hf_quant_config.json"] {
            if let Some(fallback) = checkpoint.json(name)? {
                let config = if found.is_some() { &Value::Null } else { config };
                return Self::from_config(config, Some(&fallback))
                    .map_err(|error| error.in_file(checkpoint.dir().join(name)));
            }
        }
        match found {
            Some(found) => Ok(Some(found)),
            None => Ok(awq::tiny_chat(checkpoint)),
        }
    }

    /// Reads `quantization_config` of a `config.json`; if it has none, `fallback` is a separate file as older writers
    /// made it. `None` if neither says anything.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] naming a method, format or option that is not read, [`ErrorKind::InvalidConfig`] if
    /// a value is missing, of the wrong type or out of range.
    pub fn from_config(config: &Value, fallback: Option<&Value>) -> Result<Option<Self>> {
        let present = |key: &str| config.get(key).filter(|value| !value.is_null());
        let section = present("quantization_config").or_else(|| present("compression_config"));
        // MLX writes its section twice, the second time under the name of others.
        if let Some(mlx) = present("quantization")
            && section.is_none_or(|section| section.get("quant_method").is_none())
        {
            return mlx::read(mlx).map(Some);
        }
        let Some(section) = section.or(fallback) else { return Ok(None) };
        if !section.is_object() {
            return Err(invalid("`quantization_config` is not an object"));
        }
        // Only separate files name no method.
        let method = match field(section, &["quant_method"]) {
            Some(Value::String(method)) => method.to_ascii_lowercase(),
            Some(other) => return Err(invalid(format!("expected a string as `quant_method`, found {}", brief(other)))),
            None if field(section, &["config_groups"]).is_some() => "compressed-tensors".into(),
            None if field(section, &["w_bit", "version"]).is_some() => "awq".into(),
            None if field(section, &["desc_act", "checkpoint_format"]).is_some() => "gptq".into(),
            None if modelopt::is_separate(section) => "modelopt".into(),
            None => return Err(invalid("`quant_method` is missing")),
        };
        match method.as_str() {
            "awq" => awq::read(section).map(Some),
            "compressed-tensors" => compressed::read(section).map(Some),
            "gptq" => gptq::read(section).map(Some),
            "auto-round" | "auto_round" | "intel/auto-round" => gptq::auto_round(section).map(Some),
            "bitsandbytes" => bitsandbytes::read(section).map(Some),
            "modelopt" => modelopt::read(section).map(Some),
            _ => Err(unsupported(format!("quant_method {}", brief(&Value::String(method))))),
        }
    }

    /// Layout of the packed modules; that of the first group where there are several.
    pub fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// The software that wrote the checkpoint and its version, where the configuration says so.
    pub fn writer(&self) -> Option<&str> {
        self.writer.as_deref()
    }

    /// Scheme of the first group, which is the only one in nearly every checkpoint.
    pub fn scheme(&self) -> Scheme {
        self.groups[0].scheme
    }

    /// Every scheme that some modules have.
    pub fn schemes(&self) -> Vec<Scheme> {
        let mut all: Vec<Scheme> = self.groups.iter().map(|group| group.scheme).collect();
        all.extend(self.rules.iter().filter_map(|(_, scheme)| *scheme));
        let mut seen = Vec::new();
        all.retain(|scheme| {
            let new = !seen.contains(scheme);
            seen.push(*scheme);
            new
        });
        all
    }

    /// How the linear module `module` (a name without `.weight`) is packed, or `None` if it is excluded.
    ///
    /// Rules for single modules come first, in their order; then the exclusion list; then a target that names the
    /// module wins over a regular expression, and that over a class.
    pub fn scheme_of(&self, module: &str) -> Result<Option<Scheme>> {
        for (pattern, scheme) in &self.rules {
            if pattern.matches(module)? {
                return Ok(*scheme);
            }
        }
        for pattern in &self.ignore {
            if pattern.matches(module)? {
                return Ok(None);
            }
        }
        let mut best: Option<(u8, Scheme)> = None;
        for group in &self.groups {
            for target in &group.targets {
                let rank = match target {
                    Pattern::Exact(name) if name == "Linear" => 1,
                    Pattern::Contains(part) if part.is_empty() => 1,
                    Pattern::Exact(_) => 3,
                    Pattern::Regex(_) | Pattern::Contains(_) => 2,
                };
                if best.is_none_or(|(found, _)| rank > found) && target.matches(module)? {
                    best = Some((rank, group.scheme));
                }
            }
        }
        Ok(best.map(|(_, scheme)| scheme))
    }

    /// One scheme for every module that is not ignored.
    fn uniform(scheme: Scheme, writer: Option<String>, ignore: Vec<Pattern>) -> Self {
        let groups = vec![Group { targets: vec![Pattern::Contains(String::new())], scheme }];
        Self { dialect: scheme.dialect, writer, rules: Vec::new(), ignore, groups }
    }
}

impl Pattern {
    /// A name, or a regular expression after `re:`.
    fn parse(text: &str) -> Result<Self> {
        match text.strip_prefix("re:") {
            Some(pattern) => Self::regex(pattern),
            None => Ok(Self::Exact(text.to_owned())),
        }
    }

    fn regex(pattern: &str) -> Result<Self> {
        if pattern.len() > MAX_PATTERN {
            return Err(unsupported(format!("a pattern of {} bytes (at most {MAX_PATTERN})", pattern.len())));
        }
        // Bounds on compiled size and backtracking keep a hostile pattern from taking memory or time.
        RegexBuilder::new(&format!("^(?:{pattern})"))
            .backtrack_limit(100_000)
            .delegate_size_limit(1 << 20)
            .build()
            .map(|regex| Self::Regex(Box::new(regex)))
            .map_err(|error| unsupported(format!("pattern {pattern:?}: {error}")))
    }

    /// A name in which `*` stands for anything; without one, the module or everything below it.
    fn wildcard(text: &str) -> Result<Self> {
        let escaped: Vec<String> = text.split('*').map(|part| fancy_regex::escape(part).into_owned()).collect();
        Self::regex(&format!("{}(?:$|\\.)", escaped.join(".*")))
    }

    fn matches(&self, module: &str) -> Result<bool> {
        match self {
            Self::Contains(part) => Ok(module.contains(part.as_str())),
            Self::Exact(name) => Ok(name == module || name == "Linear"),
            Self::Regex(regex) => {
                regex.is_match(module).map_err(|error| unsupported(format!("pattern {:?}: {error}", regex.as_str())))
            }
        }
    }
}

/// The first of `keys` that is there and not null.
fn field<'a>(object: &'a Value, keys: &[&str]) -> Option<&'a Value> {
    keys.iter().find_map(|key| object.get(key).filter(|value| !value.is_null()))
}

/// A string in lower case; `None` if it is absent or null.
fn text(object: &Value, key: &str) -> Result<Option<String>> {
    match field(object, &[key]) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.to_ascii_lowercase())),
        Some(other) => Err(invalid(format!("expected a string as `{key}`, found {}", brief(other)))),
    }
}

/// A boolean; `None` if it is absent or null.
fn flag(object: &Value, key: &str) -> Result<Option<bool>> {
    match field(object, &[key]) {
        None => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(other) => Err(invalid(format!("expected a boolean as `{key}`, found {}", brief(other)))),
    }
}

/// A number of bits that is one of `known`.
fn read_bits(bits: Option<&Value>, known: &[u64]) -> Result<u32> {
    match bits {
        Some(value) if value.as_u64().is_some_and(|bits| known.contains(&bits)) => {
            Ok(value.as_u64().unwrap_or(4) as u32)
        }
        Some(value) if value.is_u64() => Err(unsupported(format!("{value}-bit weights"))),
        Some(value) => Err(invalid(format!("expected a number of bits, found {}", brief(value)))),
        None => Err(invalid("the number of bits is missing")),
    }
}

/// A group size: positive, or -1 (also 0, in some dialects) for one group a row.
fn group_size(value: &Value) -> Result<Option<usize>> {
    match value.as_i64() {
        Some(-1 | 0) => Ok(None),
        Some(size) if size > 0 => {
            usize::try_from(size).map(Some).map_err(|_| invalid(format!("`group_size` {size} is too large")))
        }
        _ => Err(invalid(format!("expected a positive number or -1 as `group_size`, found {}", brief(value)))),
    }
}

/// A list of strings; absent and null are empty.
fn strings(object: &Value, key: &str) -> Result<Vec<String>> {
    let Some(value) = field(object, &[key]) else { return Ok(Vec::new()) };
    let list = value.as_array().filter(|list| list.len() <= MAX_ENTRIES);
    let text = |entry: &Value| entry.as_str().filter(|text| text.len() <= MAX_ENTRY).map(str::to_owned);
    list.and_then(|list| list.iter().map(text).collect())
        .ok_or_else(|| invalid(format!("expected a list of at most {MAX_ENTRIES} short strings as `{key}`")))
}

/// Text of a value for a message, cut where it gets long.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidConfig, message)
}

fn unsupported(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, format!("{} is not supported", what.into()))
}
