//! The one implementation of the decode loop: a state machine that does a bounded piece of work in every call and never
//! waits for a device.
//!
//! Tokens to compute lie in `todo`. While there are some, chunks of them become steps of the runner; once there are
//! none, a token is chosen from the last logits, on the device ahead of the host where that is possible, and goes back
//! to `todo`. Whatever the budgets are, the same steps are made in the same order with the same numbers, unless chunks
//! are allowed to follow them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::answer::Answer;
use super::events::Event;
use super::rotations::Rotations;
use super::{CancelToken, GenerateOptions, Place, Session, StopReason};
use crate::backend::{Backend, Budget, Group, LogitsRows, MAX_AHEAD, Next, Progress, Runner, Step};
use crate::engine::Trim;
use crate::error::{Error, ErrorKind, Result};
use crate::model::LoadBudget;

/// Share of the device's budget that one indivisible piece may take.
const PIECE: f64 = 0.5;

/// How much work one tick may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TickBudget {
    /// Time of the calling thread; looked at between pieces of well under a millisecond. `None` is no limit.
    pub host: Option<Duration>,
    /// Estimated time that the device may have queued when the call returns, what earlier calls left included. Estimates
    /// follow measurements. `None` is no limit. The CPU does not have such a queue.
    pub device: Option<Duration>,
}

impl TickBudget {
    /// As much as there is until the device has to be waited for.
    pub const UNLIMITED: Self = Self { host: None, device: None };
}

/// What a session is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Nothing.
    Idle,
    /// The weights are on their way back.
    Loading,
    /// It computes the prompt.
    Prefill,
    /// It makes tokens.
    Decode,
    /// The device was lost; nothing happens until [`crate::Engine::recover`].
    Lost,
}

/// What a tick did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tick {
    /// What the session is doing now.
    pub phase: Phase,
    /// Tokens that this tick added to the answer.
    pub new_tokens: usize,
    /// Prompt tokens computed so far, those found in the cache included.
    pub prompt_done: usize,
    /// Tokens of the prompt.
    pub prompt_total: usize,
    /// New tokens since the prompt.
    pub answer_tokens: usize,
    /// Whether there is nothing to do until the device finishes something: ticking again at once is in vain.
    pub is_waiting: bool,
    /// Estimated time that the device has queued.
    pub device_queued: Duration,
    /// Time of the calling thread.
    pub host_time: Duration,
}

/// Tokens to be computed into the cache.
#[derive(Debug, Default)]
pub(super) struct Todo {
    pub(super) ids: Vec<u32>,
    /// The next one.
    pub(super) next: usize,
    /// Position in the cache from which tokens are computed one at a time, as they were the first time.
    pub(super) single_from: usize,
}

impl Todo {
    pub(super) fn left(&self) -> usize {
        self.ids.len() - self.next
    }

    pub(super) fn clear(&mut self) {
        self.ids.clear();
        self.next = 0;
    }
}

/// How far the tokens under way are.
#[derive(Debug, Default)]
pub(super) struct UnderWay {
    /// Tokens of the step that is being queued; 0 if there is none.
    step: usize,
    /// Tokens chosen ahead that the host does not know yet, and whether the step of the last one is being queued.
    ahead: usize,
    ahead_step: bool,
    /// A choice was asked for.
    choice: bool,
    /// The pass of a batch that the next token is in.
    pass: Option<Pass>,
}

/// A session's part in a pass of a batch that is under way.
#[derive(Debug)]
pub(super) struct Pass {
    /// The batch.
    pub(super) of: Arc<()>,
    /// Which of its passes.
    pub(super) number: u64,
    pub(super) row: usize,
    /// Whether the token is chosen ahead of the host.
    pub(super) is_chosen: bool,
}

/// What a session can add to the passes of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// Nothing for now.
    Never,
    /// A token, once it is known.
    Later,
    /// The next token.
    Ready,
}

/// What stopped the work of a tick.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    /// The host's time was over, or a token was accepted and the caller wants to hear of each.
    Budget,
    /// The device has to finish something first.
    Waiting,
    /// The weights are on their way.
    Loading,
    /// There is nothing to do.
    Idle,
}

