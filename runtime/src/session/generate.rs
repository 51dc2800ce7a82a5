//! What is asked for and what comes of it; and the call that waits for it.

use std::ops::ControlFlow;

use super::answer::Answer;
use super::sampler::Sampling;
use super::tick::{Phase, TickBudget};
use super::{CancelToken, Session};
use crate::error::{Error, ErrorKind, Result};

/// How to continue a prompt.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Most new tokens.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Seed of PCG-32 (XSH RR 64/32, stream 0), from which one number is drawn a token.
    pub seed: u64,
    /// Added to the logits of these ids before anything else, several of one id together; negative infinity bans one.
    pub bias: Vec<(u32, f32)>,
    /// Ids that are never chosen.
    pub banned: Vec<u32>,
    /// Go on after the model's end-of-turn ids.
    pub ignore_eos: bool,
    /// Texts that end the answer; neither they nor anything behind them is returned.
    pub stop: Vec<String>,
    /// Further ids that end the answer.
    pub stop_ids: Vec<u32>,
    /// What the answer has to look like; feature `grammar`. The end-of-turn ids count then, even with `ignore_eos`.
    pub grammar: Option<Grammar>,
    /// When the context is full, forget the older half of what follows the first `keep` tokens, compute the rest
    /// again at its new positions and go on, instead of stopping.
    pub shift: Option<ContextShift>,
    /// Stops it from outside.
    pub cancel: CancelToken,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_tokens: 512,
            sampling: Sampling::default(),
            seed: 0,
            bias: Vec::new(),
            banned: Vec::new(),
            ignore_eos: false,
            stop: Vec::new(),
            stop_ids: Vec::new(),
            grammar: None,
            shift: None,
            cancel: CancelToken::default(),
        }
    }
}

/// What an answer has to look like. Only tokens that can still lead there are chosen, so an answer that comes to its end
/// has this form, and one that is cut off (by [`GenerateOptions::max_tokens`], for one) is the start of such an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Grammar {
    /// A JSON value that fits this JSON schema. What of JSON Schema is not enforced is refused.
    JsonSchema(String),
    /// A text that this regular expression matches as a whole.
    Regex(String),
    /// A text of this grammar in the Lark format of [llguidance](https://github.com/guidance-ai/llguidance).
    Lark(String),
}

/// What a context shift never forgets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContextShift {
    /// Leading tokens that stay, e.g. the system prompt.
    pub keep: usize,
}

/// Why generation ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// The model ended its turn with this id.
    Eos(u32),
    /// This stop text appeared.
    StopString(String),
    /// [`GenerateOptions::max_tokens`] were made.
    MaxTokens,
    /// The context is full and no shift was asked for.
    ContextFull,
    /// The callback or the token asked to stop.
    Cancelled,
    /// The grammar allows nothing more, or an embedding is complete.
    Complete,
}

impl StopReason {
    /// Stable name for machine-readable output.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Eos(_) => "eos",
            Self::StopString(_) => "stop_string",
            Self::MaxTokens => "max_tokens",
            Self::ContextFull => "context_full",
            Self::Cancelled => "cancelled",
            Self::Complete => "complete",
        }
    }
}

/// What was generated, and how long it took.
#[derive(Debug, Clone)]
pub struct Generation {
    /// New tokens, without the id that ended the turn.
    pub ids: Vec<u32>,
    /// Their text, up to a stop text; empty if the model has no tokenizer.
    pub text: String,
    /// Why it ended.
    pub stop: StopReason,
    /// Prompt tokens that were already in the cache.
    pub reused: usize,
    /// Prompt tokens computed.
    pub prefill_tokens: usize,
    /// Seconds until the prompt was computed.
    pub prefill_seconds: f64,
    /// Seconds from the first new token to the last.
    pub decode_seconds: f64,
    /// Seconds from the call to the first new token.
    pub time_to_first_token: f64,
}

impl Generation {
    /// New tokens a second after the first one, if there was a second one.
    pub fn decode_tokens_per_second(&self) -> Option<f64> {
        (self.ids.len() > 1 && self.decode_seconds > 0.0).then(|| (self.ids.len() - 1) as f64 / self.decode_seconds)
    }

    fn new(answer: Answer, text: String, stop: StopReason) -> Self {
        let since = |from: std::time::Instant, to: std::time::Instant| to.duration_since(from).as_secs_f64();
        let now = std::time::Instant::now();
        let prefilled = answer.prefilled.unwrap_or(now);
        Self {
            text,
            stop,
            reused: answer.reused,
            prefill_tokens: answer.prompt - answer.reused,
            prefill_seconds: since(answer.started, prefilled),
            decode_seconds: answer.first_token.map_or(0.0, |first| since(first, now)),
            time_to_first_token: since(answer.started, answer.first_token.unwrap_or(prefilled)),
            ids: answer.ids,
        }
    }
}

impl Session {
    /// Continues `prompt`, reusing what the cache already holds of it, and waits for the end: [`Session::begin`], and
    /// [`Session::tick`] without a budget. `on_text` gets the text as it becomes certain, always whole characters;
    /// `Break` ends the call.
    ///
    /// # Errors
    /// As [`Session::begin`] and [`Session::tick`]; [`ErrorKind::Cancelled`] if that happened before the prompt was
    /// computed, later it is a [`StopReason`]. [`ErrorKind::DeviceLost`] drops the answer.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generation> {
        self.drop_answer();
        self.begin(prompt, options.clone())?;
        let mut all = String::new();
        loop {
            let tick = match self.tick_once(&TickBudget::UNLIMITED) {
                Ok(tick) => tick,
                Err(error) => {
                    self.drop_answer();
                    return Err(error);
                }
            };
            if tick.phase == Phase::Lost {
                self.drop_answer();
                return Err(Error::new(ErrorKind::DeviceLost, "the device was lost"));
            }
            let text = self.events.take_text();
            all.push_str(text);
            // An answer that is complete has nothing left to stop.
            if !text.is_empty() && on_text(text).is_break() && tick.phase != Phase::Idle {
                self.finish(StopReason::Cancelled)?;
                let rest = self.events.take_text();
                all.push_str(rest);
                if !rest.is_empty() {
                    let _ = on_text(rest);
                }
            }
            if self.answer.is_none() {
                break;
            }
            if tick.is_waiting {
                self.wait()?;
            }
        }
        let ended = self.events.take_end().transpose()?;
        let (Some(answer), Some(stop)) = (self.finished.take(), ended) else {
            return Err(Error::new(ErrorKind::InvalidInput, "the answer was taken away"));
        };
        if stop == StopReason::Cancelled && answer.prefilled.is_none() {
            return Err(Error::new(ErrorKind::Cancelled, "cancelled by the caller"));
        }
        Ok(Generation::new(answer, all, stop))
    }
}
