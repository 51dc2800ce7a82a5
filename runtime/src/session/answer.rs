//! An answer in the making: what was asked for, what was made so far, and what the next choice depends on.

use std::collections::VecDeque;
use std::time::Instant;

use rand_pcg::Pcg32;
use rand_pcg::rand_core::Rng;

use super::events::Events;
use super::grammar::Constraint;
use super::sampler::{SampleRequest, Sampling};
use super::tokenizer::Tokenizer;
use super::vocabulary::TextStream;
use super::{GenerateOptions, StopReason};
use crate::error::{Error, ErrorKind, Result};
use crate::model::Model;

/// Bytes of text that a token makes, more than almost any answer has on average.
const TOKEN_BYTES: usize = 8;
/// Tokens that memory is set aside for from the start; longer answers grow it now and then.
const SET_ASIDE: usize = 8192;

/// An answer and its state.
pub(super) struct Answer {
    pub(super) options: GenerateOptions,
    /// Tokens of the prompt, and how many of them were in the cache.
    pub(super) prompt: usize,
    pub(super) reused: usize,
    /// New tokens, without the id that ended the turn.
    pub(super) ids: Vec<u32>,
    /// Biases and bans as the sampler takes them: one entry an id.
    bias: Vec<(u32, f32)>,
    /// Behind the number of the last accepted token.
    random: Pcg32,
    /// Behind the numbers of tokens chosen ahead, too.
    ahead: Pcg32,
    recent: Recent,
    constraint: Option<Constraint>,
    text: Option<StopText>,
    pub(super) started: Instant,
    pub(super) prefilled: Option<Instant>,
    pub(super) first_token: Option<Instant>,
}

impl Answer {
    /// Checks what is asked for.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`].
    pub(super) fn new(model: &Model, prompt: &[u32], context: u32, options: GenerateOptions) -> Result<Self> {
        options.sampling.validate()?;
        let vocab = model.config().vocab_size;
        let named = options.bias.iter().map(|(id, _)| id).chain(&options.banned);
        if let Some(id) = named.into_iter().find(|&&id| id as usize >= vocab) {
            let message = format!("token id {id} of `bias` or `banned` is not below the vocabulary size {vocab}");
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        if let Some((id, bias)) = options.bias.iter().find(|(_, bias)| bias.is_nan() || *bias == f32::INFINITY) {
            let message = format!("the bias of token {id} must be a number or negative infinity, got {bias}");
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let text = match model.tokenizer() {
            Ok(_) => Some(StopText::new(&options.stop)),
            Err(_) if options.stop.is_empty() => None,
            Err(e) => return Err(Error::new(ErrorKind::InvalidInput, format!("stop texts need a tokenizer: {e}"))),
        };
        let constraint = options.grammar.as_ref().map(|grammar| Constraint::new(model, grammar)).transpose()?;
        let random = Pcg32::new(options.seed, 0);
        let most = options.max_tokens.min(if options.shift.is_some() { SET_ASIDE } else { context as usize });
        Ok(Self {
            prompt: prompt.len(),
            reused: 0,
            ids: Vec::with_capacity(most),
            bias: biases(&options),
            ahead: random.clone(),
            random,
            recent: Recent::new(&options.sampling, prompt),
            constraint,
            text,
            started: Instant::now(),
            prefilled: None,
            first_token: None,
            options,
        })
    }

    /// Bytes of text to set aside.
    pub(super) fn text_bytes(&self) -> usize {
        self.options.max_tokens.min(SET_ASIDE) * TOKEN_BYTES
    }

    /// Whether the next token can be chosen without the host knowing the ones before it.
    pub(super) fn can_go_ahead(&self, outstanding: usize) -> bool {
        // Not the last token, whose step nobody may ask for.
        self.recent.window == 0
            && self.constraint.is_none()
            && self.ids.len() + outstanding + 1 < self.options.max_tokens
    }

    /// Finds out which tokens may be chosen, before [`Self::request`].
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if the grammar is too complex for that.
    pub(super) fn prepare(&mut self) -> Result<()> {
        self.constraint.as_mut().map_or(Ok(()), Constraint::prepare)
    }

    /// The choice of the next token; its random number counts once [`Self::accept`] takes the token.
    pub(super) fn request(&self) -> SampleRequest<'_> {
        self.request_at(self.random.clone())
    }

    /// The choice of a token ahead; [`Self::went_ahead`] if it was made.
    pub(super) fn request_ahead(&self) -> SampleRequest<'_> {
        self.request_at(self.ahead.clone())
    }

