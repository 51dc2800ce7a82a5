//! Byte-pair models, read at once from the text of a `tokenizer.json` and kept compactly.
//!
//! The tokenizer library's own model of this kind holds three copies of the vocabulary and looks tokens up half a million
//! times while it is built: for the hundred thousand tokens and merges of a language model that takes longer than all the
//! rest of opening it. This one takes its place inside the library, which does everything else: normalizers,
//! pre-tokenizers, added tokens, post-processors and decoders. What it makes of a word is what the library's makes of it,
//! ties and fallbacks included; the tests compare both.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::hash::BuildHasher;
use std::path::{Path, PathBuf};

use hashbrown::{DefaultHashBuilder, HashTable};
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::{
    DecoderWrapper, Model, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Result, Token, TokenizerImpl,
};

mod read;

/// A tokenizer over [`Pairs`].
pub(super) type OfPairs =
    TokenizerImpl<Pairs, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// Reads a definition whose model is of byte pairs; an error for any other, or if anything is unusual.
pub(super) fn parse(json: &[u8]) -> std::result::Result<OfPairs, serde_json::Error> {
    serde_json::from_slice(json)
}

/// A byte-pair model: words are split into characters, and neighbours merged in the order of the merges.
pub(super) struct Pairs {
    tokens: Tokens,
    /// Two neighbours, and what becomes of them: the merge's rank, lower ones first, and the token they become.
    merges: hashbrown::HashMap<(u32, u32), (u32, u32)>,
    /// Token of a character that has none.
    unknown: Option<u32>,
    /// Characters without a token that follow each other become one [`Self::unknown`].
    fuse_unknown: bool,
    /// A character without a token becomes those of its bytes, `<0x41>`, if all have one.
    byte_fallback: bool,
    /// A word that is a token stays whole, whatever the merges make of it.
    whole_words: bool,
}

/// Tokens by id, which are all numbers from 0 on, and back.
struct Tokens {
    /// Of all tokens, in any order.
    text: String,
    /// Start and end of each token in `text`, by id.
    spans: Vec<(u32, u32)>,
    /// Ids by text.
    ids: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

impl Tokens {
    /// `None` if a token is there twice.
    fn new(text: String, spans: Vec<(u32, u32)>) -> Option<Self> {
        let ids = HashTable::with_capacity(spans.len());
        let mut tokens = Self { text, spans, ids, hasher: DefaultHashBuilder::default() };
        for id in 0..u32::try_from(tokens.spans.len()).ok()? {
            let Self { text, spans, ids, hasher } = &mut tokens;
            let of = |id: u32| {
                let (start, end) = spans[id as usize];
                &text.as_bytes()[start as usize..end as usize]
            };
            let hash = hasher.hash_one(of(id));
            if ids.find(hash, |&other| of(other) == of(id)).is_some() {
                return None;
            }
            ids.insert_unique(hash, id, |&other| hasher.hash_one(of(other)));
        }
        Some(tokens)
    }

    fn get(&self, id: u32) -> Option<&str> {
        let &(start, end) = self.spans.get(id as usize)?;
        self.text.get(start as usize..end as usize)
    }

    fn find(&self, text: &str) -> Option<u32> {
        self.ids.find(self.hasher.hash_one(text.as_bytes()), |&id| self.get(id) == Some(text)).copied()
    }
}

/// A part of a word while it is merged.
#[derive(Clone, Copy)]
struct Part {
    id: u32,
    /// In bytes; 0 once it is part of the one before.
    len: u32,
    /// Neighbours, [`NONE`] without one.
    before: u32,
    after: u32,
}

const NONE: u32 = u32::MAX;

impl Pairs {
    /// Text of a token.
    pub(super) fn token(&self, id: u32) -> Option<&str> {
        self.tokens.get(id)
    }

