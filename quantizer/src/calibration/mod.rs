//! Calibration tokens: where they come from, and which they were.

use awqua::session::tokenizer::Tokenizer;
use awqua::{Error, ErrorKind, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

mod standard;

pub use standard::{DOMAINS, Domain};

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

    /// The set that comes with the quantizer, see [`DOMAINS`].
    ///
    /// # Errors
    /// As [`Self::of_texts`].
    pub fn standard(tokenizer: &Tokenizer, count: usize, length: usize) -> Result<Self> {
        let texts: Vec<String> = DOMAINS.iter().map(|domain| domain.text.to_owned()).collect();
        Self::of_texts("standard", &texts, tokenizer, count, length)
    }

    /// Cuts texts into sequences of `length` tokens and takes `count` of them, spread evenly over all texts.
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`], or [`ErrorKind::InvalidInput`] if there is not a single token.
    pub fn of_texts(name: &str, texts: &[String], tokenizer: &Tokenizer, count: usize, length: usize) -> Result<Self> {
        let mut sequences = Vec::new();
        for text in texts {
            let ids = tokenizer.encode(text, false)?;
            let whole = ids.chunks_exact(length.max(2));
            let rest = whole.remainder();
            sequences.extend(whole.map(<[u32]>::to_vec));
            // What does not fill a sequence still counts where a text is short.
            if rest.len() >= 32 && ids.len() < length {
                sequences.push(rest.to_vec());
            }
        }
        if sequences.is_empty() {
            let message = format!("`{name}` has less than 32 tokens in every text: nothing to calibrate with");
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let total = sequences.len();
        let taken = count.clamp(1, total);
        let sequences = (0..taken).map(|i| sequences[i * total / taken].clone()).collect();
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