impl Session {
    /// Begins to continue `prompt`, which replaces what the cache holds; the start they share is not computed again.
    /// Events of an earlier answer are dropped. [`Self::tick`] does the work.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for no ids, ids outside the vocabulary, a sampling value out of range, stop texts
    /// without a tokenizer, or while something else is being made; [`ErrorKind::ContextFull`].
    pub fn begin(&mut self, prompt: &[u32], options: GenerateOptions) -> Result<()> {
        self.require_idle()?;
        self.check_ids(prompt, 0)?;
        let mut answer = Answer::new(&self.model, prompt, self.config.context, options)?;
        answer.reused = self.plan_prompt(prompt);
        if self.todo.left() == 0 {
            answer.prefilled = Some(Instant::now());
        }
        self.events.restart(answer.text_bytes());
        self.finished = None;
        self.answer = Some(answer);
        Ok(())
    }

    /// Works within the budget on what was begun, without waiting for the device; at least one piece is done where there
    /// is one to do. Text and the end come as events, see [`Self::poll`].
    ///
    /// # Errors
    /// What made the answer fail, which is an event as well; the session can be used again. [`ErrorKind::Evicted`] keeps
    /// the answer, which goes on after [`crate::Model::restore`]. The loss of a device is no error, but [`Phase::Lost`].
    pub fn tick(&mut self, budget: &TickBudget) -> Result<Tick> {
        self.tick_until(budget, usize::MAX)
    }

    /// As [`Self::tick`], but returns after every token.
    pub(super) fn tick_once(&mut self, budget: &TickBudget) -> Result<Tick> {
        self.tick_until(budget, 1)
    }

    /// Takes the next event, text into `out`: `None` if there is none.
    pub fn poll(&mut self, out: &mut [u8]) -> Option<Event> {
        self.events.poll(out)
    }

