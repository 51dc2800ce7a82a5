//! Token choice: one pure definition that the CPU runs and the GPU kernels are checked against.

use crate::error::{Error, ErrorKind, Result};

/// How the next token is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token; otherwise logits are divided by it.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this times the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Positive logits of recent tokens are divided by it, negative ones multiplied; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of every recent token.
    pub presence_penalty: f32,
    /// Subtracted from a recent token's logit once per occurrence.
    pub frequency_penalty: f32,
    /// How many of the last tokens count as recent.
    pub penalty_window: usize,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.7,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            penalty_window: 256,
        }
    }
}

impl Sampling {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, ..Self::default() }
    }

    /// Checks every value.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] naming the first value out of range.
    pub fn validate(&self) -> Result<()> {
        let bad = |name: &str, range: &str, value: f32| {
            Err(Error::new(ErrorKind::InvalidInput, format!("`{name}` must be {range}, got {value}")))
        };
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return bad("temperature", "finite and at least 0", self.temperature);
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return bad("top_p", "above 0 and at most 1", self.top_p);
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return bad("min_p", "from 0 to 1", self.min_p);
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return bad("repetition_penalty", "finite and above 0", self.repetition_penalty);
        }
        if !self.presence_penalty.is_finite() {
            return bad("presence_penalty", "finite", self.presence_penalty);
        }
        if !self.frequency_penalty.is_finite() {
            return bad("frequency_penalty", "finite", self.frequency_penalty);
        }
        Ok(())
    }
}

/// One choice, complete: the settings, the recent tokens and the random number.
#[derive(Debug, Clone, Copy)]
pub struct SampleRequest<'a> {
    /// The settings, already validated.
    pub sampling: &'a Sampling,
    /// Distinct recent tokens with their number of occurrences, ids below the vocabulary size.
    pub recent: &'a [(u32, u32)],
    /// Uniform in [0, 1).
    pub uniform: f32,
}
