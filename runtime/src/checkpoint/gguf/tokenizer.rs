//! `tokenizer.json` and its companions from the vocabulary of the metadata.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use super::model::GgufModel;
use super::spm::merges_from_scores;
use super::{Array, Gguf};
use crate::error::{Error, ErrorKind, Result};

/// Longest piece of a SentencePiece model, in bytes; its splits are tried one by one.
const MAX_PIECE: usize = 4096;
/// Names under which control tokens end a turn, whatever the metadata say; the generation stops at all of them.
const END_OF_TURN: &[&str] =
    &["<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>"];
const LLAMA3_SPLIT: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| \
                            ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const QWEN2_SPLIT: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| \
                           ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
/// What llama.cpp does for files without a known pre-tokenizer: four cuts, one after the other.
const DEFAULT_SPLITS: &[&str] = &[
    "[\\p{P}\\$\\+<=>\\^~\\|]+",
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)",
    "\\p{N}+",
    "[0-9][0-9][0-9]",
];

/// A vocabulary with its rules and special tokens.
pub(super) struct Vocabulary {
    tokens: Vec<Token>,
    kind: Kind,
    add_bos: bool,
    add_eos: bool,
    chat_template: Option<String>,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) pad: Option<u32>,
    unk: Option<u32>,
    /// Ids that end the generation, the first one being `eos`.
    ends: Vec<u32>,
}

struct Token {
    text: String,
    token_type: TokenType,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum TokenType {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

enum Kind {
    /// Byte-level BPE with its merges and the name of its pre-tokenizer.
    ByteLevel { merges: Vec<(String, String)>, pre: Pre },
    /// SentencePiece BPE with byte fallback.
    SentencePiece { merges: Vec<(String, String)>, space_prefix: bool },
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Pre {
    Default,
    Gpt2,
    Smollm,
    Llama3,
    Qwen2,
}

/// Reads the vocabulary of `model`, whose embedding has `vocab_size` rows.
pub(super) fn read(model: &GgufModel, vocab_size: usize) -> Result<Vocabulary> {
    read_inner(model.metadata(), vocab_size).map_err(|e| e.in_file(model.metadata().path()))
}

fn read_inner(gguf: &Gguf, vocab_size: usize) -> Result<Vocabulary> {
    let tokens = read_tokens(gguf, vocab_size)?;
    let kind = match gguf.string("tokenizer.ggml.model")? {
        Some("gpt2") => Kind::ByteLevel { merges: read_merges(gguf, &tokens)?, pre: read_pre(gguf)? },
        Some("llama") => read_sentence_piece(gguf, &tokens)?,
        Some(other) => return Err(Error::new(ErrorKind::Unsupported, format!("tokenizer model `{other}`"))),
        None => return Err(invalid("metadata `tokenizer.ggml.model` is missing")),
    };
    let id = |key: &str| -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{key}_token_id");
        match gguf.uint(&key)? {
            None => Ok(None),
            Some(id) if id < tokens.len() as u64 => Ok(u32::try_from(id).ok()),
            // Written by converters for models that have no such token.
            Some(id) if id == u64::from(u32::MAX) => Ok(None),
            Some(id) => Err(invalid(format!("metadata `{key}` is {id}, the vocabulary has {} tokens", tokens.len()))),
        }
    };
    let (bos, eos, pad, unk) = (id("bos")?, id("eos")?, id("padding")?, id("unknown")?);
    let mut ends: Vec<u32> = [eos, id("eot")?, id("eom")?].into_iter().flatten().collect();
    let named = tokens
        .iter()
        .zip(0u32..)
        .filter(|(token, _)| token.token_type == TokenType::Control && END_OF_TURN.contains(&token.text.as_str()));
    ends.extend(named.map(|(_, id)| id));
    let mut seen = Vec::new();
    ends.retain(|id| {
        !seen.contains(id) && {
            seen.push(*id);
            true
        }
    });

    let bos_by_default = match &kind {
        Kind::SentencePiece { .. } => true,
        Kind::ByteLevel { pre, .. } => *pre == Pre::Llama3,
    };
    let add_bos = gguf.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(bos_by_default) && bos.is_some();
    let add_eos = gguf.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false) && eos.is_some();
    let chat_template = gguf.string("tokenizer.chat_template")?.map(str::to_owned);
    Ok(Vocabulary { tokens, kind, add_bos, add_eos, chat_template, bos, eos, pad, unk, ends })
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidConfig, message)
}

