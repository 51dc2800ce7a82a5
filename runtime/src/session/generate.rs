//! The decode loop: choose, stop, stream.

use std::ops::ControlFlow;
use std::time::Instant;

use rand_pcg::Pcg32;
use rand_pcg::rand_core::Rng;

use super::sampler::{SampleRequest, Sampling};
use super::tokenizer::{TextStream, Tokenizer};
use super::{CancelToken, Session};
use crate::backend::MAX_AHEAD;
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
    /// Go on after the model's end-of-turn ids.
    pub ignore_eos: bool,
    /// Texts that end the answer; neither they nor anything behind them is returned.
    pub stop: Vec<String>,
    /// Further ids that end the answer.
    pub stop_ids: Vec<u32>,
    /// When the context is full, forget the older half of what follows the first `keep` tokens, compute the rest
    /// again at its new positions and go on, instead of stopping.
    pub shift: Option<ContextShift>,
    /// Stops the call from outside.
    pub cancel: CancelToken,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_tokens: 512,
            sampling: Sampling::default(),
            seed: 0,
            ignore_eos: false,
            stop: Vec::new(),
            stop_ids: Vec::new(),
            shift: None,
            cancel: CancelToken::default(),
        }
    }
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
}

impl Session {
    /// Continues `prompt`, reusing what the cache already holds of it. `on_text` gets the text as it becomes certain,
    /// always whole characters; `Break` ends the call.
    ///
    /// # Errors
    /// As [`Session::set_prompt`], and [`ErrorKind::InvalidInput`] for a sampling value out of range or stop texts
    /// without a tokenizer. Cancelling during the answer is not an error but a [`StopReason`].
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generation> {
        options.sampling.validate()?;
        let model = std::sync::Arc::clone(&self.model);
        let mut text = match model.tokenizer() {
            Ok(tokenizer) => Some(StopText::new(tokenizer, &options.stop)),
            Err(_) if options.stop.is_empty() => None,
            Err(e) => return Err(Error::new(ErrorKind::InvalidInput, format!("stop texts need a tokenizer: {e}"))),
        };
        let mut random = Pcg32::new(options.seed, 0);
        let start = Instant::now();
        let reused = self.set_prompt(prompt, &options.cancel)?;
        let prefill_seconds = start.elapsed().as_secs_f64();

        let mut ids = Vec::with_capacity(options.max_tokens.min(self.context as usize));
        let mut recent = Recent::new(&options.sampling, prompt);
        let mut first_token = None;
        // Tokens under way, and whether the step of the last one taken turned out not to be wanted.
        let (mut ahead, mut in_vain) = (0, false);
        let stop = loop {
            if ids.len() == options.max_tokens {
                break StopReason::MaxTokens;
            }
            if options.cancel.is_cancelled() {
                break StopReason::Cancelled;
            }
            // Tokens whose choice needs nothing from the host are computed ahead of it, but for the last one, whose
            // step nobody may ask for.
            while ahead < MAX_AHEAD
                && recent.counts().is_empty()
                && recent.window == 0
                && ids.len() + ahead + 1 < options.max_tokens
                && model.config().same_rope_rows(self.rope_length, self.tokens.len() + ahead + 1)
                && self.sample_ahead(&options.sampling, ahead, &mut random)?
            {
                ahead += 1;
            }
            let was_ahead = ahead > 0;
            in_vain = was_ahead;
            let id = if was_ahead {
                ahead -= 1;
                self.runner.take()?
            } else {
                let uniform = uniform(&mut random);
                let request =
                    SampleRequest { recent: recent.counts(), uniform, ..SampleRequest::new(&options.sampling) };
                self.require_logits()?;
                self.runner.sample(&request)?
            };
            first_token.get_or_insert_with(Instant::now);
            if options.stop_ids.contains(&id) || (!options.ignore_eos && model.generation().eos_token_ids.contains(&id))
            {
                break StopReason::Eos(id);
            }
            ids.push(id);
            recent.push(id);
            if let Some(text) = &mut text {
                let (piece, stopped) = text.push(id)?;
                if !piece.is_empty() && on_text(piece).is_break() {
                    break StopReason::Cancelled;
                }
                if let Some(stop) = stopped {
                    break StopReason::StopString(stop);
                }
            }
            if was_ahead {
                // Its step is under way already.
                self.tokens.push(id);
                in_vain = false;
                continue;
            }
            if ids.len() == options.max_tokens {
                break StopReason::MaxTokens;
            }
            if self.tokens.len() == self.context as usize {
                match options.shift {
                    None => break StopReason::ContextFull,
                    Some(shift) => match self.shift(shift.keep, &options.cancel) {
                        Err(e) if e.kind() == ErrorKind::Cancelled => break StopReason::Cancelled,
                        shifted => shifted?,
                    },
                }
            }
            self.append(&[id], &CancelToken::default())?;
        };
        // Steps computed in vain left their logits behind, and keys and values beyond the end of the cache.
        self.has_logits &= ahead == 0 && !in_vain;
        let decode_seconds = first_token.map_or(0.0, |t| t.elapsed().as_secs_f64());
        let text = match text {
            None => String::new(),
            Some(mut text) => {
                let piece = text.finish()?;
                // The answer is complete: a `Break` has nothing left to stop.
                if !piece.is_empty() {
                    let _ = on_text(piece);
                }
                text.into_text()
            }
        };
        Ok(Generation {
            ids,
            text,
            stop,
            reused,
            prefill_tokens: prompt.len() - reused,
            prefill_seconds,
            decode_seconds,
            time_to_first_token: first_token.map_or(prefill_seconds, |t| t.duration_since(start).as_secs_f64()),
        })
    }

