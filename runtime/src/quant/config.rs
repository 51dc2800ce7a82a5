//! The quantization section of a configuration: which dialect, and which modules it applies to.

use fancy_regex::{Regex, RegexBuilder};
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};

/// Most entries of a list of modules or targets, and longest entry in bytes.
const MAX_ENTRIES: usize = 4096;
const MAX_ENTRY: usize = 512;
/// Longest regular expression, bytes.
const MAX_PATTERN: usize = 256;

/// How packed weights lie on disk; see [`super::awq`] and [`super::compressed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// AutoAWQ `gemm`: packed along the output features.
    AwqGemm,
    /// AutoAWQ `gemv`: packed along the input features.
    AwqGemv,
    /// AutoAWQ `gemv_fast`: bands of four rows, offsets as f16.
    AwqGemvFast,
    /// compressed-tensors `pack-quantized`.
    PackQuantized,
    /// GPTQModel's second GPTQ format.
    GptqV2,
}

impl Dialect {
    /// Name as its writers use it.
    pub fn name(self) -> &'static str {
        match self {
            Self::AwqGemm => "awq gemm",
            Self::AwqGemv => "awq gemv",
            Self::AwqGemvFast => "awq gemv_fast",
            Self::PackQuantized => "compressed-tensors pack-quantized",
            Self::GptqV2 => "gptq_v2",
        }
    }

    /// Suffix of the tensor with the codes, which tells that a module is packed.
    pub fn codes_suffix(self) -> &'static str {
        match self {
            Self::PackQuantized => "weight_packed",
            _ => "qweight",
        }
    }

    /// Output and input features of packed codes stored with this shape, or `None` if it is none of this layout's.
    pub fn stored_shape(self, codes: &[usize], bits: u32) -> Option<(usize, usize)> {
        let &[rows, columns] = codes else { return None };
        let features = |words: usize| Some(words.checked_mul(32)? / (bits.max(1) as usize));
        match self {
            Self::PackQuantized => Some((rows, features(columns)?)),
            Self::GptqV2 => Some((columns, features(rows)?)),
            Self::AwqGemm => Some((columns.checked_mul(8)?, rows)),
            Self::AwqGemv => Some((rows, columns.checked_mul(8)?)),
            Self::AwqGemvFast => Some((rows.checked_mul(4)?, columns)),
        }
    }
}

/// How one module is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheme {
    /// Layout on disk.
    pub dialect: Dialect,
    /// Bits of a code: 2, 3, 4 or 8; always 4 in the AWQ dialects.
    pub bits: u32,
    /// Input features that share a scale; `None`: one group a row.
    pub group_size: Option<usize>,
    /// Whether every zero point is 8 and none is stored.
    pub symmetric: bool,
}

/// The quantization section of a checkpoint.
#[derive(Debug, Clone)]
pub struct Quantization {
    dialect: Dialect,
    groups: Vec<Group>,
    ignore: Vec<Pattern>,
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
        let found = Self::from_config(checkpoint.config(), None);
        let found = found.map_err(|error| error.in_file(checkpoint.dir().join("config.json")))?;
        if found.is_some() {
            return Ok(found);
        }
        let Some(fallback) = checkpoint.json("quant_config.json")? else { return Ok(None) };
        Self::from_config(checkpoint.config(), Some(&fallback))
            .map_err(|error| error.in_file(checkpoint.dir().join("quant_config.json")))
    }

    /// Reads `quantization_config` of a `config.json`; if it has none, `fallback` is a separate `quant_config.json` as
    /// older AutoAWQ versions wrote it. `None` if neither says anything.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] naming a method, format or option that is not read, [`ErrorKind::InvalidConfig`] if
    /// a value is missing, of the wrong type or out of range.
    pub fn from_config(config: &Value, fallback: Option<&Value>) -> Result<Option<Self>> {
        let present = |key: &str| config.get(key).filter(|value| !value.is_null());
        let Some(section) = present("quantization_config").or_else(|| present("compression_config")).or(fallback)
        else {
            return match present("quantization") {
                Some(_) => Err(unsupported("MLX quantization (`quantization` in the configuration)")),
                None => Ok(None),
            };
        };
        if !section.is_object() {
            return Err(invalid("`quantization_config` is not an object"));
        }
        // Only the separate file of AutoAWQ names no method.
        let method = match field(section, &["quant_method"]) {
            Some(Value::String(method)) => method.to_ascii_lowercase(),
            Some(other) => return Err(invalid(format!("expected a string as `quant_method`, found {}", brief(other)))),
            None if field(section, &["config_groups"]).is_some() => "compressed-tensors".into(),
            None if field(section, &["w_bit", "version"]).is_some() => "awq".into(),
            None => return Err(invalid("`quant_method` is missing")),
        };
        match method.as_str() {
            "awq" => awq(section).map(Some),
            "compressed-tensors" => compressed_tensors(section).map(Some),
            "gptq" => gptq(section).map(Some),
            _ => Err(unsupported(format!("quant_method {}", brief(&Value::String(method))))),
        }
    }

    /// Layout of the packed modules.
    pub fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// Scheme of the first group, which is the only one in nearly every checkpoint.
    pub fn scheme(&self) -> Scheme {
        self.groups[0].scheme
    }

    /// How the linear module `module` (a name without `.weight`) is packed, or `None` if it is excluded.
    ///
    /// The exclusion list wins; a target that names the module wins over a regular expression, and that over a class.
    pub fn scheme_of(&self, module: &str) -> Result<Option<Scheme>> {
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
}

