//! A byte-pair model out of JSON, whose texts are read into one.

use std::fmt;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{Pairs, Tokens};

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(PairsVisitor)
    }
}

struct PairsVisitor;

impl<'de> Visitor<'de> for PairsVisitor {
    type Value = Pairs;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a byte-pair model")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
        let unusual = A::Error::custom;
        let (mut tokens, mut merges, mut unknown) = (None, None, None);
        let [mut fuse_unknown, mut byte_fallback, mut whole_words] = [false; 3];
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "type" => {
                    if map.next_value::<String>()? != "BPE" {
                        return Err(unusual("another kind of model"));
                    }
                }
                "dropout" => {
                    if map.next_value::<Option<f32>>()?.is_some() {
                        return Err(unusual("a model that is random"));
                    }
                }
                "continuing_subword_prefix" | "end_of_word_suffix" => {
                    if map.next_value::<Option<String>>()?.is_some_and(|affix| !affix.is_empty()) {
                        return Err(unusual("tokens that depend on where in a word they are"));
                    }
                }
                "unk_token" => unknown = map.next_value::<Option<String>>()?,
                "fuse_unk" => fuse_unknown = map.next_value::<Option<bool>>()?.unwrap_or(false),
                "byte_fallback" => byte_fallback = map.next_value::<Option<bool>>()?.unwrap_or(false),
                "ignore_merges" => whole_words = map.next_value::<Option<bool>>()?.unwrap_or(false),
                "vocab" => tokens = Some(map.next_value::<Listed>()?),
                "merges" => merges = Some(map.next_value::<Merges>()?),
                _ => return Err(unusual("an unknown part of a model")),
            }
        }
        let tokens = tokens.ok_or_else(|| unusual("no vocabulary"))?.tokens();
        let tokens = tokens.ok_or_else(|| unusual("a token or an id twice, or an id without a token"))?;
        let merges = merges.ok_or_else(|| unusual("no merges"))?.resolve(&tokens);
        let merges = merges.ok_or_else(|| unusual("a merge of what are no tokens"))?;
        let find = |token: String| tokens.find(&token).ok_or_else(|| unusual("an unknown unknown token"));
        let unknown = unknown.map(find).transpose()?;
        Ok(Pairs { tokens, merges, unknown, fuse_unknown, byte_fallback, whole_words })
    }
}

/// Tokens with their ids, as a file lists them.
#[derive(Default)]
struct Listed {
    text: String,
    /// Ids, and the ends of their tokens in `text`.
    tokens: Vec<(u32, u32)>,
}

impl Listed {
    /// `None` if ids are not all numbers from 0 on, or two tokens are the same.
    fn tokens(self) -> Option<Tokens> {
        let mut spans = vec![None; self.tokens.len()];
        let mut start = 0;
        for (id, end) in self.tokens {
            let span = spans.get_mut(id as usize)?;
            if span.replace((start, end)).is_some() {
                return None;
            }
            start = end;
        }
        Tokens::new(self.text, spans.into_iter().collect::<Option<_>>()?)
    }
}

impl<'de> Deserialize<'de> for Listed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListedVisitor;
        impl<'de> Visitor<'de> for ListedVisitor {
            type Value = Listed;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("ids of tokens")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Listed, A::Error> {
                let mut all = Listed::default();
                while map.next_key_seed(Text(&mut all.text))?.is_some() {
                    let id = map.next_value()?;
                    all.tokens.push((id, end(&all.text)?));
                }
                Ok(all)
            }
        }
        deserializer.deserialize_map(ListedVisitor)
    }
}

/// Pairs of tokens as a file lists them, and in its order.
#[derive(Default)]
struct Merges {
    text: String,
    /// The ends of both in `text`; the second follows the first, as in the token that they become.
    pairs: Vec<(u32, u32)>,
}

impl Merges {
    /// `None` if one of them, or what they become, is no token.
    fn resolve(&self, tokens: &Tokens) -> Option<hashbrown::HashMap<(u32, u32), (u32, u32)>> {
        let mut merges = hashbrown::HashMap::with_capacity(self.pairs.len());
        let (mut start, mut next) = (0, 0);
        for (&(middle, end), rank) in self.pairs.iter().zip(0..) {
            let text = |from: u32, to: u32| self.text.get(from as usize..to as usize);
            let merged = text(start, end)?;
            // Most often tokens are numbered in the order in which merges make them.
            let id = if tokens.get(next) == Some(merged) { next } else { tokens.find(merged)? };
            next = id + 1;
            // The library keeps the last of two that are the same.
            merges.insert((tokens.find(text(start, middle)?)?, tokens.find(text(middle, end)?)?), (rank, id));
            start = end;
        }
        Some(merges)
    }

    fn push<E: Error>(&mut self, middle: u32) -> Result<(), E> {
        self.pairs.push((middle, end(&self.text)?));
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Merges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MergesVisitor;
        impl<'de> Visitor<'de> for MergesVisitor {
            type Value = Merges;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("pairs of tokens")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Merges, A::Error> {
                let mut all = Merges::default();
                while list.next_element_seed(Pair(&mut all))?.is_some() {}
                Ok(all)
            }
        }
        deserializer.deserialize_seq(MergesVisitor)
    }
}

/// Appends two tokens that become one: a list of them, or both in one text with a space in between.
struct Pair<'a>(&'a mut Merges);

impl<'de> DeserializeSeed<'de> for Pair<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Pair<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("two tokens")
    }

    fn visit_str<E: Error>(self, both: &str) -> Result<(), E> {
        match both.split_once(' ') {
            // Older files may begin with a line that names their version.
            Some((first, second)) if !second.contains(' ') && !both.starts_with("#version") => {
                self.0.text.push_str(first);
                let middle = end(&self.0.text)?;
                self.0.text.push_str(second);
                self.0.push(middle)
            }
            _ => Err(E::custom("no two tokens")),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut pair: A) -> Result<(), A::Error> {
        let first = pair.next_element_seed(Text(&mut self.0.text))?;
        let middle = end(&self.0.text)?;
        let second = pair.next_element_seed(Text(&mut self.0.text))?;
        match (first, second, pair.next_element::<IgnoredAny>()?) {
            (Some(()), Some(()), None) => self.0.push(middle),
            _ => Err(A::Error::custom("no two tokens")),
        }
    }
}

/// Appends a text.
struct Text<'a>(&'a mut String);

impl<'de> DeserializeSeed<'de> for Text<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Text<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        self.0.push_str(text);
        Ok(())
    }
}

/// Bytes of a text.
fn end<E: Error>(text: &str) -> Result<u32, E> {
    u32::try_from(text.len()).map_err(|_| E::custom("more than 4 GB of tokens"))
}
