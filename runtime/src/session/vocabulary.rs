//! The bytes that every token stands for, so that text can be streamed without asking the tokenizer, and masks be made
//! over tokens.

use std::borrow::Cow;

use tokenizers::pre_tokenizers::metaspace::PrependScheme;
use tokenizers::{AddedVocabulary, DecoderWrapper};

/// Bytes of all tokens of a vocabulary whose decoder works token by token.
#[derive(Debug)]
pub struct Vocabulary {
    /// Of all tokens, one behind the other.
    bytes: Vec<u8>,
    /// End of each token in `bytes`; ids without a token are empty.
    ends: Vec<u32>,
    /// Bit `id % 64` of word `id / 64`: the token only steers and is not part of a text.
    special: Vec<u64>,
    /// Spaces taken away at the start of a text.
    strip: usize,
    /// Ids that have a token.
    known: usize,
}

/// What a decoder does to a token, in order.
enum Stage {
    /// Characters stand for bytes as in GPT-2.
    ByteLevel,
    /// A text is replaced by another one.
    Replace(String, String),
    /// `<0x41>` stands for a byte.
    ByteFallback,
}

impl Vocabulary {
    /// Of the ids below `size`, whose tokens `token` tells, added ones included. `None` if the decoder does something that
    /// depends on the tokens around.
    pub(super) fn of<'a>(
        decoder: &DecoderWrapper,
        added: &AddedVocabulary,
        size: usize,
        token: impl Fn(u32) -> Option<Cow<'a, str>>,
    ) -> Option<Self> {
        let (stages, strip) = stages(decoder)?;
        let byte_of = byte_level();
        let mut vocabulary = Self {
            bytes: Vec::new(),
            ends: Vec::with_capacity(size),
            special: vec![0; size.div_ceil(64)],
            strip,
            known: 0,
        };
        for id in 0..size as u32 {
            if let Some(token) = token(id) {
                vocabulary.known += 1;
                decode(token, &stages, &byte_of, &mut vocabulary.bytes);
            }
            vocabulary.ends.push(u32::try_from(vocabulary.bytes.len()).ok()?);
        }
        for (&id, token) in added.get_added_tokens_decoder() {
            if let Some(word) = vocabulary.special.get_mut(id as usize / 64)
                && added.is_special_token(&token.content)
            {
                *word |= 1 << (id % 64);
            }
        }
        Some(vocabulary)
    }

    /// Tokens, ids without one included.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Ids that have a token.
    pub(super) fn known(&self) -> usize {
        self.known
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Bytes that token `id` stands for inside a text; none for unknown ids.
    pub fn bytes(&self, id: u32) -> &[u8] {
        let at = id as usize;
        let end = self.ends.get(at).copied().unwrap_or(0) as usize;
        let start = at.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or(0) as usize;
        self.bytes.get(start..end).unwrap_or_default()
    }

    /// Whether token `id` only steers and is not part of a text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize / 64).is_some_and(|word| word >> (id % 64) & 1 == 1)
    }

    /// Spaces that are taken away at the start of a text.
    pub(super) fn strip(&self) -> usize {
        self.strip
    }
}

fn decode(mut token: Cow<'_, str>, stages: &[Stage], byte_of: &[Option<u8>], out: &mut Vec<u8>) {
    for stage in stages {
        match stage {
            Stage::Replace(from, to) if token.contains(from.as_str()) => {
                token = token.replace(from.as_str(), to).into()
            }
            Stage::Replace(..) => {}
            Stage::ByteFallback => {
                let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                if let Some(byte) = digits.filter(|d| d.len() == 2).and_then(|d| u8::from_str_radix(d, 16).ok()) {
                    return out.push(byte);
                }
            }
            Stage::ByteLevel => {
                let start = out.len();
                for c in token.chars() {
                    match byte_of.get(c as usize).copied().flatten() {
                        Some(byte) => out.push(byte),
                        None => {
                            out.truncate(start);
                            return out.extend_from_slice(token.as_bytes());
                        }
                    }
                }
                return;
            }
        }
    }
    out.extend_from_slice(token.as_bytes());
}

/// What the decoder does token by token, and the spaces it takes away at the start of the text.
fn stages(decoder: &DecoderWrapper) -> Option<(Vec<Stage>, usize)> {
    // Patterns and lengths are private, but written when a decoder is serialized.
    match decoder {
        DecoderWrapper::ByteLevel(_) => Some((vec![Stage::ByteLevel], 0)),
        DecoderWrapper::Metaspace(metaspace) => {
            let strip = usize::from(metaspace.prepend_scheme != PrependScheme::Never);
            Some((vec![Stage::Replace(metaspace.get_replacement().to_string(), " ".into())], strip))
        }
        DecoderWrapper::Sequence(sequence) => {
            let (mut stages_of_all, mut strip) = (Vec::new(), 0);
            for decoder in sequence.get_decoders() {
                match decoder {
                    DecoderWrapper::Fuse(_) => {}
                    DecoderWrapper::Strip(s) if s.content == ' ' && s.stop == 0 => strip += s.start,
                    DecoderWrapper::ByteFallback(_) => stages_of_all.push(Stage::ByteFallback),
                    DecoderWrapper::Replace(replace) => {
                        let written = serde_json::to_value(replace).ok()?;
                        let from = written.get("pattern")?.get("String")?.as_str()?.to_owned();
                        stages_of_all.push(Stage::Replace(from, replace.content.clone()));
                    }
                    DecoderWrapper::ByteLevel(_) => stages_of_all.push(Stage::ByteLevel),
                    _ => return None,
                }
            }
            // What comes behind the bytes of a token would see them joined.
            let last = stages_of_all.iter().position(|stage| matches!(stage, Stage::ByteLevel));
            last.is_none_or(|at| at + 1 == stages_of_all.len()).then_some((stages_of_all, strip))
        }
        _ => None,
    }
}