impl Pattern {
    fn parse(text: &str) -> Result<Self> {
        let Some(pattern) = text.strip_prefix("re:") else { return Ok(Self::Exact(text.to_owned())) };
        if pattern.len() > MAX_PATTERN {
            return Err(unsupported(format!("a pattern of {} bytes (at most {MAX_PATTERN})", pattern.len())));
        }
        // Bounds on compiled size and backtracking keep a hostile pattern from taking memory or time.
        RegexBuilder::new(&format!("^(?:{pattern})"))
            .backtrack_limit(100_000)
            .delegate_size_limit(1 << 20)
            .build()
            .map(|regex| Self::Regex(Box::new(regex)))
            .map_err(|error| unsupported(format!("pattern {text:?}: {error}")))
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

fn awq(section: &Value) -> Result<Quantization> {
    read_bits(field(section, &["bits", "w_bit"]), &[4])?;
    let version = match field(section, &["version"]) {
        None => "gemm".to_owned(),
        Some(Value::String(version)) => version.to_ascii_lowercase(),
        Some(other) => return Err(invalid(format!("expected a string as `version`, found {}", brief(other)))),
    };
    let dialect = match version.as_str() {
        "gemm" => Dialect::AwqGemm,
        "gemv" => Dialect::AwqGemv,
        "gemv_fast" => Dialect::AwqGemvFast,
        _ => return Err(unsupported(format!("AWQ version {}", brief(&Value::String(version))))),
    };
    let group_size = match field(section, &["group_size", "q_group_size"]) {
        None => return Err(invalid("`group_size` is missing")),
        Some(value) => group_size(value)?,
    };
    let ignore = strings(section, "modules_to_not_convert")?.into_iter().map(Pattern::Contains).collect();
    // `zero_point` is not asked: writers that say false store constant zero points, and what is stored decides.
    let scheme = Scheme { dialect, bits: 4, group_size, symmetric: false };
    Ok(Quantization {
        dialect,
        groups: vec![Group { targets: vec![Pattern::Contains(String::new())], scheme }],
        ignore,
    })
}

fn compressed_tensors(section: &Value) -> Result<Quantization> {
    let format = field(section, &["format"]).and_then(Value::as_str);
    if let Some(sparsity) = field(section, &["sparsity_config"]).and_then(|s| s.get("format")).and_then(Value::as_str)
        && sparsity != "dense"
    {
        return Err(unsupported(format!("sparsity format {sparsity:?}")));
    }
    let transforms = field(section, &["transform_config"]).and_then(|t| t.get("config_groups"));
    if transforms.and_then(Value::as_object).is_some_and(|groups| !groups.is_empty()) {
        return Err(unsupported("compressed-tensors `transform_config`"));
    }
    let config_groups = match field(section, &["config_groups"]) {
        Some(Value::Object(groups)) if !groups.is_empty() && groups.len() <= MAX_ENTRIES => groups,
        _ => return Err(invalid("`config_groups` is missing, empty or too large")),
    };
    let mut groups = Vec::with_capacity(config_groups.len());
    for (name, group) in config_groups {
        let of_group = |error: Error| Error::new(error.kind(), format!("`{name}`: {}", error.message()));
        groups.push(config_group(group, format).map_err(of_group)?);
    }
    let ignore = strings(section, "ignore")?.iter().map(|text| Pattern::parse(text)).collect::<Result<_>>()?;
    Ok(Quantization { dialect: Dialect::PackQuantized, groups, ignore })
}

fn config_group(group: &Value, file_format: Option<&str>) -> Result<Group> {
    match field(group, &["format"]).and_then(Value::as_str).or(file_format) {
        Some("pack-quantized") => {}
        Some(other) => return Err(unsupported(format!("compressed-tensors format {other:?}"))),
        None => return Err(invalid("`format` is missing")),
    }
    for key in ["input_activations", "output_activations"] {
        if field(group, &[key]).is_some() {
            return Err(unsupported(format!("quantized activations (`{key}`)")));
        }
    }
    let Some(weights) = field(group, &["weights"]) else { return Err(invalid("`weights` is missing")) };
    let bits = read_bits(field(weights, &["num_bits"]), &[2, 3, 4, 8])?;
    let text = |key: &str| field(weights, &[key]).and_then(Value::as_str);
    match text("type") {
        None | Some("int") => {}
        Some(other) => return Err(unsupported(format!("weights of type {other:?}"))),
    }
    match field(weights, &["actorder"]) {
        None | Some(Value::Bool(false)) => {}
        Some(Value::String(order)) if order == "static" || order == "weight" => {}
        Some(other) => return Err(unsupported(format!("`actorder` {}", brief(other)))),
    }
    let stated = field(weights, &["group_size"]).map(group_size).transpose()?;
    let group_size = match text("strategy") {
        Some("channel") => None,
        Some("group") => Some(stated.flatten().ok_or_else(|| invalid("`group_size` of strategy `group` is missing"))?),
        // Older writers leave the strategy out and mean what the group size says.
        None => stated.ok_or_else(|| invalid("both `strategy` and `group_size` are missing"))?,
        Some(other) => return Err(unsupported(format!("quantization strategy {other:?}"))),
    };
    let symmetric = match field(weights, &["symmetric"]) {
        None => true,
        Some(Value::Bool(symmetric)) => *symmetric,
        Some(other) => return Err(invalid(format!("expected a boolean as `symmetric`, found {}", brief(other)))),
    };
    let targets = strings(group, "targets")?.iter().map(|text| Pattern::parse(text)).collect::<Result<Vec<_>>>()?;
    if targets.is_empty() {
        return Err(invalid("`targets` is missing or empty"));
    }
    Ok(Group { targets, scheme: Scheme { dialect: Dialect::PackQuantized, bits, group_size, symmetric } })
}

fn gptq(section: &Value) -> Result<Quantization> {
    let format = field(section, &["checkpoint_format"]).and_then(Value::as_str).unwrap_or("gptq");
    if format != "gptq_v2" {
        return Err(unsupported(format!("GPTQ checkpoint format {format:?} (gptq_v2 is read)")));
    }
    if let Some(pack) = field(section, &["pack_dtype"]).filter(|pack| pack.as_str() != Some("int32")) {
        return Err(unsupported(format!("`pack_dtype` {}", brief(pack))));
    }
    if field(section, &["desc_act"]).and_then(Value::as_bool).unwrap_or(false) {
        return Err(unsupported("`desc_act`: groups in the order of activations"));
    }
    let scheme = |section: &Value, base: Option<Scheme>| -> Result<Scheme> {
        let bits = match (field(section, &["bits"]), base) {
            (None, Some(base)) => base.bits,
            (bits, _) => read_bits(bits, &[2, 3, 4, 8])?,
        };
        let group_size = match (field(section, &["group_size"]), base) {
            (None, Some(base)) => base.group_size,
            (None, None) => return Err(invalid("`group_size` is missing")),
            (Some(value), _) => group_size(value)?,
        };
        Ok(Scheme { dialect: Dialect::GptqV2, bits, group_size, symmetric: false })
    };
    let base = scheme(section, None)?;
    let mut groups = vec![Group { targets: vec![Pattern::Contains(String::new())], scheme: base }];
    let mut ignore = Vec::new();
    match field(section, &["dynamic"]) {
        None => {}
        Some(Value::Object(rules)) if rules.len() <= MAX_ENTRIES => {
            for (rule, change) in rules {
                let pattern = |text: &str| Pattern::parse(&format!("re:{text}"));
                match rule.strip_prefix("-:") {
                    Some(text) => ignore.push(pattern(text)?),
                    None => {
                        let targets = vec![pattern(rule.strip_prefix("+:").unwrap_or(rule))?];
                        groups.push(Group { targets, scheme: scheme(change, Some(base))? });
                    }
                }
            }
        }
        Some(other) => return Err(invalid(format!("expected an object as `dynamic`, found {}", brief(other)))),
    }
    Ok(Quantization { dialect: Dialect::GptqV2, groups, ignore })
}

/// The first of `keys` that is there and not null.
fn field<'a>(object: &'a Value, keys: &[&str]) -> Option<&'a Value> {
    keys.iter().find_map(|key| object.get(key).filter(|value| !value.is_null()))
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

/// A group size: a multiple of 8, or -1 for one group a row.
fn group_size(value: &Value) -> Result<Option<usize>> {
    match value.as_i64() {
        Some(-1) => Ok(None),
        Some(size) if size > 0 && size % 8 == 0 => {
            usize::try_from(size).map(Some).map_err(|_| invalid(format!("`group_size` {size} is too large")))
        }
        Some(size) if size > 0 => Err(unsupported(format!("group size {size}, not a multiple of 8"))),
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
