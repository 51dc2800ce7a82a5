//! What the user says and hears: tokens, prompts, sampling, text.
//!
//! Everything that takes time is made of [`Session::tick`]s; the calls that wait ([`Session::generate`],
//! [`Session::set_prompt`], ...) do the same work to its end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use crate::backend::{Backend, Budget, Group, KvType, LogitsRows, Next, OpTime, Runner, RunnerConfig, Sharing, Step};
use crate::engine::{Bytes, Engine, Lease};
use crate::error::{Error, ErrorKind, Result};
use crate::model::{Model, ModelConfig};

mod answer;
mod batch;
pub mod chat;
mod embedding;
mod events;
mod generate;
#[cfg(feature = "grammar")]
mod grammar;
#[cfg(not(feature = "grammar"))]
#[path = "grammar_off.rs"]
mod grammar;
mod pairs;
mod rotations;
pub mod sampler;
mod snapshot;
mod tick;
pub mod tokenizer;
mod vocabulary;

pub use batch::Batch;
pub use events::Event;
pub use generate::{ContextShift, GenerateOptions, Generation, Grammar, StopReason};
pub use tick::{Phase, Tick, TickBudget};

use answer::Answer;
use embedding::Embedding;
use events::Events;
use rotations::Rotations;
use tick::{Todo, UnderWay, no_runner};

/// Context of a session that does not ask for one: enough for a conversation, small enough for any device.
const DEFAULT_CONTEXT: u32 = 4096;
/// Most logits rows of one step; all-position logits are computed in chunks of this many tokens.
const MAX_LOGITS_ROWS: u32 = 32;

/// Stops a running prefill or generation from another thread; clones share the flag.
#[derive(Debug, Clone, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// Asks for the stop; it happens before the next chunk or token.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Makes the token usable again.
    pub fn reset(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    /// Whether a stop was asked for.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn check(&self) -> Result<()> {
        match self.is_cancelled() {
            false => Ok(()),
            true => Err(Error::new(ErrorKind::Cancelled, "cancelled by the caller")),
        }
    }
}

/// Capacities of a session, fixed when it is made.
#[derive(Debug, Clone, Default)]
pub struct SessionOptions {
    /// Tokens the KV cache holds; `None` takes the model's length, at most 4096.
    pub context: Option<u32>,
    /// Element type of the KV cache; `None` lets the backend choose.
    pub kv_type: Option<KvType>,
    /// CPU threads, the caller's included; `None` takes the engine's. [`crate::backend::cpu::performance_cores`] are
    /// as many as help.
    pub threads: Option<usize>,
    /// Most prompt tokens computed at a time.
    pub chunk: Option<u32>,
    /// The same build, device, session options and request give the same tokens, whatever the budgets of the ticks are,
    /// whatever the session did before, and also across the loss of a device that comes back. Prompts are computed in
    /// chunks that end at multiples of `chunk`, and only whole ones are reused: a little slower where a budget would
    /// have liked another size.
    pub deterministic: bool,
    /// On the CPU: multiply in f32, with weights as their formats define them. Otherwise, where 4-bit weights have
    /// groups of 32 or its multiples, activations are rounded to 16 bits, and a half-precision output layer of 8 MiB or
    /// more beside such weights to 8, once for all sessions; both are faster. GPUs ignore it.
    pub exact: bool,
    /// Have forks keep their common start once on wgpu even if the session is deterministic and the device has matrix
    /// units or subgroups, whose kernels for attention read one cache only: others compute attention, slower. Forks of
    /// sessions that are not deterministic share in any case, and so do all on CUDA and the CPU; deterministic ones on wgpu
    /// in models with windows copy in any.
    pub share_forks: bool,
}

impl SessionOptions {
    /// What they mean for a model of this configuration.
    pub(crate) fn runner_config(&self, model: &ModelConfig, engine: &Engine) -> Result<RunnerConfig> {
        let trained = u32::try_from(model.positions()).unwrap_or(u32::MAX);
        let context = self.context.unwrap_or(trained.min(DEFAULT_CONTEXT));
        let chunk = self.chunk.unwrap_or(engine.default_chunk()).min(context);
        let threads = self.threads.or(engine.options().threads);
        for (name, value) in [("context", context), ("chunk", chunk), ("threads", threads.unwrap_or(1) as u32)] {
            if value == 0 {
                return Err(Error::new(ErrorKind::InvalidInput, format!("`{name}` is 0")));
            }
        }
        Ok(RunnerConfig {
            max_tokens: chunk,
            max_logits_rows: chunk.min(MAX_LOGITS_ROWS),
            context,
            kv_type: self.kv_type,
            threads,
            jobs: engine.options().jobs.clone(),
            exact: self.exact,
            share_forks: self.share_forks,
        })
    }
}