/// Byte of each character that stands for one in GPT-2's byte-level alphabet: printable Latin-1 for themselves, the
/// others from 256 on in order.
fn byte_level() -> Vec<Option<u8>> {
    let mut byte_of = vec![None; 512];
    let mut next = 256;
    for byte in 0..=255u8 {
        let at = match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => byte as usize,
            _ => {
                next += 1;
                next - 1
            }
        };
        byte_of[at] = Some(byte);
    }
    byte_of
}

/// Turns ids into text piece by piece without ever splitting a character, and without allocating once its buffers have
/// grown.
#[derive(Debug, Default)]
pub struct TextStream {
    /// Bytes of a character that is not complete, at most three.
    held: [u8; 4],
    n_held: usize,
    /// Whether anything was pushed.
    started: bool,
    /// For decoders that need the tokens around: ids from the last clean cut on, and how many are in the text.
    ids: Vec<u32>,
    emitted: usize,
}

impl TextStream {
    /// Makes it as new, keeping its memory.
    pub fn restart(&mut self) {
        (self.n_held, self.started, self.emitted) = (0, false, 0);
        self.ids.clear();
    }

    /// Takes the next id and appends the text that is certain now to `out`.
    ///
    /// # Errors
    /// As [`super::tokenizer::Tokenizer::decode`].
    pub fn push(&mut self, tokenizer: &super::tokenizer::Tokenizer, id: u32, out: &mut String) -> crate::Result<()> {
        let Some(vocabulary) = tokenizer.vocabulary() else { return self.push_any(tokenizer, id, out) };
        if vocabulary.is_special(id) {
            return Ok(());
        }
        let mut bytes = vocabulary.bytes(id);
        if !std::mem::replace(&mut self.started, true) {
            for _ in 0..vocabulary.strip() {
                bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            }
        }
        // Byte by byte only while a character is incomplete.
        while self.n_held > 0 {
            let Some((&byte, rest)) = bytes.split_first() else { return Ok(()) };
            self.held[self.n_held] = byte;
            match std::str::from_utf8(&self.held[..=self.n_held]) {
                Ok(character) => {
                    out.push_str(character);
                    self.n_held = 0;
                    bytes = rest;
                }
                Err(error) if error.error_len().is_none() => {
                    self.n_held += 1;
                    bytes = rest;
                }
                // The byte does not belong to the character, which stays broken.
                Err(_) => {
                    out.push(char::REPLACEMENT_CHARACTER);
                    self.n_held = 0;
                }
            }
        }
        while !bytes.is_empty() {
            match std::str::from_utf8(bytes) {
                Ok(text) => {
                    out.push_str(text);
                    return Ok(());
                }
                Err(error) => {
                    let (good, rest) = bytes.split_at(error.valid_up_to());
                    out.push_str(std::str::from_utf8(good).unwrap_or_default());
                    match error.error_len() {
                        Some(bad) => {
                            out.push(char::REPLACEMENT_CHARACTER);
                            bytes = &rest[bad..];
                        }
                        None => {
                            self.held[..rest.len()].copy_from_slice(rest);
                            self.n_held = rest.len();
                            return Ok(());
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Appends the rest, with a replacement character for what never became complete.
    ///
    /// # Errors
    /// As [`super::tokenizer::Tokenizer::decode`].
    pub fn finish(&mut self, tokenizer: &super::tokenizer::Tokenizer, out: &mut String) -> crate::Result<()> {
        if tokenizer.vocabulary().is_none() {
            out.push_str(&self.unseen(tokenizer)?);
        } else if self.n_held > 0 {
            out.push(char::REPLACEMENT_CHARACTER);
        }
        self.restart();
        Ok(())
    }

    fn push_any(&mut self, tokenizer: &super::tokenizer::Tokenizer, id: u32, out: &mut String) -> crate::Result<()> {
        self.ids.push(id);
        let text = self.unseen(tokenizer)?;
        // A replacement character at the end is, or may be, the first bytes of a character still to come.
        if !text.is_empty() && !text.ends_with(char::REPLACEMENT_CHARACTER) {
            self.ids.drain(..self.emitted);
            self.emitted = self.ids.len();
            out.push_str(&text);
        }
        Ok(())
    }

    /// Text of the ids behind the emitted ones. The emitted ones are decoded along because decoders treat the first
    /// token of a text differently (a leading space, for one).
    fn unseen(&self, tokenizer: &super::tokenizer::Tokenizer) -> crate::Result<String> {
        let before = tokenizer.decode(&self.ids[..self.emitted], true)?;
        let mut all = tokenizer.decode(&self.ids, true)?;
        if !all.is_char_boundary(before.len()) || before.len() > all.len() {
            return Ok(String::new());
        }
        Ok(all.split_off(before.len()))
    }
}
