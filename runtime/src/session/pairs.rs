//! Byte-pair models read at once from the text of a `tokenizer.json`.
//!
//! The tokenizer library reads a model of any kind into two general forms before it knows which it is, and the merges
//! into a third: for the hundred thousand tokens and merges of a language model that takes longer than all the rest of
//! opening it.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use tokenizers::models::bpe::{BPE, BpeBuilder, BpeTrainer, Vocab};
use tokenizers::{
    DecoderWrapper, Model, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Result, Token,
    TokenizerImpl,
};

type OfPairs = TokenizerImpl<Pairs, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// Reads a definition whose model is of byte pairs; an error for any other, or if anything is unusual. Where `aside`, a
/// thread of its own reads the merges meanwhile, half of the text.
pub(super) fn parse(json: &[u8], aside: bool) -> std::result::Result<tokenizers::Tokenizer, serde_json::Error> {
    let merges = || serde_json::from_slice::<OnlyMerges>(json);
    let (tokenizer, merges) = std::thread::scope(|scope| {
        let thread = aside.then(|| std::thread::Builder::new().spawn_scoped(scope, merges).ok()).flatten();
        let tokenizer = serde_json::from_slice::<OfPairs>(json);
        match thread.map(std::thread::ScopedJoinHandle::join) {
            Some(Ok(merges)) => Ok((tokenizer?, merges?)),
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            // Nobody else was to read them, or the system refused a thread.
            None => Ok::<_, serde_json::Error>((tokenizer?, merges()?)),
        }
    })?;
    let merges = merges.model.merges.into_iter().map(|merge| merge.0).collect();
    let (builder, vocab) = std::mem::take(&mut *tokenizer.get_model().lock());
    let model = builder.vocab_and_merges(vocab, merges).build().map_err(serde_json::Error::custom)?;
    let mut tokenizer = tokenizers::Tokenizer::from(tokenizer);
    tokenizer.with_model(model);
    Ok(tokenizer)
}

/// The merges of a definition, whatever else is in it.
#[derive(serde::Deserialize)]
struct OnlyMerges {
    model: Merges,
}

#[derive(serde::Deserialize)]
struct Merges {
    merges: Vec<Merge>,
}

/// A byte-pair model but for its merges, which the rest of a definition does not need.
struct Pairs(Mutex<(BpeBuilder, Vocab)>);

impl Pairs {
    fn lock(&self) -> MutexGuard<'_, (BpeBuilder, Vocab)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Nothing: the whole model takes its place.
impl From<Pairs> for ModelWrapper {
    fn from(_: Pairs) -> Self {
        Self::BPE(BPE::default())
    }
}

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(PairsVisitor)
    }
}

struct PairsVisitor;

impl<'de> Visitor<'de> for PairsVisitor {
    type Value = Pairs;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a byte-pair model")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Pairs, A::Error> {
        let mut builder = BPE::builder();
        let mut vocab = None;
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "type" => {
                    if map.next_value::<String>()? != "BPE" {
                        return Err(A::Error::custom("another kind of model"));
                    }
                }
                "dropout" => builder = set(builder, map.next_value()?, |b, v| b.dropout(v)),
                "unk_token" => builder = set(builder, map.next_value()?, |b, v| b.unk_token(v)),
                "continuing_subword_prefix" => {
                    builder = set(builder, map.next_value()?, |b, v| b.continuing_subword_prefix(v));
                }
                "end_of_word_suffix" => builder = set(builder, map.next_value()?, |b, v| b.end_of_word_suffix(v)),
                "fuse_unk" => builder = set(builder, map.next_value()?, |b, v| b.fuse_unk(v)),
                "byte_fallback" => builder = set(builder, map.next_value()?, |b, v| b.byte_fallback(v)),
                "ignore_merges" => builder = set(builder, map.next_value()?, |b, v| b.ignore_merges(v)),
                "vocab" => vocab = Some(map.next_value::<Vocab>()?),
                "merges" => {
                    map.next_value::<IgnoredAny>()?;
                }
                _ => return Err(A::Error::custom("an unknown part of a model")),
            }
        }
        let vocab = vocab.ok_or_else(|| A::Error::custom("no vocabulary"))?;
        Ok(Pairs(Mutex::new((builder, vocab))))
    }
}

