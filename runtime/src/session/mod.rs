//! What the user says and hears: tokens, prompts, sampling, text.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::backend::{Backend, KvType, LogitsRows, OpTime, Runner, RunnerConfig, Step};
use crate::engine::{Bytes, Engine, Lease};
use crate::error::{Error, ErrorKind, Result};
use crate::model::{Model, ModelConfig};

pub mod chat;
mod generate;
pub mod sampler;
pub mod tokenizer;

pub use generate::{ContextShift, GenerateOptions, Generation, StopReason};

/// Context of a session that does not ask for one: enough for a conversation, small enough for any device.
const DEFAULT_CONTEXT: u32 = 4096;
/// Prompt tokens computed at a time unless asked otherwise.
const DEFAULT_CHUNK: u32 = 256;
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
    /// CPU threads, the caller's included; `None` lets the backend choose.
    pub threads: Option<usize>,
    /// Prompt tokens computed at a time.
    pub chunk: Option<u32>,
    /// On the CPU: multiply 4-bit weights in f32, as their formats define it. Otherwise activations are rounded to 8 bits
    /// with a scale for every 4 of them, which is several times faster and changes logits by less than the rounding of
    /// the weights did. GPUs ignore it.
    pub exact: bool,
}

impl SessionOptions {
    /// What they mean for a model of this configuration.
    pub(crate) fn runner_config(&self, model: &ModelConfig, engine: &Engine) -> Result<RunnerConfig> {
        let trained = u32::try_from(model.positions()).unwrap_or(u32::MAX);
        let context = self.context.unwrap_or(trained.min(DEFAULT_CONTEXT));
        let chunk = self.chunk.unwrap_or(DEFAULT_CHUNK).min(context);
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
        })
    }
}

/// A runner within the engine's memory budget.
fn new_runner(model: &Model, backend: Arc<dyn Backend>, config: &RunnerConfig) -> Result<(Box<dyn Runner>, Lease)> {
    let host = backend.is_host();
    let memory = |bytes| if host { Bytes { host: bytes, device: 0 } } else { Bytes { host: 0, device: bytes } };
    let most = backend.runner_bytes(model.program(), config);
    let mut lease = model.engine().ledger().lease("a session", memory(most))?;
    let runner = backend.runner(model.program(), config)?;
    lease.resize("a session", memory(runner.bytes()))?;
    Ok((runner, lease))
}

/// One conversation with a model: its KV cache and everything a step needs. Sessions on one model are independent.
pub struct Session {
    model: Arc<Model>,
    runner: Box<dyn Runner>,
    #[expect(dead_code, reason = "held as long as the runner")]
    lease: Lease,
    /// Tokens whose keys and values are in the cache.
    tokens: Vec<u32>,
    /// Whether the last run left logits of the last token.
    has_logits: bool,
    /// Rows of the rotary tables written so far, and the length of the sequence they are for.
    rope_rows: usize,
    rope_length: usize,
    context: u32,
    chunk: usize,
    logits: Vec<f32>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("tokens", &self.tokens.len())
            .field("context", &self.context)
            .finish_non_exhaustive()
    }
}