    /// The tokens of a word and their lengths in bytes, before any merge.
    fn split(&self, word: &str) -> Vec<Part> {
        let mut parts = Vec::<Part>::with_capacity(word.len());
        let mut push = |id, len| {
            let at = parts.len() as u32;
            if let Some(last) = parts.last_mut() {
                last.after = at;
            }
            parts.push(Part { id, len, before: at.checked_sub(1).unwrap_or(NONE), after: NONE });
        };
        // Length of characters without a token that wait for more of them. As in the library they stay behind what a
        // fallback to bytes makes of a later character.
        let mut unknown = None;
        for (at, c) in word.char_indices() {
            let len = c.len_utf8() as u32;
            let c = &word[at..at + c.len_utf8()];
            if let Some(id) = self.tokens.find(c) {
                if let Some((id, len)) = unknown.take() {
                    push(id, len);
                }
                push(id, len);
            } else if let Some(bytes) = self.bytes(c) {
                bytes.into_iter().for_each(|id| push(id, 1));
            } else if let Some(id) = self.unknown {
                unknown = match unknown {
                    Some((id, before)) if self.fuse_unknown => Some((id, before + len)),
                    Some((id, before)) => {
                        push(id, before);
                        Some((id, len))
                    }
                    None => Some((id, len)),
                };
            }
        }
        if let Some((id, len)) = unknown {
            push(id, len);
        }
        parts
    }

    /// Tokens of the bytes of a character.
    fn bytes(&self, c: &str) -> Option<Vec<u32>> {
        if !self.byte_fallback {
            return None;
        }
        c.bytes().map(|byte| self.tokens.find(&format!("<0x{byte:02X}>"))).collect()
    }

    /// Merges neighbours, those of the lowest rank first and of several such the leftmost.
    fn merge(&self, parts: &mut Vec<Part>) {
        let merge = |first: Part, second: Part| self.merges.get(&(first.id, second.id)).copied();
        let found = |(at, (rank, id)): (u32, (u32, u32))| Reverse((rank, at, id));
        let pairs = parts.windows(2).zip(0..);
        let mut queue: BinaryHeap<_> =
            pairs.filter_map(|(pair, at)| Some(found((at, merge(pair[0], pair[1])?)))).collect();
        while let Some(Reverse((_, at, id))) = queue.pop() {
            let first = parts[at as usize];
            if first.len == 0 || first.after == NONE {
                continue;
            }
            // Either may have changed since.
            let second = parts[first.after as usize];
            if merge(first, second).is_none_or(|(_, now)| now != id) {
                continue;
            }
            let merged = Part { id, len: first.len + second.len, after: second.after, ..first };
            parts[at as usize] = merged;
            parts[first.after as usize].len = 0;
            if let Some(after) = parts.get_mut(merged.after as usize) {
                after.before = at;
                queue.extend(merge(merged, *after).map(|of| found((at, of))));
            }
            if let Some(&before) = parts.get(merged.before as usize) {
                queue.extend(merge(before, merged).map(|of| found((merged.before, of))));
            }
        }
        parts.retain(|part| part.len != 0);
    }
}

impl Model for Pairs {
    type Trainer = BpeTrainer;

    fn tokenize(&self, word: &str) -> Result<Vec<Token>> {
        if word.is_empty() {
            return Ok(Vec::new());
        }
        if self.whole_words
            && let Some(id) = self.tokens.find(word)
        {
            return Ok(vec![Token::new(id, word.to_owned(), (0, word.len()))]);
        }
        // Lengths and places are kept in 32 bits.
        if u32::try_from(word.len()).is_err() {
            return Err("a word of more than 4 GB".into());
        }
        let mut parts = self.split(word);
        self.merge(&mut parts);
        let mut at = 0;
        let token = |part: Part| {
            let start = at;
            at += part.len as usize;
            Token::new(part.id, self.token(part.id).unwrap_or_default().to_owned(), (start, at))
        };
        Ok(parts.into_iter().map(token).collect())
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.tokens.find(token)
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.token(id).map(str::to_owned)
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        (0..).map_while(|id| Some((self.id_to_token(id)?, id))).collect()
    }

    fn get_vocab_size(&self) -> usize {
        self.tokens.spans.len()
    }

    fn save(&self, _: &Path, _: Option<&str>) -> Result<Vec<PathBuf>> {
        Err("this model is not written".into())
    }

    fn get_trainer(&self) -> BpeTrainer {
        BpeTrainer::default()
    }
}

#[cfg(test)]
mod tests;