fn strings<'a>(gguf: &'a Gguf, key: &str) -> Result<&'a [String]> {
    match gguf.array(key)? {
        Some(Array::String(strings)) => Ok(strings),
        Some(_) => Err(invalid(format!("metadata `{key}`: expected strings"))),
        None => Err(invalid(format!("metadata `{key}` is missing"))),
    }
}

fn read_tokens(gguf: &Gguf, vocab_size: usize) -> Result<Vec<Token>> {
    const KEY: &str = "tokenizer.ggml.token_type";
    let texts = strings(gguf, "tokenizer.ggml.tokens")?;
    if texts.is_empty() || texts.len() > vocab_size {
        return Err(invalid(format!("{} tokens, the embedding has {vocab_size} rows", texts.len())));
    }
    let types: Vec<i64> = match gguf.array(KEY)? {
        None => vec![1; texts.len()],
        Some(Array::Int(types)) => types.clone(),
        Some(Array::Uint(types)) => types.iter().map(|t| i64::try_from(*t).unwrap_or(0)).collect(),
        Some(_) => return Err(invalid(format!("metadata `{KEY}`: expected integers"))),
    };
    if types.len() != texts.len() {
        return Err(invalid(format!("metadata `{KEY}`: {} types for {} tokens", types.len(), texts.len())));
    }
    let mut ids = HashMap::new();
    let mut tokens = Vec::new();
    for (id, (text, token_type)) in texts.iter().zip(&types).enumerate() {
        let token_type = match token_type {
            1 => TokenType::Normal,
            2 => TokenType::Unknown,
            3 => TokenType::Control,
            4 => TokenType::UserDefined,
            5 => TokenType::Unused,
            6 => TokenType::Byte,
            other => return Err(invalid(format!("metadata `{KEY}`: unknown type {other} of token {id}"))),
        };
        if let Some(first) = ids.insert(text.as_str(), id) {
            return Err(invalid(format!("tokens {first} and {id} are both `{text}`")));
        }
        tokens.push(Token { text: text.clone(), token_type });
    }
    Ok(tokens)
}

/// Whether a token only fills the vocabulary up to the rows of the embedding.
fn is_filler(token: &Token) -> bool {
    token.token_type == TokenType::Unused && token.text.starts_with("[PAD")
}

fn read_merges(gguf: &Gguf, tokens: &[Token]) -> Result<Vec<(String, String)>> {
    const KEY: &str = "tokenizer.ggml.merges";
    let vocab: std::collections::HashSet<&str> = tokens.iter().map(|token| token.text.as_str()).collect();
    let mut merges = Vec::new();
    for (rank, merge) in strings(gguf, KEY)?.iter().enumerate() {
        let Some((left, right)) = merge.split_once(' ').filter(|(left, right)| !left.is_empty() && !right.is_empty())
        else {
            return Err(invalid(format!("metadata `{KEY}`: merge {rank} `{merge}` is not a pair")));
        };
        for text in [left, right, &format!("{left}{right}")] {
            if !vocab.contains(text) {
                return Err(invalid(format!("metadata `{KEY}`: `{text}` of merge {rank} is not a token")));
            }
        }
        merges.push((left.to_owned(), right.to_owned()));
    }
    Ok(merges)
}

fn read_pre(gguf: &Gguf) -> Result<Pre> {
    match gguf.string("tokenizer.ggml.pre")?.unwrap_or("default") {
        "default" => Ok(Pre::Default),
        "gpt-2" => Ok(Pre::Gpt2),
        "smollm" => Ok(Pre::Smollm),
        "llama-bpe" | "llama3" | "llama-v3" => Ok(Pre::Llama3),
        "qwen2" | "deepseek-r1-qwen" => Ok(Pre::Qwen2),
        other => Err(Error::new(ErrorKind::Unsupported, format!("pre-tokenizer `{other}`"))),
    }
}

