//! Text to token ids and back, through the checkpoint's own `tokenizer.json`.

use std::borrow::Cow;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tokenizers::{AddedVocabulary, DecoderWrapper, Model};

use super::grammar::Grammars;
use super::pairs::{self, OfPairs};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};

pub use super::vocabulary::{TextStream, Vocabulary};

/// Largest `tokenizer.json` read; the largest known one is 33 MB.
const MAX_BYTES: u64 = 128 << 20;

/// Tokenizer of a model.
pub struct Tokenizer {
    inner: Inner,
    vocab_size: usize,
    /// Largest id, 0 without any.
    largest: u32,
    vocabulary: Option<Vocabulary>,
    grammars: Grammars,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size).finish_non_exhaustive()
    }
}

fn error(message: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Tokenizer, message.to_string())
}

/// Calls into the tokenizer library, which can panic on definitions that contradict themselves.
fn guarded<T>(what: &str, f: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(result) => result.map_err(error),
        Err(_) => Err(error(format!("the tokenizer definition is inconsistent: {what} failed"))),
    }
}

/// A tokenizer of the library, over its own model or over ours.
enum Inner {
    Pairs(Box<OfPairs>),
    Any(Box<tokenizers::Tokenizer>),
}

/// Does the same with either.
macro_rules! with {
    ($inner:expr, $tokenizer:ident => $do:expr) => {
        match $inner {
            Inner::Pairs($tokenizer) => $do,
            Inner::Any($tokenizer) => $do,
        }
    };
}

impl Inner {
    fn read(json: &[u8]) -> tokenizers::Result<Self> {
        match pairs::parse(json) {
            Ok(tokenizer) => Ok(Self::Pairs(Box::new(tokenizer))),
            Err(_) => Ok(Self::Any(Box::new(tokenizers::Tokenizer::from_bytes(json)?))),
        }
    }

    fn added(&self) -> &AddedVocabulary {
        with!(self, tokenizer => tokenizer.get_added_vocabulary())
    }

    fn decoder(&self) -> Option<&DecoderWrapper> {
        with!(self, tokenizer => tokenizer.get_decoder())
    }

    /// The number of tokens, added ones included, without the copies that the library makes to count them.
    fn count(&self) -> usize {
        let added = self.added().get_vocab().keys();
        with!(self, tokenizer => {
            let model = tokenizer.get_model();
            model.get_vocab_size() + added.filter(|token| model.token_to_id(token).is_none()).count()
        })
    }

    /// Largest id, 0 without any.
    fn largest(&self) -> u32 {
        with!(self, tokenizer => tokenizer.get_vocab(true)).into_values().max().unwrap_or(0)
    }

    /// The bytes of the tokens below `size`.
    fn vocabulary(&self, size: usize) -> Option<Vocabulary> {
        let (decoder, added) = (self.decoder()?, self.added());
        let added_token = |id| Some(Cow::Borrowed(&*added.get_added_tokens_decoder().get(&id)?.content));
        match self {
            Self::Pairs(tokenizer) => {
                let pairs = tokenizer.get_model();
                Vocabulary::of(decoder, added, size, |id| {
                    added_token(id).or_else(|| pairs.token(id).map(Cow::Borrowed))
                })
            }
            Self::Any(tokenizer) => {
                let model = tokenizer.get_model();
                let token = |id| added_token(id).or_else(|| model.id_to_token(id).map(Cow::Owned));
                Vocabulary::of(decoder, added, size, token)
            }
        }
    }
}

impl Tokenizer {
    /// Parses the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`] if it is malformed.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let inner = guarded("reading it", || Inner::read(json))?;
        let vocab_size = inner.count();
        let read = |ids| guarded("reading its vocabulary", || Ok(inner.vocabulary(ids)));
        let vocabulary = read(vocab_size)?.filter(|vocabulary| vocabulary.known() == vocab_size);
        let (largest, vocabulary) = match vocabulary {
            // As many ids have a token as there are tokens, so no later one has.
            Some(all) => (u32::try_from(vocab_size).unwrap_or(u32::MAX).saturating_sub(1), Some(all)),
            None => {
                let largest = inner.largest();
                let ids = usize::try_from(largest).unwrap_or(usize::MAX);
                // A definition may name one token with an absurd id.
                (largest, if ids < 64 * (vocab_size + 1024) { read(ids + 1)? } else { None })
            }
        };
        Ok(Self { inner, vocab_size, largest, vocabulary, grammars: Grammars::default() })
    }

    /// Tokenizer of a folder, or `None` if it has no `tokenizer.json`.
    pub fn from_checkpoint(checkpoint: &Checkpoint, vocab_size: usize) -> Result<Option<Self>> {
        Self::reader(checkpoint, vocab_size)?.map(|read| read()).transpose()
    }

    /// As [`Self::from_checkpoint`], with everything but the reading of the file left to a call, on any thread.
    #[allow(clippy::type_complexity, reason = "a closure is all there is to it")]
    pub(crate) fn reader(
        checkpoint: &Checkpoint,
        vocab_size: usize,
    ) -> Result<Option<impl FnOnce() -> Result<Self> + Send + use<>>> {
        let Some(json) = checkpoint.read("tokenizer.json", MAX_BYTES)? else { return Ok(None) };
        let file = checkpoint.dir().join("tokenizer.json");
        Ok(Some(move || {
            let in_file = |e: Error| e.in_file(&file);
            let tokenizer = Self::from_json(&json).map_err(in_file)?;
            if tokenizer.largest as usize >= vocab_size {
                return Err(in_file(error(format!(
                    "the largest token id is {}, but `vocab_size` of the model is {vocab_size}",
                    tokenizer.largest
                ))));
            }
            Ok(tokenizer)
        }))
    }

    /// Token ids of `text`. `add_special_tokens` adds what the tokenizer puts around a text (usually a BOS id): true
    /// for plain text, false for a rendered chat template, which already contains it.
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`] if the text can't be encoded.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encode = || with!(&self.inner, tokenizer => tokenizer.encode_fast(text, add_special_tokens));
        guarded("encoding", encode).map(|e| e.get_ids().to_vec())
    }

    /// Text of `ids`; unknown ids are left out. `skip_special` leaves out special tokens.
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`] if the decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        guarded("decoding", || with!(&self.inner, tokenizer => tokenizer.decode(ids, skip_special)))
    }

    /// Id of a token written exactly as in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        with!(&self.inner, tokenizer => tokenizer.token_to_id(token))
    }

    /// The bytes of all tokens, if the decoder works token by token; those of byte-level and sentencepiece models do.
    pub fn vocabulary(&self) -> Option<&Vocabulary> {
        self.vocabulary.as_ref()
    }

    /// What grammars over this vocabulary share.
    pub(super) fn grammars(&self) -> &Grammars {
        &self.grammars
    }

    /// Entries of the vocabulary, added tokens included; a model's own `vocab_size` may be padded above it.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }
}