    fn request_at(&self, mut random: Pcg32) -> SampleRequest<'_> {
        SampleRequest {
            sampling: &self.options.sampling,
            recent: self.recent.counts(),
            // 24 bits in [0, 1).
            uniform: (random.next_u32() >> 8) as f32 / (1 << 24) as f32,
            bias: &self.bias,
            mask: self.constraint.as_ref().and_then(Constraint::mask),
        }
    }

    pub(super) fn went_ahead(&mut self) {
        self.ahead.next_u32();
    }

    /// Forgets choices that were not accepted, so that they are made again with the same numbers.
    pub(super) fn forget_ahead(&mut self) {
        self.ahead = self.random.clone();
    }

    /// Takes a token that was chosen, `ahead` or not; returns why the answer ends with it, if so.
    pub(super) fn accept(
        &mut self,
        model: &Model,
        id: u32,
        ahead: bool,
        events: &mut Events,
    ) -> Result<Option<StopReason>> {
        self.random.next_u32();
        if !ahead {
            self.ahead = self.random.clone();
        }
        self.first_token.get_or_insert_with(Instant::now);
        let heeds_eos = !self.options.ignore_eos || self.constraint.is_some();
        let eos = heeds_eos && model.generation().eos_token_ids.contains(&id);
        if eos || self.options.stop_ids.contains(&id) {
            return Ok(Some(StopReason::Eos(id)));
        }
        self.ids.push(id);
        self.recent.push(id);
        if let (Some(text), Ok(tokenizer)) = (&mut self.text, model.tokenizer())
            && let Some(stop) = text.push(tokenizer, id, events)?
        {
            return Ok(Some(StopReason::StopString(stop)));
        }
        if let Some(constraint) = &mut self.constraint
            && constraint.accept(id)?
        {
            return Ok(Some(StopReason::Complete));
        }
        Ok((self.ids.len() >= self.options.max_tokens).then_some(StopReason::MaxTokens))
    }

    /// Hands out the text that was held back.
    pub(super) fn finish(&mut self, model: &Model, events: &mut Events) -> Result<()> {
        match (&mut self.text, model.tokenizer()) {
            (Some(text), Ok(tokenizer)) => text.finish(tokenizer, events),
            _ => Ok(()),
        }
    }
}

/// Biases and bans by id, each id once: several of one add up.
fn biases(options: &GenerateOptions) -> Vec<(u32, f32)> {
    let banned = options.banned.iter().map(|&id| (id, f32::NEG_INFINITY));
    let mut biases: Vec<(u32, f32)> = options.bias.iter().copied().chain(banned).collect();
    biases.sort_by_key(|(id, _)| *id);
    biases.dedup_by(|(id, more), (kept, bias)| {
        let same = id == kept;
        if same {
            *bias += *more;
        }
        same
    });
    biases
}

/// Occurrences of the last tokens, for the penalties.
struct Recent {
    /// How many tokens count; 0 if no penalty is set.
    window: usize,
    tokens: VecDeque<u32>,
    counts: Vec<(u32, u32)>,
}

impl Recent {
    fn new(sampling: &Sampling, prompt: &[u32]) -> Self {
        let neutral =
            sampling.repetition_penalty == 1.0 && sampling.presence_penalty == 0.0 && sampling.frequency_penalty == 0.0;
        let window = if neutral { 0 } else { sampling.penalty_window };
        let room = window.min(SET_ASIDE);
        let mut recent = Self { window, tokens: VecDeque::with_capacity(room), counts: Vec::with_capacity(room) };
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
struct StopText {
    stream: TextStream,
    stops: Vec<String>,
    /// Text that was not handed out yet.
    held: String,
}

impl StopText {
    fn new(stops: &[String]) -> Self {
        let stops: Vec<String> = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        Self { stream: TextStream::default(), stops, held: String::with_capacity(longest + 256) }
    }

    /// Hands out the text that is certain after token `id`; the stop text that ends the answer, if one does.
    fn push(&mut self, tokenizer: &Tokenizer, id: u32, events: &mut Events) -> Result<Option<String>> {
        if self.stops.is_empty() {
            self.stream.push(tokenizer, id, events.text())?;
            return Ok(None);
        }
        self.stream.push(tokenizer, id, &mut self.held)?;
        Ok(self.hand_out(events, false))
    }

    fn finish(&mut self, tokenizer: &Tokenizer, events: &mut Events) -> Result<()> {
        self.stream.finish(tokenizer, &mut self.held)?;
        self.hand_out(events, true);
        Ok(())
    }

    fn hand_out(&mut self, events: &mut Events, last: bool) -> Option<String> {
        let held = &self.held;
        let found = self.stops.iter().filter_map(|stop| Some((held.find(stop.as_str())?, stop)));
        if let Some((at, stop)) = found.min_by_key(|(at, _)| *at) {
            events.text().push_str(&held[..at]);
            let stop = stop.clone();
            self.held.clear();
            // Nothing of what is still to come belongs to the answer.
            self.stream.restart();
            return Some(stop);
        }
        // Hold back the longest end that begins a stop text.
        let begins = |stop: &String| {
            let ends = (1..stop.len()).rev().filter(|&n| stop.is_char_boundary(n));
            ends.into_iter().find(|&n| held.ends_with(&stop[..n]))
        };
        let keep = if last { 0 } else { self.stops.iter().filter_map(begins).max().unwrap_or(0) };
        let out = held.len() - keep;
        events.text().push_str(&held[..out]);
        self.held.drain(..out);
        None
    }
}
