//! Calibration tokens: where they come from, and which they were.

use awqua::session::tokenizer::Tokenizer;
use awqua::{Error, ErrorKind, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

pub mod check;
mod file;
mod standard;

pub use file::read_texts;
pub use standard::{DOMAINS, Domain};

/// Fewest tokens of a sequence that is cut from a text.
pub const MIN_TOKENS: usize = 32;

/// Sequences of tokens that a model is calibrated with.
#[derive(Debug, Clone, Default)]
pub struct Calibration {
    /// What it is called in reports.
    pub name: String,
    /// Token ids, one list a sequence.
    pub sequences: Vec<Vec<u32>>,
}

impl Calibration {
    /// None, for methods that look at weights only.
    pub fn none() -> Self {
        Self::default()
    }

    /// These sequences.
    pub fn of_ids(name: &str, sequences: Vec<Vec<u32>>) -> Self {
        Self { name: name.to_owned(), sequences }
    }

    /// The set that comes with the quantizer, or only the named ones of its [`DOMAINS`].
    ///
    /// # Errors
    /// As [`Self::of_texts`]; [`ErrorKind::InvalidInput`] for a domain that there is none of.
    pub fn standard(tokenizer: &Tokenizer, domains: &[String], count: usize, length: usize) -> Result<Self> {
        let chosen: Vec<&Domain> = match domains.is_empty() {
            true => DOMAINS.iter().collect(),
            false => domains.iter().map(|name| Domain::named(name)).collect::<Result<_>>()?,
        };
        let texts: Vec<String> = chosen.iter().map(|domain| domain.text.to_owned()).collect();
        let name = if domains.is_empty() { "standard".to_owned() } else { domains.join(",") };
        Self::of_texts(&name, &texts, tokenizer, count, length)
    }

    /// Cuts texts into sequences of `length` tokens and takes at most `count` of them, spread evenly over all texts. The
    /// end of a text becomes a shorter sequence unless next to nothing is left.
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`], or [`ErrorKind::InvalidInput`] if no text has as many as [`MIN_TOKENS`] tokens.
    pub fn of_texts(name: &str, texts: &[String], tokenizer: &Tokenizer, count: usize, length: usize) -> Result<Self> {
        let mut sequences: Vec<Vec<u32>> = Vec::new();
        for text in texts {
            let ids = tokenizer.encode(text, false)?;
            let whole = ids.chunks(length.max(MIN_TOKENS)).filter(|ids| ids.len() >= MIN_TOKENS);
            sequences.extend(whole.map(<[u32]>::to_vec));
        }
        if sequences.is_empty() {
            let message =
                format!("`{name}` has less than {MIN_TOKENS} tokens in every text: nothing to calibrate with");
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let total = sequences.len();
        let taken = count.clamp(1, total);
        let sequences = (0..taken).map(|i| std::mem::take(&mut sequences[i * total / taken])).collect();
        Ok(Self { name: name.to_owned(), sequences })
    }

    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(Vec::len).sum()
    }

    /// SHA-256 of the ids as little-endian u32, each sequence behind its length.
    pub fn sha256(&self) -> String {
        let mut digest = Sha256::new();
        for sequence in &self.sequences {
            digest.update((sequence.len() as u32).to_le_bytes());
            sequence.iter().for_each(|id| digest.update(id.to_le_bytes()));
        }
        digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Checks that there are tokens and that a vocabulary of `vocab_size` has them.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`].
    pub fn check(&self, vocab_size: usize) -> Result<()> {
        let refuse = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
        if self.sequences.is_empty() || self.sequences.iter().any(Vec::is_empty) {
            return refuse("no calibration tokens, or an empty sequence of them".into());
        }
        match self.sequences.iter().flatten().find(|&&id| id as usize >= vocab_size) {
            Some(id) => refuse(format!("calibration token {id} is not below the vocabulary size {vocab_size}")),
            None => Ok(()),
        }
    }

    /// What a checkpoint records of it.
    pub(crate) fn record(&self) -> Value {
        match self.sequences.is_empty() {
            true => Value::Null,
            false => json!({
                "name": self.name,
                "sequences": self.sequences.len(),
                "tokens": self.tokens(),
                "ids_sha256": self.sha256(),
            }),
        }
    }
}
