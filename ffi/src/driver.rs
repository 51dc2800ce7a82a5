//! An answer cut into ticks.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use runtime::session::tokenizer::TextStream;
use runtime::{CancelToken, GenerateOptions, Model, Sampling, SessionOptions, StopReason};

use crate::events::{End, Events};
use crate::layout::Sized32;
use crate::model::awqua_budget;
use crate::session::{awqua_phase, awqua_stop_reason, awqua_tick_result};
use crate::status::awqua_status::*;
use crate::status::{Failure, Outcome};

/// What other threads may reach while a tick runs.
pub type Shared = CancelToken;

/// How to answer.
pub struct Request {
    pub max_tokens: usize,
    pub sampling: Sampling,
    pub seed: u64,
    pub ignore_eos: bool,
    pub stops: Vec<String>,
    pub stop_ids: Vec<u32>,
}

struct Answer {
    tokens: Vec<u32>,
    prompt: usize,
    request: Request,
    stream: TextStream,
    text: String,
    sent: usize,
}

/// A session and the answer it is making.
pub struct Driver {
    session: runtime::Session,
    answer: Option<Answer>,
    events: Events,
    /// Microseconds a prompt token took, to cut chunks by.
    token_us: f64,
}

impl Driver {
    pub fn new(model: &Arc<Model>, options: &SessionOptions) -> Outcome<Self> {
        let session = runtime::Session::new(model, options)?;
        Ok(Self { session, answer: None, events: Events::default(), token_us: 1000.0 })
    }

    pub fn session(&self) -> &runtime::Session {
        &self.session
    }

    pub fn events(&mut self) -> &mut Events {
        &mut self.events
    }

    pub fn phase(&self) -> awqua_phase {
        match &self.answer {
            None => awqua_phase::AWQUA_PHASE_IDLE,
            Some(a) if self.session.tokens().len() + 1 < a.prompt => awqua_phase::AWQUA_PHASE_PREFILL,
            Some(_) => awqua_phase::AWQUA_PHASE_DECODE,
        }
    }

    fn idle(&self) -> Outcome<()> {
        match self.answer {
            None => Ok(()),
            Some(_) => Err(Failure::state("an answer is being made")),
        }
    }

    pub fn truncate(&mut self, n: usize) -> Outcome<()> {
        self.idle()?;
        self.session.truncate(n);
        Ok(())
    }

    pub fn begin(&mut self, cancel: &CancelToken, prompt: Vec<u32>, request: Request) -> Outcome<()> {
        self.idle()?;
        request.sampling.validate()?;
        if prompt.is_empty() {
            return Err(Failure::invalid("the prompt has no tokens"));
        }
        let vocab = self.session.model().config().vocab_size;
        if let Some(id) = prompt.iter().find(|&&id| id as usize >= vocab) {
            return Err(Failure::invalid(format!("token id {id} is not below the vocabulary size {vocab}")));
        }
        if prompt.len() > self.session.context() as usize {
            let message =
                format!("{} tokens do not fit the context of {} tokens", prompt.len(), self.session.context());
            return Err(Failure::new(AWQUA_ERR_CONTEXT_FULL, message));
        }
        let common = self.session.tokens().iter().zip(&prompt).take_while(|(a, b)| a == b).count();
        self.session.truncate(common);
        self.events.restart(request.max_tokens.min(4096) * 8);
        cancel.reset();
        let n = prompt.len();
        self.answer = Some(Answer {
            tokens: prompt,
            prompt: n,
            request,
            stream: TextStream::default(),
            text: String::new(),
            sent: 0,
        });
        Ok(())
    }