impl Session {
    /// A session with an empty cache.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a zero capacity, [`ErrorKind::OutOfMemory`] naming the needed bytes if the
    /// context doesn't fit, or a device error.
    pub fn new(model: &Arc<Model>, options: &SessionOptions) -> Result<Self> {
        let config = options.runner_config(model.config(), model.engine())?;
        let (context, chunk) = (config.context, config.max_tokens);
        let backend = model.backend()?.ok_or_else(|| Error::new(ErrorKind::Evicted, "the weights are on their way"))?;
        let (runner, lease) = new_runner(model, backend, &config)?;
        Ok(Self {
            model: Arc::clone(model),
            runner,
            lease,
            tokens: Vec::new(),
            has_logits: false,
            rope_rows: 0,
            rope_length: 0,
            context,
            chunk: chunk as usize,
            logits: Vec::new(),
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
        self.context
    }

    /// Element type of the KV cache.
    pub fn kv_type(&self) -> KvType {
        self.runner.kv_type()
    }

    /// Bytes held for this session on the device.
    pub fn bytes(&self) -> u64 {
        self.runner.bytes()
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.truncate(0);
    }

    /// Forgets all but the first `n` tokens; the logits are gone with them.
    pub fn truncate(&mut self, n: usize) {
        if n < self.tokens.len() {
            self.tokens.truncate(n);
            self.has_logits = false;
        }
    }

    /// Makes the cache hold exactly `ids`, with the logits of the last one ready, and returns how many leading tokens
    /// were reused. Between chunks `cancel` is looked at; a cancelled or failed call keeps the chunks it finished.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for no ids or ids outside the vocabulary, [`ErrorKind::ContextFull`],
    /// [`ErrorKind::Cancelled`], or a device error.
    pub fn set_prompt(&mut self, ids: &[u32], cancel: &CancelToken) -> Result<usize> {
        self.check_ids(ids, 0)?;
        let common = self.tokens.iter().zip(ids).take_while(|(a, b)| a == b).count();
        if common == ids.len() && self.tokens.len() == ids.len() && self.has_logits {
            return Ok(common);
        }
        // The last token is always computed, for its logits. Keys that were rotated for another length are not reused.
        let same = self.model.config().same_rope_rows(self.rope_length, ids.len());
        let reused = if same { common.min(ids.len() - 1) } else { 0 };
        self.truncate(reused);
        self.append(&ids[reused..], cancel)?;
        Ok(reused)
    }

    /// Adds `ids` to the cache, with the logits of the last one ready.
    ///
    /// # Errors
    /// As [`Self::set_prompt`].
    pub fn append(&mut self, ids: &[u32], cancel: &CancelToken) -> Result<()> {
        self.check_ids(ids, self.tokens.len())?;
        let length = self.tokens.len() + ids.len();
        if !self.tokens.is_empty() && self.model.config().keys_change(self.rope_length, length) {
            let all = [&self.tokens[..], ids].concat();
            self.truncate(0);
            return self.append(&all, cancel);
        }
        let chunks = ids.len().div_ceil(self.chunk);
        for (i, chunk) in ids.chunks(self.chunk).enumerate() {
            cancel.check()?;
            let rows = if i + 1 == chunks { LogitsRows::Last } else { LogitsRows::None };
            self.step(chunk, length, rows)?;
        }
        Ok(())
    }

    /// Logits of the last token, (vocab_size).
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if nothing was computed since the cache was changed, or a device error.
    pub fn logits(&mut self) -> Result<&[f32]> {
        self.require_logits()?;
        self.runner.read_logits(&mut self.logits)?;
        Ok(&self.logits)
    }

    /// Hands the logits of every position of `ids`, from an empty cache, to `visit` as (position, logits).
    ///
    /// # Errors
    /// As [`Self::set_prompt`].
    pub fn score(&mut self, ids: &[u32], cancel: &CancelToken, visit: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        self.check_ids(ids, 0)?;
        self.reset();
        let vocab = self.model.config().vocab_size;
        for chunk in ids.chunks(self.chunk.min(MAX_LOGITS_ROWS as usize)) {
            cancel.check()?;
            let first = self.tokens.len();
            self.step(chunk, ids.len(), LogitsRows::All)?;
            self.runner.read_logits(&mut self.logits)?;
            for (i, row) in self.logits.chunks_exact(vocab).enumerate() {
                visit(first + i, row);
            }
        }
        Ok(())
    }

    /// Device time of every operation of a step over `ids` at the end of the cache, which stays as it is.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the device can not tell, [`ErrorKind::InvalidInput`] for no ids, too many for
    /// one step or ids outside the vocabulary, [`ErrorKind::ContextFull`], or a device error.
    pub fn profile(&mut self, ids: &[u32]) -> Result<Vec<OpTime>> {
        self.check_ids(ids, self.tokens.len())?;
        self.has_logits = false;
        self.write_rope(ids.len(), self.tokens.len() + ids.len())?;
        self.runner.profile(&Step { tokens: ids, position: self.tokens.len() as u32, logits: LogitsRows::Last })
    }

    /// Runs one step at the end of the cache; `length` is the length of the sequence it belongs to.
    fn step(&mut self, tokens: &[u32], length: usize, logits: LogitsRows) -> Result<()> {
        self.has_logits = false;
        self.write_rope(tokens.len(), length)?;
        let position = self.tokens.len() as u32;
        self.runner.run(&Step { tokens, position, logits })?;
        self.tokens.extend_from_slice(tokens);
        self.has_logits = logits != LogitsRows::None;
        Ok(())
    }

    fn write_rope(&mut self, n: usize, length: usize) -> Result<()> {
        let model = Arc::clone(&self.model);
        let config = model.config();
        let first = self.tokens.len();
        let changed = !config.same_rope_rows(self.rope_length, length);
        if changed {
            self.rope_rows = first;
        }
        self.rope_length = length;
        if self.rope_rows < first + n {
            // Blocks, so that the decode loop writes once in a while and not for every token, unless rows change with it.
            const BLOCK: usize = 256;
            let block = if changed { 1 } else { BLOCK };
            let end = (first + n).next_multiple_of(block).min(self.context as usize);
            for (table, rope) in config.ropes.iter().enumerate() {
                let rows = rope.rows(self.rope_rows, end - self.rope_rows, length);
                self.runner.write_rope(table as u32, self.rope_rows as u32, &rows)?;
            }
            self.rope_rows = end;
        }
        Ok(())
    }

    fn require_logits(&self) -> Result<()> {
        match self.has_logits {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::InvalidInput, "no token was computed since the cache was changed")),
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
        if before + ids.len() > self.context as usize {
            let message = format!("{} tokens do not fit the context of {} tokens", before + ids.len(), self.context);
            return Err(Error::new(ErrorKind::ContextFull, message));
        }
        Ok(())
    }
}