fn read_sentence_piece(gguf: &Gguf, tokens: &[Token]) -> Result<Kind> {
    const KEY: &str = "tokenizer.ggml.scores";
    let charsmap = gguf.metadata().contains_key("tokenizer.ggml.precompiled_charsmap");
    if charsmap || gguf.bool("tokenizer.ggml.remove_extra_whitespaces")?.unwrap_or(false) {
        return Err(Error::new(ErrorKind::Unsupported, "SentencePiece model with a text normalizer"));
    }
    let scores = match gguf.array(KEY)? {
        Some(Array::Float(scores)) if scores.len() == tokens.len() => scores,
        Some(_) => return Err(invalid(format!("metadata `{KEY}`: expected {} floats", tokens.len()))),
        None => return Err(invalid(format!("metadata `{KEY}` is missing"))),
    };
    let vocab: HashMap<&str, u32> = tokens.iter().map(|token| token.text.as_str()).zip(0..).collect();
    let mut pieces = Vec::new();
    for (id, (token, score)) in tokens.iter().zip(scores).enumerate() {
        if score.is_nan() || token.text.len() > MAX_PIECE {
            return Err(invalid(format!("token {id}: {} bytes, score {score}", token.text.len())));
        }
        if token.token_type == TokenType::Normal {
            pieces.push((token.text.as_str(), *score));
        }
    }
    if let Some(byte) = (0..=255u8).map(|b| format!("<0x{b:02X}>")).find(|byte| !vocab.contains_key(byte.as_str())) {
        return Err(Error::new(ErrorKind::Unsupported, format!("SentencePiece model without the byte token `{byte}`")));
    }
    let merges = merges_from_scores(&pieces, &vocab);
    let merges = merges.into_iter().map(|(left, right)| (left.to_owned(), right.to_owned())).collect();
    let space_prefix = gguf.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    Ok(Kind::SentencePiece { merges, space_prefix })
}

impl Vocabulary {
    fn text(&self, id: Option<u32>) -> Option<&str> {
        self.tokens.get(usize::try_from(id?).ok()?).map(|token| token.text.as_str())
    }