    pub fn tick(&mut self, cancel: &CancelToken, budget: &awqua_budget) -> Outcome<awqua_tick_result> {
        let start = Instant::now();
        let deadline = Duration::from_micros(budget.cpu_us.min(1 << 40));
        let mut new_tokens = 0;
        let before = self.answer.as_ref().map(|a| (a.tokens.len(), a.prompt));
        let (mut total, mut made) = before.map_or((0, 0), |(len, prompt)| (prompt, len - prompt));
        while self.answer.is_some() {
            if cancel.is_cancelled() {
                self.end(awqua_stop_reason::AWQUA_STOP_CANCELLED)?;
                break;
            }
            match self.step(deadline.saturating_sub(start.elapsed())) {
                Ok(tokens) => new_tokens += tokens,
                Err(failure) => {
                    self.answer = None;
                    self.events.push_end(End::Error(failure.status));
                    return Err(failure);
                }
            }
            if let Some(a) = &self.answer {
                (total, made) = (a.prompt, a.tokens.len() - a.prompt);
            }
            if start.elapsed() >= deadline {
                break;
            }
        }
        Ok(awqua_tick_result {
            phase: self.phase() as u32,
            new_tokens,
            prompt_done: self.session.tokens().len().min(total) as u32,
            prompt_total: total as u32,
            answer_tokens: made as u32,
            cpu_us: start.elapsed().as_micros() as u64,
            ..awqua_tick_result::INIT
        })
    }

    fn step(&mut self, left: Duration) -> Outcome<u32> {
        let Some(answer) = &mut self.answer else { return Ok(0) };
        let have = self.session.tokens().len();
        if have + 1 < answer.prompt {
            let n = (left.as_micros() as f64 / self.token_us) as usize;
            let n = n.clamp(1, 256).min(answer.prompt - 1 - have);
            let start = Instant::now();
            self.session.append(&answer.tokens[have..have + n], &CancelToken::default())?;
            self.token_us = start.elapsed().as_micros() as f64 / n as f64 + 1.0;
            return Ok(0);
        }
        let made = answer.tokens.len() - answer.prompt;
        if made == answer.request.max_tokens {
            self.end(awqua_stop_reason::AWQUA_STOP_MAX_TOKENS)?;
            return Ok(0);
        }
        if answer.tokens.len() > self.session.context() as usize {
            self.end(awqua_stop_reason::AWQUA_STOP_CONTEXT_FULL)?;
            return Ok(0);
        }
        let options = GenerateOptions {
            max_tokens: 1,
            sampling: answer.request.sampling.clone(),
            seed: answer.request.seed.wrapping_add(made as u64),
            ignore_eos: answer.request.ignore_eos,
            stop_ids: answer.request.stop_ids.clone(),
            ..Default::default()
        };
        let one = self.session.generate(&answer.tokens, &options, &mut |_| ControlFlow::Continue(()))?;
        if let StopReason::Eos(_) = one.stop {
            self.end(awqua_stop_reason::AWQUA_STOP_EOS)?;
            return Ok(0);
        }
        answer.tokens.extend_from_slice(&one.ids);
        if let Ok(tokenizer) = self.session.model().tokenizer() {
            for &id in &one.ids {
                answer.text.push_str(&answer.stream.push(tokenizer, id)?);
            }
            if self.send(false) {
                self.answer = None;
            }
        }
        Ok(1)
    }

    /// Sends what is certain; true if a stop text ended the answer.
    fn send(&mut self, last: bool) -> bool {
        let Some(answer) = &mut self.answer else { return false };
        let new = &answer.text[answer.sent..];
        let found = answer.request.stops.iter().filter(|s| !s.is_empty()).filter_map(|s| new.find(s.as_str())).min();
        if let Some(at) = found {
            self.events.push_text(&new[..at]);
            self.events.push_end(End::Done(awqua_stop_reason::AWQUA_STOP_TEXT as u32));
            return true;
        }
        let held = answer
            .request
            .stops
            .iter()
            .flat_map(|stop| (1..stop.len()).filter(|&n| stop.is_char_boundary(n)).map(|n| &stop[..n]))
            .filter(|start| !last && new.ends_with(*start))
            .map(str::len)
            .max()
            .unwrap_or(0);
        self.events.push_text(&new[..new.len() - held]);
        answer.sent = answer.text.len() - held;
        false
    }

    fn end(&mut self, reason: awqua_stop_reason) -> Outcome<()> {
        if let (Some(answer), Ok(tokenizer)) = (&mut self.answer, self.session.model().tokenizer()) {
            let rest = answer.stream.finish(tokenizer)?;
            answer.text.push_str(&rest);
        }
        if !self.send(true) {
            self.events.push_end(End::Done(reason as u32));
        }
        self.answer = None;
        Ok(())
    }
}