    /// Ends the answer that is being made, if there is one; [`Event::Done`] says so. What the cache holds stays.
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`] if the last piece of text can not be decoded.
    pub fn cancel(&mut self) -> Result<()> {
        self.finish(StopReason::Cancelled)
    }

    /// Blocks until the device finished something, so that a waiting tick can go on.
    ///
    /// # Errors
    /// A device error other than its loss, which the next tick tells.
    pub fn wait(&mut self) -> Result<()> {
        let waited = match &mut self.place {
            Some(place) if !place.backend.is_lost() => place.runner.wait(),
            _ => self.model.wait(),
        };
        match waited {
            Err(error) if error.kind() == ErrorKind::DeviceLost => Ok(()),
            waited => waited,
        }
    }

    /// What the session is doing.
    pub fn phase(&self) -> Phase {
        match (&self.answer, &self.embedding) {
            _ if self.is_lost => Phase::Lost,
            (None, None) => Phase::Idle,
            (None, Some(_)) => Phase::Prefill,
            (Some(answer), _) if answer.prefilled.is_none() => Phase::Prefill,
            (Some(_), _) => Phase::Decode,
        }
    }

    fn tick_until(&mut self, budget: &TickBudget, tokens: usize) -> Result<Tick> {
        let started = Instant::now();
        self.begin_tick()?;
        let inner = Budget { deadline: budget.host.and_then(|host| started.checked_add(host)), device: budget.device };
        let before = self.made();
        let worked = self.work(&inner, before.saturating_add(tokens));
        self.end_tick(worked, before, started)
    }

    /// What comes before the work of a tick.
    ///
    /// # Errors
    /// Those of [`crate::Engine::recover`].
    pub(super) fn begin_tick(&mut self) -> Result<()> {
        self.heed_trims();
        match self.is_lost && self.model.engine().options().auto_recover {
            true => self.model.engine().recover(),
            false => Ok(()),
        }
    }

    /// What comes behind the work of a tick that began at `started` with `before` tokens of the answer.
    ///
    /// # Errors
    /// As [`Self::tick`].
    pub(super) fn end_tick(&mut self, worked: Result<Flow>, before: usize, started: Instant) -> Result<Tick> {
        let mut phase = self.phase();
        let is_waiting = match worked {
            Ok(Flow::Waiting) => true,
            Ok(Flow::Loading) => {
                phase = Phase::Loading;
                true
            }
            Ok(Flow::Budget | Flow::Idle) => false,
            Err(error) if error.kind() == ErrorKind::DeviceLost => {
                self.lose();
                phase = Phase::Lost;
                true
            }
            Err(error) if error.kind() == ErrorKind::Evicted => return Err(error),
            Err(error) => {
                if error.kind() == ErrorKind::OutOfMemory {
                    self.events.memory_pressure();
                }
                let told = Error::new(error.kind(), error.message());
                self.drop_answer();
                self.events.end(Err(told));
                return Err(error);
            }
        };
        let answer = self.answer.as_ref().or(self.finished.as_ref());
        let embedding = self.embedding.as_ref().map_or(0, |embedding| embedding.total);
        let prompt_total = answer.map_or(embedding, |answer| answer.prompt);
        Ok(Tick {
            phase,
            new_tokens: self.made().saturating_sub(before),
            prompt_done: self.prompt_done(),
            prompt_total,
            answer_tokens: self.made(),
            is_waiting,
            device_queued: self.place.as_mut().map_or(Duration::ZERO, |p| p.runner.queued().unwrap_or_default()),
            host_time: started.elapsed(),
        })
    }

    /// Tokens of the answer so far.
    pub(super) fn made(&self) -> usize {
        self.answer.as_ref().or(self.finished.as_ref()).map_or(0, |answer| answer.ids.len())
    }

    fn prompt_done(&self) -> usize {
        match (&self.answer, &self.finished) {
            (Some(answer), _) | (None, Some(answer)) if answer.prefilled.is_none() => {
                self.tokens.len().min(answer.prompt)
            }
            (Some(answer), _) | (None, Some(answer)) => answer.prompt,
            (None, None) => self.embedding.as_ref().map_or(0, |embedding| self.tokens.len().min(embedding.total)),
        }
    }

    fn work(&mut self, budget: &Budget, enough: usize) -> Result<Flow> {
        loop {
            if self.is_busy() && !self.is_cancelled() && self.made() >= enough {
                return Ok(Flow::Budget);
            }
            match self.piece(budget, false)? {
                Some(flow) => return Ok(flow),
                None if budget.is_over() => return Ok(Flow::Budget),
                None => {}
            }
        }
    }

    fn is_cancelled(&self) -> bool {
        match (&self.answer, &self.embedding) {
            (Some(answer), _) => answer.options.cancel.is_cancelled(),
            (None, Some(embedding)) => embedding.cancel.is_cancelled(),
            (None, None) => false,
        }
    }

    /// Ends what is being made if the caller asked for that; whether it did.
    ///
    /// # Errors
    /// As [`Self::cancel`].
    pub(super) fn heed_cancel(&mut self) -> Result<bool> {
        let is_cancelled = self.is_cancelled();
        if is_cancelled {
            self.finish(StopReason::Cancelled)?;
        }
        Ok(is_cancelled)
    }

    /// Does one piece of what was begun; `None` if there may be more to do at once. In a batch, where tokens are `shared`
    /// passes, none is made ahead of the host here.
    pub(super) fn piece(&mut self, budget: &Budget, shared: bool) -> Result<Option<Flow>> {
        if !self.is_busy() {
            return Ok(Some(Flow::Idle));
        }
        if self.heed_cancel()? {
            return Ok(Some(Flow::Idle));
        }
        if !self.attach(budget)? {
            return Ok(Some(Flow::Loading));
        }
        self.leave_pass()?;
        match (&self.embedding, self.todo.left() > 0) {
            (Some(_), _) => self.embed_piece(budget),
            (None, true) => self.compute(budget),
            (None, false) => self.choose(budget, shared),
        }
    }

    /// The row of pass `number` of batch `of` that this session has.
    pub(super) fn part_of(&self, of: &Arc<()>, number: u64) -> Option<usize> {
        let pass = self.under_way.pass.as_ref();
        pass.filter(|pass| Arc::ptr_eq(&pass.of, of) && pass.number == number).map(|pass| pass.row)
    }

    /// What the session can add to the next pass of `group`.
    pub(super) fn part(&self, group: &dyn Group, backend: &Arc<dyn Backend>) -> Part {
        let Some(place) = self.place.as_ref().filter(|place| Arc::ptr_eq(&place.backend, backend)) else {
            return Part::Never;
        };
        let decodes = self.answer.as_ref().is_some_and(|answer| answer.prefilled.is_some()) && !self.is_lost;
        let single = self.todo.left() == 0 || self.todo.left() == 1 && self.todo.single_from <= self.tokens.len();
        if !decodes || !single || self.deterministic || self.is_cancelled() || !group.takes(&*place.runner) {
            return Part::Never;
        }
        let UnderWay { step, ahead_step, choice, ref pass, .. } = self.under_way;
        match step == 0 && !ahead_step && !choice && pass.is_none() {
            true if self.todo.left() == 1 || self.can_go_ahead() => Part::Ready,
            _ => Part::Later,
        }
    }

    /// Joins `pass` with the next token; false if that has to be chosen by the host first, which is begun.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn join(&mut self, group: &mut dyn Group, pass: Pass) -> Result<bool> {
        if self.todo.left() > 0 {
            let (position, id) = (self.tokens.len(), self.todo.ids[self.todo.next]);
            self.has_logits = false;
            self.own(position)?;
            self.write_rope(1, position + 1)?;
            let place = self.place.as_mut().ok_or_else(no_runner)?;
            let joined = group.join(&mut *place.runner, &Next::Token(id), position as u32)?;
            self.under_way.pass = joined.then_some(pass);
            return Ok(joined);
        }
        let ahead = self.under_way.ahead;
        self.write_rope(ahead + 1, self.tokens.len() + ahead + 1)?;
        let (Some(answer), Some(place)) = (&mut self.answer, &mut self.place) else { return Ok(false) };
        let position = (self.tokens.len() + ahead) as u32;
        if group.join(&mut *place.runner, &Next::Chosen(&answer.request_ahead()), position)? {
            answer.went_ahead();
            self.under_way.ahead += 1;
            self.under_way.pass = Some(Pass { is_chosen: true, ..pass });
            return Ok(true);
        }
        if ahead == 0 {
            self.begin_choice()?;
        }
        Ok(false)
    }

    /// The pass is complete on the host's side.
    pub(super) fn end_pass(&mut self) {
        if self.under_way.pass.take().is_some_and(|pass| !pass.is_chosen) {
            self.under_way.step = 1;
            self.end_step();
        }
    }

    /// Leaves a pass under way: its token is computed by itself, or in another one.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn leave_pass(&mut self) -> Result<()> {
        if self.under_way.pass.take().is_some_and(|pass| pass.is_chosen) {
            self.runner()?.retract_ahead()?;
            self.under_way.ahead -= 1;
            self.under_way.choice = true;
        }
        Ok(())
    }

    /// Forgets that it has part in a pass whose work is lost.
    pub(super) fn forget_pass(&mut self) {
        self.under_way.pass = None;
    }

    /// Computes or queues a piece of `todo`; `None` if there may be more to do at once.
    pub(super) fn compute(&mut self, budget: &Budget) -> Result<Option<Flow>> {
        if self.under_way.step == 0 {
            self.begin_step(budget.device)?;
        }
        let progress = self.runner()?.advance(budget)?;
        Ok(match progress {
            Progress::Working => Some(Flow::Budget),
            Progress::Waiting => Some(Flow::Waiting),
            Progress::Done => {
                self.end_step();
                None
            }
        })
    }

    fn begin_step(&mut self, device: Option<Duration>) -> Result<()> {
        let (position, left) = (self.tokens.len(), self.todo.left());
        let n = self.step_size(position, left, device)?;
        self.has_logits = false;
        self.own(position)?;
        // Of the prompt as a whole, or of the sequence so far where tokens come one at a time.
        let length = (position + left).min(self.todo.single_from).max(position + 1);
        self.write_rope(n, length)?;
        let tokens = &self.todo.ids[self.todo.next..][..n];
        let logits = match n == left {
            _ if self.embedding.is_some() => LogitsRows::Hidden,
            true => LogitsRows::Last,
            false => LogitsRows::None,
        };
        let place = self.place.as_mut().ok_or_else(no_runner)?;
        place.runner.begin(&Step { tokens, position: position as u32, logits })?;
        self.under_way.step = n;
        Ok(())
    }

    /// Tokens of the next step.
    fn step_size(&mut self, position: usize, left: usize, device: Option<Duration>) -> Result<usize> {
        let Some(chunked) = self.todo.single_from.checked_sub(position).filter(|n| *n > 0) else { return Ok(1) };
        let most = match &self.embedding {
            Some(_) => self.config.max_logits_rows as usize,
            None => self.config.max_tokens as usize,
        };
        let n = left.min(chunked);
        if self.deterministic {
            // Chunks end at the same positions whatever was computed before and however little time there is.
            return Ok(n.min(most - position % most));
        }
        let n = n.min(most);
        match device {
            Some(device) => Ok(self.runner()?.chunk(position as u32, n, device.mul_f64(PIECE)).clamp(1, n)),
            None => Ok(n),
        }
    }

    fn end_step(&mut self) {
        let n = std::mem::take(&mut self.under_way.step);
        let (position, most) = (self.tokens.len(), self.config.max_tokens as usize);
        self.tokens.extend_from_slice(&self.todo.ids[self.todo.next..][..n]);
        self.todo.next += n;
        self.has_logits = self.todo.left() == 0 && self.embedding.is_none();
        if let Some(embedding) = &self.embedding {
            self.events.progress(self.tokens.len(), embedding.total);
        }
        if position == self.grid && n == most {
            self.grid += n;
        }
        if let Some(answer) = self.answer.as_mut().filter(|answer| answer.prefilled.is_none()) {
            self.events.progress(self.tokens.len().min(answer.prompt), answer.prompt);
            if self.has_logits {
                answer.prefilled = Some(Instant::now());
            }
        }
    }

    /// Chooses a token from the last logits, ahead of the host where that is possible and not `shared` with others;
    /// `None` if there may be more to do at once.
    fn choose(&mut self, budget: &Budget, shared: bool) -> Result<Option<Flow>> {
        if self.under_way.ahead_step {
            match self.runner()?.advance(budget)? {
                Progress::Done => self.under_way.ahead_step = false,
                Progress::Working => return Ok(Some(Flow::Budget)),
                // A token that has arrived does not have to wait along.
                Progress::Waiting => return Ok((!self.take_ahead()?).then_some(Flow::Waiting)),
            }
        }
        if self.take_ahead()? {
            return Ok(None);
        }
        if !shared && self.can_go_ahead() {
            let queued = self.runner()?.queued()?;
            if budget.device.is_some_and(|device| queued >= device && !queued.is_zero()) {
                return Ok(Some(Flow::Waiting));
            }
            if self.go_ahead()? {
                return Ok(None);
            }
        }
        if self.under_way.ahead > 0 {
            return Ok(Some(Flow::Waiting));
        }
        if !self.under_way.choice {
            self.begin_choice()?;
        }
        match self.runner()?.poll_sample()? {
            None => Ok(Some(Flow::Waiting)),
            Some(id) => {
                self.under_way.choice = false;
                self.accept(id, false)?;
                Ok(None)
            }
        }
    }

    /// Has the next token chosen, for the host to know it.
    fn begin_choice(&mut self) -> Result<()> {
        let (Some(answer), Some(place)) = (&mut self.answer, &mut self.place) else { return Ok(()) };
        answer.prepare()?;
        place.runner.begin_sample(&answer.request())?;
        self.under_way.choice = true;
        Ok(())
    }

    fn can_go_ahead(&self) -> bool {
        let ahead = self.under_way.ahead;
        ahead < MAX_AHEAD
            && !self.under_way.choice
            && self.has_logits
            && self.tokens.len() + ahead < self.config.context as usize
            && self.model.config().same_rope_rows(self.rotations.length, self.tokens.len() + ahead + 1)
            && self.answer.as_ref().is_some_and(|answer| answer.can_go_ahead(ahead))
    }

    /// Has the token behind those under way chosen, and begins its step; false where the backend can not.
    fn go_ahead(&mut self) -> Result<bool> {
        let ahead = self.under_way.ahead;
        self.write_rope(ahead + 1, self.tokens.len() + ahead + 1)?;
        let (Some(answer), Some(place)) = (&mut self.answer, &mut self.place) else { return Ok(false) };
        let position = (self.tokens.len() + ahead) as u32;
        let gone = place.runner.begin_ahead(&answer.request_ahead(), position)?;
        if gone {
            answer.went_ahead();
            self.under_way.ahead += 1;
            self.under_way.ahead_step = true;
        }
        Ok(gone)
    }

    /// Takes the oldest token chosen ahead, if it has arrived.
    fn take_ahead(&mut self) -> Result<bool> {
        if self.under_way.ahead == 0 {
            return Ok(false);
        }
        let Some(id) = self.runner()?.poll_ahead()? else { return Ok(false) };
        self.under_way.ahead -= 1;
        self.accept(id, true)?;
        Ok(true)
    }

    fn accept(&mut self, id: u32, ahead: bool) -> Result<()> {
        let Some(answer) = &mut self.answer else { return Ok(()) };
        let end = answer.accept(&self.model, id, ahead, &mut self.events)?;
        if ahead && matches!(end, None | Some(StopReason::MaxTokens)) {
            // Its step is queued already.
            self.tokens.push(id);
        }
        match end {
            Some(reason) => {
                // The step over a token that is not wanted left logits of no use.
                self.has_logits &= !ahead;
                self.finish(reason)
            }
            None if ahead => Ok(()),
            None if self.tokens.len() < self.config.context as usize => {
                self.plan_more(&[id]);
                if self.tokens.is_empty() {
                    self.chunked = self.todo.left();
                }
                self.todo.single_from = self.chunked;
                Ok(())
            }
            None => match answer.options.shift {
                Some(shift) => self.shift(shift.keep, id),
                None => self.finish(StopReason::ContextFull),
            },
        }
    }

    /// Makes room in a full cache: keeps the first `keep` tokens and the newer half of the others, which are computed
    /// again, and `id` behind them.
    fn shift(&mut self, keep: usize, id: u32) -> Result<()> {
        let keep = keep.min(self.tokens.len());
        let drop = (self.tokens.len() - keep).div_ceil(2);
        if drop == 0 {
            return Err(Error::new(ErrorKind::ContextFull, format!("keeping {keep} tokens leaves no room to shift")));
        }
        // Keys carry the rotation of their position, so the tail is computed again rather than moved; and everything,
        // where the chunks that positions were computed in are part of a promise.
        let again = if self.deterministic { 0 } else { keep };
        self.todo.clear();
        self.todo.ids.extend_from_slice(&self.tokens[again..keep]);
        self.todo.ids.extend_from_slice(&self.tokens[keep + drop..]);
        self.todo.ids.push(id);
        self.cut(again);
        self.chunked = again + self.todo.ids.len();
        self.todo.single_from = self.chunked;
        Ok(())
    }

    /// Gives back what somebody asked for.
    fn heed_trims(&mut self) {
        let model = &self.model;
        let Some(level) = model.engine().trim_since(&mut self.trims_seen) else { return };
        self.events.memory_pressure();
        model.release_pages();
        if level >= Trim::Weights && !self.is_busy() {
            model.evict();
        }
        if level >= Trim::Sessions {
            self.trim();
        }
    }

    /// Gives back the memory of an idle session: its tokens are known and computed again when they are needed. Nothing
    /// happens while something is being made.
    pub fn trim(&mut self) {
        if !self.is_busy() {
            self.forget_computed();
        }
    }

    /// Ends the answer for `reason`.
    pub(super) fn finish(&mut self, reason: StopReason) -> Result<()> {
        self.stop_work();
        match (self.answer.take(), self.embedding.take()) {
            (Some(mut answer), _) => {
                let finished = answer.finish(&self.model, &mut self.events);
                self.finished = Some(answer);
                finished?;
            }
            (None, Some(_)) => {}
            (None, None) => return Ok(()),
        }
        self.events.end(Ok(reason));
        Ok(())
    }

    /// Forgets what is being made without a word.
    pub(super) fn drop_answer(&mut self) {
        self.stop_work();
        (self.answer, self.embedding) = (None, None);
    }

    /// Abandons what is under way; what the cache holds stays.
    fn stop_work(&mut self) {
        let UnderWay { step, ahead, ahead_step, choice, pass } = std::mem::take(&mut self.under_way);
        if step > 0 || ahead > 0 || ahead_step || choice || pass.is_some() {
            self.has_logits &= step == 0 && ahead == 0 && pass.is_none();
            if let Some(place) = &mut self.place {
                place.runner.abandon();
            }
        }
        if self.is_busy() {
            self.todo.clear();
        }
    }

    /// Computes `todo` to the end, waiting for the device; between pieces `cancel` is looked at.
    pub(super) fn compute_all(&mut self, cancel: &CancelToken) -> Result<()> {
        let result = self.try_compute_all(cancel);
        if let Err(error) = &result {
            match error.kind() {
                ErrorKind::DeviceLost => self.lose(),
                _ => {
                    self.stop_work();
                    self.todo.clear();
                }
            }
        }
        result
    }

    fn try_compute_all(&mut self, cancel: &CancelToken) -> Result<()> {
        while self.todo.left() > 0 {
            if self.under_way.step == 0 {
                cancel.check()?;
            }
            let idle = match self.attach(&Budget::UNLIMITED)? {
                true => self.compute(&Budget::UNLIMITED)?.is_some(),
                false => true,
            };
            if idle {
                self.wait()?;
            }
        }
        Ok(())
    }

    /// Has the session compute with the weights as they are now; false while they are on their way, which this call
    /// brings along within the budget.
    ///
    /// # Errors
    /// [`ErrorKind::DeviceLost`], [`ErrorKind::Evicted`], or what keeps the weights or the session's memory from coming
    /// back.
    pub(super) fn attach(&mut self, budget: &Budget) -> Result<bool> {
        let backend = match self.model.backend()? {
            Some(backend) => backend,
            None => {
                let left = budget.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
                let load = LoadBudget { host: left, kernels: left.map(|_| 1), ..LoadBudget::default() };
                if !self.model.tick(&load)? {
                    return Ok(false);
                }
                match self.model.backend()? {
                    Some(backend) => backend,
                    None => return Ok(false),
                }
            }
        };
        if let Some(place) = &mut self.place {
            if Arc::ptr_eq(&place.backend, &backend) {
                return Ok(true);
            }
            if !place.backend.is_lost() && place.runner.rebind(backend.clone())? {
                place.backend = backend;
                self.compute_last_again();
                return Ok(true);
            }
        }
        self.forget_computed();
        self.place = Some(Place::new(&self.model, backend, &self.config)?);
        self.is_lost = false;
        Ok(true)
    }

    /// The device is gone, and with it everything that was computed.
    pub(super) fn lose(&mut self) {
        if !self.is_lost {
            self.is_lost = true;
            self.events.device_lost();
        }
        self.forget_computed();
    }

    /// Gives up the runner; the tokens of its cache are to be computed again, as they were the first time.
    fn forget_computed(&mut self) {
        self.place = None;
        self.under_way = UnderWay::default();
        if let Some(answer) = &mut self.answer {
            answer.forget_ahead();
        }
        if let Some(embedding) = &mut self.embedding {
            embedding.restart();
        }
        let rest = self.todo.ids.split_off(self.todo.next);
        self.todo.clear();
        self.todo.ids.extend(self.tokens.drain(..).chain(rest));
        self.todo.single_from = self.chunked;
        (self.has_logits, self.grid) = (false, 0);
        self.rotations = Rotations::default();
    }

    /// The cache is still there, but not the logits.
    fn compute_last_again(&mut self) {
        self.under_way = UnderWay::default();
        if let Some(answer) = &mut self.answer {
            answer.forget_ahead();
        }
        self.has_logits = false;
        if self.answer.is_none() || self.todo.left() > 0 {
            return;
        }
        let most = self.config.max_tokens as usize;
        let last = self.tokens.len().saturating_sub(1);
        let from = if self.deterministic && last < self.chunked { last / most * most } else { last };
        self.todo.clear();
        self.todo.ids.extend_from_slice(&self.tokens[from..]);
        self.todo.single_from = self.chunked;
        self.cut(from);
    }

    pub(super) fn runner(&mut self) -> Result<&mut dyn Runner> {
        match &mut self.place {
            Some(place) => Ok(&mut *place.runner),
            None => Err(no_runner()),
        }
    }
}

pub(super) fn no_runner() -> Error {
    Error::new(ErrorKind::Evicted, "the session is not on a device")
}