    /// The content of `tokenizer.json`.
    pub(super) fn tokenizer_json(&self) -> Json {
        let (merges, normalizer, pre_tokenizer, decoder) = match &self.kind {
            Kind::ByteLevel { merges, pre } => (
                merges,
                if *pre == Pre::Qwen2 { json!({ "type": "NFC" }) } else { Json::Null },
                pre.to_json(),
                json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true }),
            ),
            Kind::SentencePiece { merges, space_prefix } => {
                let (normalizer, decoder) = sentence_piece_rules(*space_prefix);
                (merges, normalizer, Json::Null, decoder)
            }
        };
        let spm = matches!(self.kind, Kind::SentencePiece { .. });
        let vocab: Map<String, Json> = self
            .tokens
            .iter()
            .zip(0u32..)
            .filter(|(token, _)| !is_filler(token))
            .map(|(token, id)| (token.text.clone(), json!(id)))
            .collect();
        let ignore_merges = matches!(self.kind, Kind::ByteLevel { pre: Pre::Llama3, .. });
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added_tokens(),
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.post_processor(),
            "decoder": decoder,
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": if spm { self.text(self.unknown()) } else { None },
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": spm,
                "byte_fallback": spm,
                "ignore_merges": ignore_merges,
                "vocab": vocab,
                "merges": merges,
            },
        })
    }

    fn unknown(&self) -> Option<u32> {
        let by_type = || self.tokens.iter().position(|token| token.token_type == TokenType::Unknown);
        self.unk.or_else(|| by_type().and_then(|id| u32::try_from(id).ok()))
    }

    fn added_tokens(&self) -> Vec<Json> {
        let added = self.tokens.iter().zip(0u32..).filter_map(|(token, id)| {
            let special = match token.token_type {
                TokenType::Control | TokenType::Unknown => true,
                TokenType::UserDefined => false,
                TokenType::Normal | TokenType::Unused | TokenType::Byte => return None,
            };
            Some(json!({
                "id": id,
                "content": token.text,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": special,
            }))
        });
        // An empty text would match everywhere.
        added.filter(|token| token["content"] != "").collect()
    }

    fn post_processor(&self) -> Json {
        let bos = self.text(self.bos.filter(|_| self.add_bos));
        let eos = self.text(self.eos.filter(|_| self.add_eos));
        if bos.is_none() && eos.is_none() {
            return Json::Null;
        }
        let special = |text: &str, type_id: u32| json!({ "SpecialToken": { "id": text, "type_id": type_id } });
        let sequence = |name: &str, type_id: u32| {
            let mut items = Vec::new();
            items.extend(bos.map(|bos| special(bos, type_id)));
            items.push(json!({ "Sequence": { "id": name, "type_id": type_id } }));
            items.extend(eos.map(|eos| special(eos, type_id)));
            items
        };
        let mut special_tokens = Map::new();
        for (text, id) in [(bos, self.bos), (eos, self.eos)] {
            if let Some(text) = text {
                special_tokens.insert(text.to_owned(), json!({ "id": text, "ids": [id], "tokens": [text] }));
            }
        }
        let pair = [sequence("A", 0), sequence("B", 1)].concat();
        json!({
            "type": "TemplateProcessing",
            "single": sequence("A", 0),
            "pair": pair,
            "special_tokens": special_tokens,
        })
    }

    /// The content of `tokenizer_config.json`.
    pub(super) fn tokenizer_config_json(&self, model_max_length: usize) -> Json {
        let mut json = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model_max_length,
            "clean_up_tokenization_spaces": false,
            "add_bos_token": self.add_bos,
            "add_eos_token": self.add_eos,
        });
        let names = [("bos", self.bos), ("eos", self.eos), ("pad", self.pad), ("unk", self.unknown())];
        for (name, id) in names {
            json[format!("{name}_token")] = json!(self.text(id));
        }
        if let Some(template) = &self.chat_template {
            json["chat_template"] = json!(template);
        }
        json
    }

    /// The content of `generation_config.json`.
    pub(super) fn generation_config_json(&self) -> Json {
        let mut json = Map::new();
        if let Some(bos) = self.bos {
            json.insert("bos_token_id".to_owned(), json!(bos));
        }
        match self.ends.as_slice() {
            [] => {}
            [only] => drop(json.insert("eos_token_id".to_owned(), json!(only))),
            several => drop(json.insert("eos_token_id".to_owned(), json!(several))),
        }
        if let Some(pad) = self.pad {
            json.insert("pad_token_id".to_owned(), json!(pad));
        }
        Json::Object(json)
    }
}

impl Pre {
    fn to_json(self) -> Json {
        let byte_level = |use_regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex });
        let split = |regex: &str| json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false });
        let steps: Vec<Json> = match self {
            Self::Gpt2 => return byte_level(true),
            Self::Smollm => vec![json!({ "type": "Digits", "individual_digits": true }), byte_level(true)],
            Self::Llama3 => vec![split(LLAMA3_SPLIT), byte_level(false)],
            Self::Qwen2 => vec![split(QWEN2_SPLIT), byte_level(false)],
            Self::Default => DEFAULT_SPLITS.iter().map(|regex| split(regex)).chain([byte_level(false)]).collect(),
        };
        json!({ "type": "Sequence", "pretokenizers": steps })
    }
}

/// Normalizer and decoder of a SentencePiece model: spaces are U+2581, one of them in front of the text.
fn sentence_piece_rules(space_prefix: bool) -> (Json, Json) {
    let mut normalizers = Vec::new();
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": "\u{2581}" }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if space_prefix {
        normalizers.push(json!({ "type": "Prepend", "prepend": "\u{2581}" }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    normalizers.push(json!({ "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" }));
    (json!({ "type": "Sequence", "normalizers": normalizers }), json!({ "type": "Sequence", "decoders": decoders }))
}