/// Applies `with` to what is no null.
fn set<B, V>(builder: B, value: Option<V>, with: impl FnOnce(B, V) -> B) -> B {
    match value {
        Some(value) => with(builder, value),
        None => builder,
    }
}

/// Two tokens that become one: a list of them, or both in one text with a space in between.
struct Merge((String, String));

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(MergeVisitor)
    }
}

struct MergeVisitor;

impl<'de> Visitor<'de> for MergeVisitor {
    type Value = Merge;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("two tokens")
    }

    fn visit_str<E: Error>(self, both: &str) -> std::result::Result<Merge, E> {
        match both.split_once(' ') {
            // Older files may begin with a line that names their version.
            Some((first, second)) if !second.contains(' ') && !both.starts_with("#version") => {
                Ok(Merge((first.to_owned(), second.to_owned())))
            }
            _ => Err(E::custom("no two tokens")),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut pair: A) -> std::result::Result<Merge, A::Error> {
        let (first, second) = (pair.next_element()?, pair.next_element()?);
        match (first, second, pair.next_element::<IgnoredAny>()?) {
            (Some(first), Some(second), None) => Ok(Merge((first, second))),
            _ => Err(A::Error::custom("no two tokens")),
        }
    }
}

/// What reading the rest of a definition asks a model for, which is its tokens.
impl Model for Pairs {
    type Trainer = BpeTrainer;

    fn tokenize(&self, _: &str) -> Result<Vec<Token>> {
        Err("a model without merges".into())
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.lock().1.get(token).copied()
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.lock().1.iter().find(|(_, of)| **of == id).map(|(token, _)| token.clone())
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        self.lock().1.iter().map(|(token, id)| (token.clone(), *id)).collect()
    }

    fn get_vocab_size(&self) -> usize {
        self.lock().1.len()
    }

    fn save(&self, _: &Path, _: Option<&str>) -> Result<Vec<PathBuf>> {
        Err("a model without merges".into())
    }

    fn get_trainer(&self) -> BpeTrainer {
        BpeTrainer::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(model: &str) -> String {
        format!(
            r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{{"id":5,"content":"<s>",
            "single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}}],"normalizer":null,
            "pre_tokenizer":null,"post_processor":null,"decoder":{{"type":"ByteFallback"}},"model":{model}}}"#
        )
    }

    /// The same as the library's own reading in every respect that it can write down.
    #[test]
    fn models_are_those_of_the_library() {
        let parts = r#""dropout":null,"unk_token":"<unk>","continuing_subword_prefix":null,"end_of_word_suffix":"",
            "fuse_unk":true,"byte_fallback":false,"vocab":{"<unk>":0,"a":1,"\u00e9":2,"a\u00e9":3,"b":4}"#;
        for merges in [r#"["a \u00e9"]"#, r#"[["a","\u00e9"]]"#, "[]"] {
            for kind in [r#""type":"BPE","#, ""] {
                let json = definition(&format!(r#"{{{kind}{parts},"merges":{merges}}}"#));
                let expected = tokenizers::Tokenizer::from_bytes(&json).unwrap();
                for aside in [false, true] {
                    let found = parse(json.as_bytes(), aside).unwrap();
                    assert_eq!(found.to_string(false).unwrap(), expected.to_string(false).unwrap());
                    assert_eq!(
                        found.encode("a\u{e9}b<s>", true).unwrap().get_ids(),
                        expected.encode("a\u{e9}b<s>", true).unwrap().get_ids()
                    );
                }
            }
        }
    }

    #[test]
    fn what_is_unusual_is_left_to_the_library() {
        let vocab = r#""vocab":{"a":0,"b":1}"#;
        for model in [
            format!(r#"{{"type":"WordLevel",{vocab},"unk_token":"a"}}"#),
            format!(r#"{{"type":"BPE",{vocab}}}"#),
            format!(r#"{{"type":"BPE",{vocab},"merges":["ab"]}}"#),
            format!(r#"{{"type":"BPE",{vocab},"merges":[["a","b","a"]]}}"#),
            format!(r#"{{"type":"BPE",{vocab},"merges":["a b"]}}"#),
            format!(r##"{{"type":"BPE",{vocab},"merges":["#version: 0.2"]}}"##),
            format!(r#"{{"type":"BPE",{vocab},"merges":[],"more":1}}"#),
            "[]".into(),
        ] {
            assert!(parse(definition(&model).as_bytes(), true).is_err(), "{model}");
        }
    }
}