    /// Has the token after the `ahead` ones under way chosen and computed without waiting for it; false where that can
    /// not be done.
    fn sample_ahead(&mut self, sampling: &Sampling, ahead: usize, random: &mut Pcg32) -> Result<bool> {
        if !self.has_logits || self.tokens.len() + ahead >= self.context as usize {
            return Ok(false);
        }
        self.write_rope(ahead + 1, self.tokens.len() + ahead + 1)?;
        let position = (self.tokens.len() + ahead) as u32;
        // The number is drawn only if it is used.
        let mut after = random.clone();
        let request = SampleRequest { uniform: uniform(&mut after), ..SampleRequest::new(sampling) };
        let done = self.runner.sample_ahead(&request, position)?;
        if done {
            *random = after;
        }
        Ok(done)
    }

    /// Makes room in a full cache: keeps the first `keep` tokens and the newer half of the others.
    fn shift(&mut self, keep: usize, cancel: &CancelToken) -> Result<()> {
        let keep = keep.min(self.tokens.len());
        let drop = (self.tokens.len() - keep).div_ceil(2);
        if drop == 0 {
            return Err(Error::new(ErrorKind::ContextFull, format!("keeping {keep} tokens leaves no room to shift")));
        }
        // Keys carry the rotation of their position, so the tail is computed again rather than moved.
        let tail = self.tokens[keep + drop..].to_vec();
        self.truncate(keep);
        if tail.is_empty() { Ok(()) } else { self.append(&tail, cancel) }
    }
}

/// The next number in [0, 1), of 24 bits.
fn uniform(random: &mut Pcg32) -> f32 {
    (random.next_u32() >> 8) as f32 / (1 << 24) as f32
}

/// Occurrences of the last tokens, for the penalties.
struct Recent {
    /// How many tokens count; 0 if no penalty is set.
    window: usize,
    tokens: std::collections::VecDeque<u32>,
    counts: Vec<(u32, u32)>,
}

impl Recent {
    fn new(sampling: &Sampling, prompt: &[u32]) -> Self {
        let neutral =
            sampling.repetition_penalty == 1.0 && sampling.presence_penalty == 0.0 && sampling.frequency_penalty == 0.0;
        let window = if neutral { 0 } else { sampling.penalty_window };
        let mut recent = Self { window, tokens: Default::default(), counts: Vec::new() };
        prompt[prompt.len().saturating_sub(window)..].iter().for_each(|&id| recent.push(id));
        recent
    }

    fn push(&mut self, id: u32) {
        if self.window == 0 {
            return;
        }
        if self.tokens.len() == self.window
            && let Some(old) = self.tokens.pop_front()
            && let Some(at) = self.counts.iter().position(|&(id, _)| id == old)
        {
            self.counts[at].1 -= 1;
            if self.counts[at].1 == 0 {
                self.counts.swap_remove(at);
            }
        }
        self.tokens.push_back(id);
        match self.counts.iter_mut().find(|(seen, _)| *seen == id) {
            Some((_, count)) => *count += 1,
            None => self.counts.push((id, 1)),
        }
    }

    fn counts(&self) -> &[(u32, u32)] {
        &self.counts
    }
}

/// Text of an answer that holds back what could still become a stop text.
struct StopText<'a> {
    tokenizer: &'a Tokenizer,
    stream: TextStream,
    stops: &'a [String],
    /// The whole answer so far.
    text: String,
    /// Bytes of `text` already handed out.
    sent: usize,
}

impl<'a> StopText<'a> {
    fn new(tokenizer: &'a Tokenizer, stops: &'a [String]) -> Self {
        Self { tokenizer, stream: TextStream::default(), stops, text: String::new(), sent: 0 }
    }

    /// Text that is certain after token `id`, and the stop text that ended the answer.
    fn push(&mut self, id: u32) -> Result<(&str, Option<String>)> {
        let piece = self.stream.push(self.tokenizer, id)?;
        Ok(self.add(&piece))
    }

    fn add(&mut self, piece: &str) -> (&str, Option<String>) {
        self.text.push_str(piece);
        let from = self.sent;
        let found = self
            .stops
            .iter()
            .filter(|stop| !stop.is_empty())
            .filter_map(|stop| self.text[from..].find(stop.as_str()).map(|at| (from + at, stop)))
            .min_by_key(|&(at, _)| at);
        if let Some((at, stop)) = found {
            let stop = stop.clone();
            self.text.truncate(at);
            self.sent = at;
            return (&self.text[from..], Some(stop));
        }
        // Hold back the longest end that begins a stop text.
        let held = self
            .stops
            .iter()
            .flat_map(|stop| (1..stop.len()).filter(|&n| stop.is_char_boundary(n)).map(|n| &stop[..n]))
            .filter(|start| self.text[from..].ends_with(*start))
            .map(str::len)
            .max()
            .unwrap_or(0);
        self.sent = self.text.len() - held;
        (&self.text[from..self.sent], None)
    }

    /// What was held back.
    fn finish(&mut self) -> Result<&str> {
        let piece = self.stream.finish(self.tokenizer)?;
        let from = self.sent;
        let stopped = self.add(&piece).1.is_some();
        if !stopped {
            self.sent = self.text.len();
        }
        Ok(&self.text[from..self.sent])
    }

    fn into_text(self) -> String {
        self.text
    }
}