/// One conversation with a model: its KV cache and everything a step needs. Sessions on one model are independent.
pub struct Session {
    model: Arc<Model>,
    config: RunnerConfig,
    deterministic: bool,
    /// Where it computes; `None` after that was lost.
    place: Option<Place>,
    is_lost: bool,
    /// Tokens whose keys and values are in the cache.
    tokens: Vec<u32>,
    /// Whether the last step left logits of the last token.
    has_logits: bool,
    /// Leading tokens that were computed in chunks, the others one at a time.
    chunked: usize,
    /// Leading tokens that were computed in whole chunks from the start.
    grid: usize,
    rotations: Rotations,
    todo: Todo,
    under_way: UnderWay,
    answer: Option<Answer>,
    /// The last answer that ended.
    finished: Option<Answer>,
    embedding: Option<Embedding>,
    /// The last embedding that was completed.
    embedded: Vec<f32>,
    events: Events,
    /// Requests to trim that were heeded.
    trims_seen: u64,
    logits: Vec<f32>,
}

/// A runner, and the weights it computes with.
struct Place {
    runner: Box<dyn Runner>,
    backend: Arc<dyn Backend>,
    #[expect(dead_code, reason = "held as long as the runner")]
    lease: Lease,
    /// For the positions that the runner shares, by their id: all who do hold it.
    shared: Option<(usize, Arc<Lease>)>,
    /// The same for those that forks of this one share.
    lent: Option<(usize, Weak<Lease>)>,
}

impl Place {
    /// A runner within the engine's memory budget.
    fn new(model: &Model, backend: Arc<dyn Backend>, config: &RunnerConfig) -> Result<Self> {
        let most = memory(&*backend, backend.runner_bytes(model.program(), config));
        let mut lease = model.engine().ledger().lease("a session", most)?;
        let runner = Arc::clone(&backend).runner(model.program(), config)?;
        lease.resize("a session", memory(&*backend, runner.bytes()))?;
        Ok(Self { runner, backend, lease, shared: None, lent: None })
    }

    /// As this one with its first `n` positions, within the memory budget.
    fn fork(&mut self, model: &Model, n: u32, sharing: Sharing) -> Result<Self> {
        let ledger = model.engine().ledger();
        let most = memory(&*self.backend, self.runner.fork_bytes(n, sharing));
        let mut lease = ledger.lease("a session", most)?;
        let runner = self.runner.fork(n, sharing)?;
        lease.resize("a session", memory(&*self.backend, runner.bytes()))?;
        let mut shared = None;
        if let Some(part) = runner.shared() {
            let mine = self.shared.clone().filter(|(id, _)| *id == part.id).map(|(_, lease)| lease);
            let lent = || self.lent.as_ref().filter(|(id, _)| *id == part.id).and_then(|(_, lease)| lease.upgrade());
            let bytes = memory(&*self.backend, part.bytes);
            let held = match mine.or_else(lent) {
                Some(held) => held,
                None => Arc::new(ledger.lease("the shared start of sessions", bytes)?),
            };
            self.lent = Some((part.id, Arc::downgrade(&held)));
            shared = Some((part.id, held));
        }
        Ok(Self { runner, backend: self.backend.clone(), lease, shared, lent: None })
    }

    /// Makes a step at `position` possible: what it would overwrite for others is copied before.
    fn own(&mut self, model: &Model, position: u32) -> Result<()> {
        if self.runner.shared().is_some_and(|shared| position < shared.positions) {
            *self = self.fork(model, position, Sharing::Never)?;
        }
        Ok(())
    }
}

/// `bytes` where `backend` has them.
fn memory(backend: &dyn Backend, bytes: u64) -> Bytes {
    match backend.is_host() {
        true => Bytes { host: bytes, device: 0 },
        false => Bytes { host: 0, device: bytes },
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("tokens", &self.tokens.len())
            .field("context", &self.config.context)
            .finish_non_exhaustive()
    }
}

