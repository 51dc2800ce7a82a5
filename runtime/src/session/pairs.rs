//! Byte-pair models read at once from the text of a `tokenizer.json`.
//!
//! The tokenizer library reads a model of any kind into two general forms before it knows which it is, and the merges
//! into a third: for the hundred thousand tokens and merges of a language model that takes longer than all the rest of
//! opening it.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use tokenizers::models::bpe::{BPE, BpeTrainer, Vocab};
use tokenizers::{
    DecoderWrapper, Model, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Result, Token,
    TokenizerImpl,
};

/// Reads a definition whose model is of byte pairs; an error for any other, or if anything is unusual.
pub(super) fn parse(json: &[u8]) -> std::result::Result<tokenizers::Tokenizer, serde_json::Error> {
    type OfPairs = TokenizerImpl<Pairs, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;
    serde_json::from_slice::<OfPairs>(json).map(Into::into)
}

/// A byte-pair model.
struct Pairs(BPE);

impl From<Pairs> for ModelWrapper {
    fn from(pairs: Pairs) -> Self {
        Self::BPE(pairs.0)
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
        let (mut vocab, mut merges) = (None, None);
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
                "merges" => merges = Some(map.next_value::<Vec<Merge>>()?),
                _ => return Err(A::Error::custom("an unknown part of a model")),
            }
        }
        let (Some(vocab), Some(merges)) = (vocab, merges) else {
            return Err(A::Error::custom("no vocabulary or no merges"));
        };
        let merges = merges.into_iter().map(|merge| merge.0).collect();
        builder.vocab_and_merges(vocab, merges).build().map(Pairs).map_err(A::Error::custom)
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
        match (first, second, pair.next_element::<serde::de::IgnoredAny>()?) {
            (Some(first), Some(second), None) => Ok(Merge((first, second))),
            _ => Err(A::Error::custom("no two tokens")),
        }
    }
}

/// As the library's own model, which this is but for how it is read.
impl Model for Pairs {
    type Trainer = BpeTrainer;

    fn tokenize(&self, sequence: &str) -> Result<Vec<Token>> {
        self.0.tokenize(sequence)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.token_to_id(token)
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.0.id_to_token(id)
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        self.0.get_vocab()
    }

    fn get_vocab_size(&self) -> usize {
        self.0.get_vocab_size()
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> Result<Vec<PathBuf>> {
        self.0.save(folder, prefix)
    }

    fn get_trainer(&self) -> BpeTrainer {
        self.0.get_trainer()
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
                let found = parse(json.as_bytes()).unwrap();
                let expected = tokenizers::Tokenizer::from_bytes(&json).unwrap();
                assert_eq!(found.to_string(false).unwrap(), expected.to_string(false).unwrap());
                assert_eq!(
                    found.encode("a\u{e9}b<s>", true).unwrap().get_ids(),
                    expected.encode("a\u{e9}b<s>", true).unwrap().get_ids()
                );
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
            assert!(parse(definition(&model).as_bytes()).is_err(), "{model}");
        }
    }
}