impl Session {
    /// A session with an empty cache.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a zero capacity, [`ErrorKind::OutOfMemory`] naming the needed bytes if the
    /// context doesn't fit, [`ErrorKind::Evicted`] if the weights are away, or a device error.
    pub fn new(model: &Arc<Model>, options: &SessionOptions) -> Result<Self> {
        let config = options.runner_config(model.config(), model.engine())?;
        let backend = model.backend()?.ok_or_else(|| Error::new(ErrorKind::Evicted, "the weights are on their way"))?;
        let place = Place::new(model, backend, &config)?;
        Ok(Self {
            place: Some(place),
            is_lost: false,
            tokens: Vec::with_capacity(config.context as usize),
            has_logits: false,
            chunked: 0,
            grid: 0,
            rotations: Rotations::default(),
            todo: Todo::default(),
            under_way: UnderWay::default(),
            answer: None,
            finished: None,
            embedding: None,
            embedded: Vec::new(),
            events: Events::default(),
            trims_seen: model.engine().trims(),
            logits: Vec::new(),
            model: Arc::clone(model),
            deterministic: options.deterministic,
            config,
        })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Tokens in the KV cache.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Most tokens the KV cache holds.
    pub fn context(&self) -> u32 {
        self.config.context
    }

    /// Element type of the KV cache.
    pub fn kv_type(&self) -> KvType {
        match &self.place {
            Some(place) => place.runner.kv_type(),
            None => self.config.kv_type.unwrap_or(KvType::F16),
        }
    }

    /// Bytes held for this session alone on the device.
    pub fn bytes(&self) -> u64 {
        self.place.as_ref().map_or(0, |place| place.runner.bytes())
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.truncate(0);
    }

    /// Forgets all but the first `n` tokens; the logits are gone with them, and so is an answer in the making.
    pub fn truncate(&mut self, n: usize) {
        self.drop_answer();
        self.cut(n);
        // What a lost device has to compute again.
        self.todo.ids.truncate(self.todo.next + n.saturating_sub(self.tokens.len()));
    }

    fn cut(&mut self, n: usize) {
        if n < self.tokens.len() {
            self.tokens.truncate(n);
            self.has_logits = false;
            self.chunked = self.chunked.min(n);
            self.grid = self.grid.min(n);
        }
    }

    /// Makes the cache hold exactly `ids`, with the logits of the last one ready, and returns how many leading tokens
    /// were reused. Between chunks `cancel` is looked at; a cancelled or failed call keeps the chunks it finished.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for no ids, ids outside the vocabulary or while an answer is being made,
    /// [`ErrorKind::ContextFull`], [`ErrorKind::Cancelled`], or a device error.
    pub fn set_prompt(&mut self, ids: &[u32], cancel: &CancelToken) -> Result<usize> {
        self.require_idle()?;
        self.check_ids(ids, 0)?;
        let reused = self.plan_prompt(ids);
        self.compute_all(cancel)?;
        Ok(reused)
    }

    /// Adds `ids` to the cache, with the logits of the last one ready.
    ///
    /// # Errors
    /// As [`Self::set_prompt`].
    pub fn append(&mut self, ids: &[u32], cancel: &CancelToken) -> Result<()> {
        self.require_idle()?;
        // What a lost device took comes first.
        self.check_ids(ids, self.tokens.len() + self.todo.left())?;
        self.compute_all(cancel)?;
        self.plan_more(ids);
        self.chunked = self.tokens.len() + self.todo.left();
        self.todo.single_from = self.chunked;
        self.compute_all(cancel)
    }

    /// Puts what the cache lacks of `prompt` to `todo` and cuts off what is not in it; returns how many tokens stay.
    fn plan_prompt(&mut self, prompt: &[u32]) -> usize {
        self.todo.clear();
        let common = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let same = common == prompt.len() && common == self.tokens.len() && self.has_logits;
        if same && (!self.deterministic || common <= self.chunked) {
            return common;
        }
        // The last token is always computed, for its logits. Keys that were rotated for another length are not reused.
        let most = self.config.max_tokens as usize;
        let reused = match common.min(prompt.len() - 1) {
            _ if !self.model.config().same_rope_rows(self.rotations.length, prompt.len()) => 0,
            reused if self.deterministic => reused.min(self.grid) / most * most,
            reused => reused,
        };
        self.cut(reused);
        self.has_logits = false;
        self.todo.ids.extend_from_slice(&prompt[reused..]);
        self.chunked = prompt.len();
        self.todo.single_from = prompt.len();
        reused
    }

    /// Puts `ids` to `todo`, to be computed behind the cache; with everything in the cache before them, if its keys were
    /// rotated for a shorter sequence.
    fn plan_more(&mut self, ids: &[u32]) {
        self.todo.clear();
        let length = self.tokens.len() + ids.len();
        if !self.tokens.is_empty() && self.model.config().keys_change(self.rotations.length, length) {
            self.todo.ids.extend_from_slice(&self.tokens);
            self.cut(0);
        }
        self.todo.ids.extend_from_slice(ids);
    }

    /// Logits of the last token, (vocab_size).
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if nothing was computed since the cache was changed, or a device error.
    pub fn logits(&mut self) -> Result<&[f32]> {
        self.require_idle()?;
        let place =
            self.place.as_mut().filter(|_| self.has_logits).ok_or_else(|| {
                Error::new(ErrorKind::InvalidInput, "no token was computed since the cache was changed")
            })?;
        place.runner.read_logits(&mut self.logits)?;
        Ok(&self.logits)
    }

    /// Hands the logits of every position of `ids`, from an empty cache, to `visit` as (position, logits).
    ///
    /// # Errors
    /// As [`Self::set_prompt`].
    pub fn score(&mut self, ids: &[u32], cancel: &CancelToken, visit: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        self.require_idle()?;
        self.check_ids(ids, 0)?;
        self.reset();
        self.todo.clear();
        while !self.attach(&Budget::UNLIMITED)? {
            self.wait()?;
        }
        self.own(0)?;
        let vocab = self.model.config().vocab_size;
        for tokens in ids.chunks(self.config.max_logits_rows as usize) {
            cancel.check()?;
            let first = self.tokens.len();
            self.has_logits = false;
            self.write_rope(tokens.len(), ids.len())?;
            let Some(place) = &mut self.place else { break };
            place.runner.run(&Step { tokens, position: first as u32, logits: LogitsRows::All })?;
            place.runner.read_logits(&mut self.logits)?;
            self.logits.chunks_exact(vocab).enumerate().for_each(|(i, row)| visit(first + i, row));
            self.tokens.extend_from_slice(tokens);
            self.chunked = self.tokens.len();
        }
        self.has_logits = true;
        Ok(())
    }

    /// As [`Place::own`].
    fn own(&mut self, position: usize) -> Result<()> {
        self.place.as_mut().map_or(Ok(()), |place| place.own(&self.model, position as u32))
    }

    /// Most tokens that one step computes.
    pub fn chunk(&self) -> u32 {
        self.config.max_tokens
    }

    /// Device time of every operation of a step over `ids` at the end of the cache, which stays as it is.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the device can not tell, [`ErrorKind::InvalidInput`] for no ids, too many for
    /// one step or ids outside the vocabulary, [`ErrorKind::ContextFull`], or a device error.
    pub fn profile(&mut self, ids: &[u32]) -> Result<Vec<OpTime>> {
        let position = self.tokens.len() as u32;
        self.begin_profile(ids)?.profile(&Step { tokens: ids, position, logits: LogitsRows::Last })
    }

    /// The runner, ready for a step over `ids` at the end of the cache that is only timed.
    ///
    /// # Errors
    /// As [`Self::profile`].
    fn begin_profile(&mut self, ids: &[u32]) -> Result<&mut dyn Runner> {
        self.require_idle()?;
        self.check_ids(ids, self.tokens.len())?;
        self.has_logits = false;
        self.own(self.tokens.len())?;
        self.write_rope(ids.len(), self.tokens.len() + ids.len())?;
        match &mut self.place {
            Some(place) => Ok(&mut *place.runner),
            None => Err(Error::new(ErrorKind::Evicted, "the session is not on a device")),
        }
    }

    /// Joins a pass that is timed with the token `id`, see [`Batch::profile`].
    ///
    /// # Errors
    /// As [`Batch::profile`].
    fn join_profile(&mut self, group: &mut dyn Group, id: u32) -> Result<()> {
        let position = self.tokens.len() as u32;
        let runner = self.begin_profile(&[id])?;
        if !group.takes(runner) {
            return Err(Error::new(ErrorKind::Unsupported, "the session takes part in no passes of this batch"));
        }
        group.join(runner, &Next::Token(id), position).map(drop)
    }

    /// Sees to the rotations of `n` tokens at the end of the cache of a sequence of `length` tokens.
    fn write_rope(&mut self, n: usize, length: usize) -> Result<()> {
        let first = self.tokens.len();
        match &mut self.place {
            Some(place) => {
                let context = self.config.context as usize;
                self.rotations.write(self.model.config(), &mut *place.runner, first..first + n, length, context)
            }
            None => Ok(()),
        }
    }

    /// Whether an answer or an embedding is being made.
    pub fn is_busy(&self) -> bool {
        self.answer.is_some() || self.embedding.is_some()
    }

    fn require_idle(&self) -> Result<()> {
        match self.is_busy() {
            false => Ok(()),
            true => Err(Error::new(ErrorKind::InvalidInput, "an answer is being made")),
        }
    }

    fn check_ids(&self, ids: &[u32], before: usize) -> Result<()> {
        if ids.is_empty() {
            return Err(Error::new(ErrorKind::InvalidInput, "the prompt has no tokens"));
        }
        let vocab = self.model.config().vocab_size;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            let message = format!("token id {id} is not below the vocabulary size {vocab}");
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let context = self.config.context as usize;
        if before + ids.len() > context {
            let message = format!("{} tokens do not fit the context of {context} tokens", before + ids.len());
            return Err(Error::new(ErrorKind::ContextFull, message));
        }
        Ok(())
    }
}
