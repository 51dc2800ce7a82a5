//! Who computes it: the program of semantic operations and the two traits a backend implements.
//!
//! A [`Program`] is built once per model by [`crate::model`] and names *what* is computed over numbered buffers;
//! token count and position belong to a [`Step`]. A [`Backend`] owns the weights of one loaded model and is shared;
//! a [`Runner`] owns the activations and the KV cache of one session. A new operation is a new [`Op`] variant: the
//! exhaustive matches of the backends then point at every place that has to learn it.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::quant::awq::StoredGemm;
use crate::session::sampler::SampleRequest;
use crate::tensor::{Weight, WeightShape};

pub use crate::quant::ROW_STEP;
pub use crate::quant::awq::INPUT_STEP;

pub use group::{Group, Members, Next};
pub use kv::{KvType, Q8_GROUP, kv_bytes};
pub use products::{Products, Resident, RoundingGrid};

use kv::check_kv;

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod forks;
mod group;
mod kv;
mod products;
#[cfg(feature = "wgpu")]
pub mod wgpu;

/// A weight that a backend holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WeightId(pub u32);

/// An activation buffer of a program: index into [`Program::buffers`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BufferId(pub u32);

/// Columns of an activation buffer, from `offset` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The buffer.
    pub buffer: BufferId,
    /// First column, in elements.
    pub offset: u32,
}

impl From<BufferId> for Span {
    fn from(buffer: BufferId) -> Self {
        Self { buffer, offset: 0 }
    }
}

/// Which token rows of the step an operation works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// Every token of the step.
    All,
    /// Input rows of the tokens that produce logits ([`Step::logits`]), written to output rows 0, 1, ...;
    /// nothing when the step wants no logits.
    Logits,
    /// As `Logits`, but the input is already compacted to rows 0, 1, ...
    Compacted,
}

/// What a norm divides by, see [`Op::Norm`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// The root of the mean of squares.
    Rms,
    /// The standard deviation, after the mean is subtracted.
    Layer,
}

/// The function on the gate of a gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// v / (1 + exp(-v))
    Silu,
    /// GELU by its tanh formula: v / 2 * (1 + tanh(sqrt(2 / pi) * (v + 0.044715 * v^3)))
    GeluTanh,
    /// GELU by the error function: v / 2 * (1 + erf(v / sqrt(2)))
    Gelu,
}

/// One semantic operation. Activations are f32, row-major, one row a token.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    /// `out[t, :] = table[token[t], :] * scale`
    Embed {
        /// Dense or packed (vocab_size, width).
        table: WeightId,
        /// (n_tokens, width).
        out: BufferId,
        /// Factor on the rows of the table, 1 for most models.
        scale: f32,
    },
    /// Each of `segments` consecutive runs of `dim` columns: out = (x - m) / sqrt(mean((x - m)^2) + eps) * weight + bias
    /// with m the mean of x for [`NormKind::Layer`] and 0 for [`NormKind::Rms`]; added to what is there if `accumulate`.
    /// `x` and `out` may be the same span (in place) unless `accumulate`.
    Norm {
        /// What is divided by.
        kind: NormKind,
        /// First column of the first segment.
        x: Span,
        /// Vector (dim), or (segments * dim) where every segment has weights of its own.
        weight: WeightId,
        /// Vector (dim), with one segment only.
        bias: Option<WeightId>,
        /// First column of the first segment.
        out: Span,
        /// Columns of one segment.
        dim: u32,
        /// Segments a row: 1, or the number of heads for a per-head norm.
        segments: u32,
        /// Added to the mean of squares.
        eps: f32,
        /// Add to the output (residual connection) instead of overwriting it.
        accumulate: bool,
        /// Rows worked on.
        rows: Rows,
    },
    /// `out[t, offset..offset + N] = W x[t, :] + bias`, added to what is there if `accumulate`.
    Linear {
        /// (n_tokens, K), the whole row is the input.
        x: BufferId,
        /// Dense or packed (N, K).
        weight: WeightId,
        /// Vector (N).
        bias: Option<WeightId>,
        /// Where the N columns go.
        out: Span,
        /// Add to the output (residual connection) instead of overwriting it.
        accumulate: bool,
        /// Rows worked on.
        rows: Rows,
    },
    /// `out[t, i] = x[t, order[i]] * factors[i]`: the inputs of a matrix whose columns are stored in another order or for
    /// scaled inputs. Rows as in the linear layer that follows.
    Arrange {
        /// (n_tokens, width).
        x: BufferId,
        /// Order (width); `None` keeps it.
        order: Option<WeightId>,
        /// Vector (width); `None` for ones.
        factors: Option<WeightId>,
        /// (n_tokens, width).
        out: BufferId,
        /// Rows worked on.
        rows: Rows,
    },
    /// Rotates q in place, and writes rotated k and plain v of the step's tokens to the KV cache of `layer` at the
    /// step's positions. Pairs are (i, i + rotary_dim / 2) of each head, the half-split form of Hugging Face models.
    /// Row of `qkv`: heads * head_dim of q, kv_heads * head_dim of k, the same of v.
    RopeAppend {
        /// (n_tokens, (heads + 2 * kv_heads) * head_dim).
        qkv: BufferId,
        /// Layer of the KV cache.
        layer: u32,
        /// Rotary table ([`Runner::write_rope`]); `None` leaves q and k unrotated.
        rope: Option<u32>,
    },
    /// `out[t, h, :] = sum_j softmax_j(s(q[t, h] . k[j, h / (heads / kv_heads)])) v[j]`, over the cached positions
    /// j <= position of t, and j > position - window where a window is given; s(d) = scale * d, or
    /// softcap * tanh(scale * d / softcap) where scores are capped.
    Attention {
        /// As in `RopeAppend`; only q is read, keys and values come from the cache.
        qkv: BufferId,
        /// (n_tokens, heads * head_dim).
        out: BufferId,
        /// Layer of the KV cache.
        layer: u32,
        /// Factor on the dot products, usually 1 / sqrt(head_dim).
        scale: f32,
        /// Bound of the scores.
        softcap: Option<f32>,
        /// Sliding window in tokens, the token itself included.
        window: Option<u32>,
    },
    /// `out[t, i] = activation(x[t, i]) * x[t, width + i]`, for every row of a token.
    Glu {
        /// (n_tokens, 2 * width): gate, then up.
        x: BufferId,
        /// (n_tokens, width).
        out: BufferId,
        /// The function on the gate.
        activation: Activation,
    },
    /// `x[t, i] = scale * x[t, i]`, or `cap * tanh(scale * x[t, i] / cap)` where a cap is given, in place.
    Scale {
        /// The whole rows.
        x: BufferId,
        /// Factor.
        scale: f32,
        /// Bound of the magnitude.
        cap: Option<f32>,
        /// Rows worked on; [`Rows::All`] or [`Rows::Compacted`].
        rows: Rows,
    },
    /// Chooses for every token the `top_k` experts of the largest logits, the first of equal ones, in descending order.
    /// Their weights are the softmax over all logits, divided by the sum of the chosen ones if `renormalise`.
    Route {
        /// (n_tokens, experts).
        logits: BufferId,
        /// (n_tokens, 2 * top_k): the weights, then the numbers of the experts.
        routes: BufferId,
        /// Experts a token.
        top_k: u32,
        /// Whether weights are made to add up to 1.
        renormalise: bool,
    },
    /// `out[t, i, offset..offset + N] = W[expert of (t, i)] x[t]`, or `x[t, i]` where x has rows for every expert of a
    /// token. Every expert's matrix is read once, and only if a token goes through it.
    Experts {
        /// (n_tokens, K) or (n_tokens, top_k, K).
        x: BufferId,
        /// The first of `count` matrices (N, K), with ids that follow each other ([`Backend::reserve_in_stack`]).
        weight: WeightId,
        /// Experts.
        count: u32,
        /// As in `Route`.
        routes: BufferId,
        /// (n_tokens, top_k, width).
        out: Span,
    },
    /// `out[t, :] += sum_i weight of (t, i) * x[t, i, :]`
    Combine {
        /// (n_tokens, top_k, width).
        x: BufferId,
        /// As in `Route`.
        routes: BufferId,
        /// (n_tokens, width).
        out: BufferId,
    },
    /// `x[t, :] = x[t, :] / (1 + exp(-gate[t, 0]))`, in place.
    Gate {
        /// (n_tokens, width).
        x: BufferId,
        /// (n_tokens, 1).
        gate: BufferId,
    },
}

/// An activation buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BufferDesc {
    /// Name for messages and profiles.
    pub name: &'static str,
    /// f32 elements a token row.
    pub width: u32,
    /// Whether the rows are logits rows ([`RunnerConfig::max_logits_rows`]) instead of token rows.
    pub logits_rows: bool,
    /// Rows of a token: 1, or the number of experts it goes through.
    pub per_token: u32,
}

impl BufferDesc {
    /// Most rows under `config`.
    pub(crate) fn rows(&self, config: &RunnerConfig) -> u32 {
        let rows = if self.logits_rows { config.max_logits_rows } else { config.max_tokens };
        rows.saturating_mul(self.per_token)
    }
}

/// Head geometry, the same in every layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: u32,
    /// Key/value heads; divides `heads`.
    pub kv_heads: u32,
    /// Elements of a head; even.
    pub head_dim: u32,
    /// Leading elements of a head that are rotated; even, at most `head_dim`.
    pub rotary_dim: u32,
}

/// What a model computes for one step.
#[derive(Debug, Clone, PartialEq)]
pub struct Program {
    /// Activation buffers; [`BufferId`] is the index.
    pub buffers: Vec<BufferDesc>,
    /// Operations in order.
    pub ops: Vec<Op>,
    /// Decoder layers, i.e. KV caches.
    pub layers: u32,
    /// Head geometry.
    pub attention: AttentionShape,
    /// Number of rotary tables.
    pub rope_tables: u32,
    /// Entries of the embedding table; token ids are below it.
    pub vocab_size: u32,
    /// Buffer of the logits, (logits rows, vocab_size).
    pub logits: BufferId,
}

impl Program {
    /// The buffer that the logits are computed from: hidden states after the final norm, (logits rows, hidden).
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the logits do not come from a linear layer.
    pub fn last_hidden(&self) -> Result<BufferId> {
        let last = self.ops.iter().rev().find_map(|op| match op {
            Op::Linear { x, out, .. } if out.buffer == self.logits => Some(*x),
            _ => None,
        });
        let last = last.ok_or_else(|| Error::new(ErrorKind::Unsupported, "the program computes no hidden states"))?;
        // The head may take its inputs in another order than that of the hidden states.
        let arranged = self.ops.iter().rev().find_map(|op| match op {
            Op::Arrange { x, out, .. } if *out == last => Some(*x),
            _ => None,
        });
        Ok(arranged.unwrap_or(last))
    }
}

/// Capacities of a [`Runner`], fixed when it is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunnerConfig {
    /// Most tokens of one step (prefill chunk).
    pub max_tokens: u32,
    /// Most logits rows of one step; at least 1.
    pub max_logits_rows: u32,
    /// Positions of the KV cache.
    pub context: u32,
    /// Element type of the KV cache; `None` lets the backend choose.
    pub kv_type: Option<KvType>,
    /// CPU threads, the caller's included; `None` makes none. GPU backends ignore it.
    pub threads: Option<usize>,
    /// The host's own threads, used instead of threads of ours. GPU backends ignore it.
    pub jobs: Option<Jobs>,
    /// Never round activations, see [`crate::SessionOptions::exact`]. GPU backends ignore it.
    pub exact: bool,
    /// Compute alike whether positions are shared or not, see [`crate::SessionOptions::share_forks`].
    pub share_forks: bool,
}

/// A host's `parallel_for`: runs tasks on threads that the host owns.
pub trait ParallelFor: Send + Sync {
    /// Threads that [`Self::run`] may call a task on at once, the caller's included; constant, at least 1.
    fn threads(&self) -> usize;

    /// Calls `task(index, worker)` once for every index below `tasks`, in any order and on any thread, and returns
    /// when all calls have returned. `worker` is below [`Self::threads`] and never used by two calls at once.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize, usize) + Sync));
}

/// A shared [`ParallelFor`].
#[derive(Clone)]
pub struct Jobs(pub Arc<dyn ParallelFor>);

impl std::fmt::Debug for Jobs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Jobs({} threads)", self.0.threads())
    }
}

impl PartialEq for Jobs {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Jobs {}

/// How much work one call may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// When the host's thread wants to be back. Looked at between pieces of well under a millisecond, of which every
    /// call does one.
    pub deadline: Option<Instant>,
    /// Estimated device time that may be queued, what is already queued included. A piece of work that is larger by
    /// itself is queued when the device is idle, so that every budget makes progress.
    pub device: Option<Duration>,
}

impl Budget {
    /// As much as there is.
    pub const UNLIMITED: Self = Self { deadline: None, device: None };

    /// Whether the host's time is over.
    pub fn is_over(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }
}

/// How far a step is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The host's part is complete: a token can be sampled, or the next step begun. The device may still be busy.
    Done,
    /// The host's time was over first.
    Working,
    /// The device has as much queued as the budget allows; it has to finish something first.
    Waiting,
}

/// Which tokens of a step get logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitsRows {
    /// None: a prefill chunk that is not the last.
    None,
    /// The last token only.
    Last,
    /// Every token of the step.
    All,
    /// Every token of the step gets its last hidden state, but no logits ([`Runner::read_hidden`]).
    Hidden,
}

impl LogitsRows {
    /// First token row and number of rows of a step of `n_tokens`.
    pub fn range(self, n_tokens: usize) -> std::ops::Range<usize> {
        match self {
            Self::None => 0..0,
            Self::Last => n_tokens.saturating_sub(1)..n_tokens,
            Self::All | Self::Hidden => 0..n_tokens,
        }
    }
}

/// One run of the program.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Token ids, 1 to `max_tokens`, each below `vocab_size` (checked by the session).
    pub tokens: &'a [u32],
    /// Position of the first token: the number of tokens already in the KV cache that stay valid.
    pub position: u32,
    /// Rows of logits to compute.
    pub logits: LogitsRows,
}

impl Step<'_> {
    /// Checks the step against the capacities of a runner.
    ///
    /// # Errors
    /// [`ErrorKind::ContextFull`] if it leaves the context, else [`ErrorKind::InvalidInput`].
    fn check(&self, program: &Program, config: &RunnerConfig) -> Result<()> {
        let invalid = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
        let n = self.tokens.len();
        if n == 0 || n > config.max_tokens as usize {
            return invalid(format!("a step takes 1 to {} tokens, got {n}", config.max_tokens));
        }
        if u64::from(self.position) + n as u64 > u64::from(config.context) {
            let message = format!("position {} plus {n} tokens leave the context of {}", self.position, config.context);
            return Err(Error::new(ErrorKind::ContextFull, message));
        }
        let rows = self.logits.range(n).len();
        if rows > config.max_logits_rows as usize {
            return invalid(format!("a step computes at most {} logits rows, got {rows}", config.max_logits_rows));
        }
        match self.tokens.iter().find(|&&id| id >= program.vocab_size) {
            Some(id) => invalid(format!("token id {id} is not below the vocabulary size {}", program.vocab_size)),
            None => Ok(()),
        }
    }
}

/// Device time of one operation of a step, the gap to the next one included.
#[derive(Debug, Clone, PartialEq)]
pub struct OpTime {
    /// What ran: the kernel and its variant, and the shape if it has one.
    pub name: String,
    /// Seconds on the device.
    pub seconds: f64,
    /// Bytes of device memory it moves at least.
    pub bytes: u64,
    /// Multiplications and additions it computes at least.
    pub flops: u64,
}

/// What a backend is and how it was configured.
#[derive(Debug, Clone)]
pub struct BackendInfo {
    /// `cpu`, `wgpu` or `cuda`.
    pub backend: &'static str,
    /// Adapter or processor name.
    pub device: String,
    /// Kernel variant in use and why, for people.
    pub variant: String,
    /// Element type of the KV cache unless a session asks for another.
    pub default_kv: KvType,
    /// Bytes of weights held so far on the device.
    pub weight_bytes: u64,
}

/// The weights of one loaded model on one device; shared by the sessions on it.
pub trait Backend: Any + Send + Sync {
    /// Name, device, variant and memory.
    fn info(&self) -> BackendInfo;

    /// Makes room for a weight, whose rows [`Self::fill`] brings; `name` is the tensor's, for messages. Ids count up
    /// from 0.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`], [`ErrorKind::Unsupported`] or a device error.
    fn reserve(&mut self, name: &str, shape: &WeightShape) -> Result<WeightId>;

    /// As [`Self::reserve`], for matrix `index` of `count` of the same form that [`Op::Experts`] chooses among; they are
    /// reserved one after the other.
    ///
    /// # Errors
    /// As [`Self::reserve`]; [`ErrorKind::Unsupported`] where the backend can not choose among matrices of this form.
    fn reserve_in_stack(&mut self, name: &str, shape: &WeightShape, index: usize, count: usize) -> Result<WeightId> {
        let _ = (index, count);
        self.reserve(name, shape)
    }

    /// Takes the next rows of the weight reserved last: all of them, or multiples of [`ROW_STEP`] but for the last ones. Does not wait
    /// for the device, see [`Self::upload_is_settled`].
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for rows of another form or too many of them, or a device error.
    fn fill(&mut self, id: WeightId, rows: Weight) -> Result<()>;

    /// Whether [`Self::fill_stored`] takes `stored` as the next rows of the weight reserved last.
    fn takes_stored(&self, id: WeightId, stored: &StoredGemm) -> bool {
        let _ = (id, stored);
        false
    }

    /// As [`Self::fill`], for a matrix that is not read yet, which the device brings to its own layout: inputs `inputs`
    /// of all its rows, those before them first, from a multiple of [`INPUT_STEP`] on. It counts as filled with the
    /// last of them.
    ///
    /// # Errors
    /// As [`Self::fill`], and those of reading the file.
    fn fill_stored(&mut self, id: WeightId, stored: &StoredGemm, inputs: Range<usize>) -> Result<()> {
        let _ = (stored, inputs);
        Err(Error::new(ErrorKind::InvalidInput, format!("weight {} does not take rows as they are stored", id.0)))
    }

    /// No more weights will come, and all that came are settled: gives back what only uploads need.
    fn end_of_weights(&mut self) {}

    /// Takes a whole weight, and waits for the device.
    ///
    /// # Errors
    /// As [`Self::reserve`] and [`Self::fill`].
    fn upload(&mut self, name: &str, weight: Weight) -> Result<WeightId> {
        let id = self.reserve(name, &weight.shape())?;
        self.fill(id, weight)?;
        while !self.upload_is_settled()? {
            self.wait()?;
        }
        Ok(id)
    }

    /// Bytes that a weight takes where it is computed with.
    fn weight_bytes(&self, shape: &WeightShape) -> u64;

    /// Whether weights are in host memory, and dense ones computed with where they are: a view of a file is best handed
    /// over whole then.
    fn is_host(&self) -> bool {
        false
    }

    /// Whether the device is gone.
    fn is_lost(&self) -> bool {
        false
    }

    /// Makes the per-session side: activations, KV cache, everything a step needs.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] or a device error; never a panic for large capacities.
    fn runner(self: Arc<Self>, program: &Arc<Program>, config: &RunnerConfig) -> Result<Box<dyn Runner>>;

    /// Bytes that a runner will take at most, in host memory on a host and else on the device.
    fn runner_bytes(&self, program: &Program, config: &RunnerConfig) -> u64;

    /// Makes what computes passes over single tokens of up to `max_tokens` runners of this kind, whose contexts are at
    /// most that of `config`; `None` where they have to be stepped one by one.
    ///
    /// # Errors
    /// As [`Self::runner`].
    fn group(self: Arc<Self>, program: &Arc<Program>, config: &RunnerConfig) -> Result<Option<Box<dyn Group>>> {
        let _ = (program, config);
        Ok(None)
    }

    /// Refuses programs with operations that the backend does not have, or over weights in forms that it does not have,
    /// before they are brought to it; `weights` are those of the program, by number.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`].
    fn check(&self, program: &Program, weights: &[WeightShape]) -> Result<()> {
        let _ = (program, weights);
        Ok(())
    }

    /// Compiles at most `most` of the kernels that runners of this kind will need, so that making one is quick; returns
    /// how many are left. A backend without compilation may prepare what else runners need, in parts.
    ///
    /// # Errors
    /// A device error.
    fn prepare(&self, program: &Program, config: &RunnerConfig, most: u32) -> Result<u32> {
        let _ = (program, config, most);
        Ok(0)
    }

    /// Whether the device has taken in what was uploaded, so that more can be handed over without piling up.
    ///
    /// # Errors
    /// A device error.
    fn upload_is_settled(&self) -> Result<bool> {
        Ok(true)
    }

    /// Blocks until the device finished something, so that a waiting call can go on; at once if nothing is queued.
    ///
    /// # Errors
    /// A device error.
    fn wait(&self) -> Result<()> {
        Ok(())
    }

    /// Gives the memory of the weights back at once. What computes with them fails with [`ErrorKind::Evicted`] from now
    /// on, until [`Runner::rebind`].
    fn evict(&self);
}

/// A place that models are loaded onto: a GPU, or the CPU.
pub trait Device: Send + Sync {
    /// A backend without weights on it.
    fn backend(&self) -> Box<dyn Backend>;

    /// Prompt tokens that a session computes at a time unless asked otherwise: enough to keep the device busy, for
    /// memory that it can spare.
    fn default_chunk(&self) -> u32 {
        DEFAULT_CHUNK
    }

    /// Whether it is gone; everything on it fails with [`ErrorKind::DeviceLost`] then.
    fn is_lost(&self) -> bool {
        false
    }

    /// Takes note that the device is gone, if somebody else heard of it first.
    fn note_loss(&self, reason: &str) {
        let _ = reason;
    }

    /// Loses the device on purpose, for tests.
    fn force_loss(&self) {}

    /// Compiled kernels for [`crate::EngineOptions::pipeline_cache`] of a later start on the same device and driver, if
    /// it gives them out.
    fn pipeline_cache(&self) -> Option<Vec<u8>> {
        None
    }
}

/// A device on its way, opened in pieces.
pub trait Opening: Send {
    /// Does pieces until the budget is over or the device has to be waited for; the device once it is ready.
    ///
    /// # Errors
    /// [`ErrorKind::NoDevice`] if there is none, [`ErrorKind::Device`] if its driver fails or computes wrongly.
    fn advance(&mut self, budget: &Budget) -> Result<Option<Arc<dyn Device>>>;

    /// Blocks until there is something to do again.
    ///
    /// # Errors
    /// A device error.
    fn wait(&mut self) -> Result<()>;
}

/// See [`Device::default_chunk`].
pub(crate) const DEFAULT_CHUNK: u32 = 256;

/// Most tokens chosen ahead of the host, see [`Runner::begin_ahead`]: one that is computed and one behind it, so that
/// the device never waits for the host.
pub const MAX_AHEAD: usize = 2;

/// The per-session side of a backend. Methods take the session's exclusive borrow; a failed call leaves the runner
/// usable (after [`ErrorKind::DeviceLost`] every further call fails the same way).
///
/// A step is resumable: [`Self::begin`] says what to compute and [`Self::advance`] does a bounded piece of it; none of
/// them waits for a device. The same holds for [`Self::begin_sample`] and [`Self::poll_sample`]. [`Self::run`] and
/// [`Self::sample`] do the same to the end. What is computed never depends on the budgets.
pub trait Runner: Any + Send {
    /// Writes rows `first..` of rotary table `table`: (rows, rotary_dim / 2, 2) of (cos, sin), one row a position.
    /// Does not wait for the device.
    fn write_rope(&mut self, table: u32, first: u32, rows: &[f32]) -> Result<()>;

    /// Takes the step to compute next, copying its tokens; an unfinished one is abandoned.
    fn begin(&mut self, step: &Step<'_>) -> Result<()>;

    /// Computes or queues a piece of the step; [`Progress::Done`] if there is none.
    fn advance(&mut self, budget: &Budget) -> Result<Progress>;

    /// Forgets the step and the choice under way. Positions of the KV cache from the step's own on are undefined; what
    /// the device has queued runs to its end and does no harm.
    fn abandon(&mut self);

    /// Takes the choice to make from the last logits row of the last step, copying the request.
    fn begin_sample(&mut self, request: &SampleRequest<'_>) -> Result<()>;

    /// The chosen token, or `None` while the device works on it.
    fn poll_sample(&mut self) -> Result<Option<u32>>;

    /// Blocks until the device finished something, so that a waiting call can go on; at once if nothing is queued.
    fn wait(&mut self) -> Result<()>;

    /// Tokens of a step at `position`, at most `wanted` and at least 1, whose largest indivisible piece should fit
    /// `device` time. By default all.
    fn chunk(&self, position: u32, wanted: usize, device: Duration) -> usize {
        let _ = (position, device);
        wanted
    }

    /// Estimated device time of what is queued and not finished by now.
    ///
    /// # Errors
    /// A device error.
    fn queued(&mut self) -> Result<Duration> {
        Ok(Duration::ZERO)
    }

    /// Runs the program over the step's tokens. May return before the device has finished.
    fn run(&mut self, step: &Step<'_>) -> Result<()> {
        self.begin(step)?;
        while self.advance(&Budget::UNLIMITED)? != Progress::Done {
            self.wait()?;
        }
        Ok(())
    }

    /// Picks a token from the last logits row of the last step.
    fn sample(&mut self, request: &SampleRequest<'_>) -> Result<u32> {
        self.begin_sample(request)?;
        loop {
            if let Some(token) = self.poll_sample()? {
                return Ok(token);
            }
            self.wait()?;
        }
    }

    /// Copies the logits rows of the last step to `out`, (rows, vocab_size), replacing its content. Waits.
    fn read_logits(&mut self, out: &mut Vec<f32>) -> Result<()>;

    /// Asks for the rows that the logits of the last step were computed from: the last hidden states after the final
    /// norm. Does not wait.
    fn begin_hidden(&mut self) -> Result<()>;

    /// Appends the rows that were asked for to `out`, (rows, hidden); false while the device works on them.
    fn poll_hidden(&mut self, out: &mut Vec<f32>) -> Result<bool>;

    /// As [`Self::begin_hidden`] and [`Self::poll_hidden`], replacing the content of `out`. Waits.
    fn read_hidden(&mut self, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        self.begin_hidden()?;
        while !self.poll_hidden(out)? {
            self.wait()?;
        }
        Ok(())
    }

    /// Copies keys and values of the first `n` positions to `out`, [`kv_bytes`] long: layer by layer keys, then values,
    /// (kv_heads, n, head_dim) each, little-endian elements of [`Self::kv_type`]. Those of a head in [`KvType::Q8`] are
    /// followed by their scales, whose words are padded with 0. Waits.
    fn save_kv(&mut self, n: u32, out: &mut [u8]) -> Result<()>;

    /// Takes back what [`Self::save_kv`] gave.
    fn load_kv(&mut self, n: u32, bytes: &[u8]) -> Result<()>;

    /// A runner of the same capacities whose first `n` positions are those of this one. Either may overwrite
    /// them without the other noticing, but for those of [`Runner::shared`].
    fn fork(&mut self, n: u32, sharing: Sharing) -> Result<Box<dyn Runner>>;

    /// Bytes that [`Runner::fork`] takes, those of a shared part included if there is none yet.
    fn fork_bytes(&self, n: u32, sharing: Sharing) -> u64 {
        let _ = (n, sharing);
        self.bytes()
    }

    /// The first positions if they are shared: no step may begin there.
    fn shared(&self) -> Option<Shared> {
        None
    }

    /// Takes a choice as [`Runner::begin_sample`] does, and the step over the chosen token at `position`, with logits, as
    /// [`Runner::begin`] does: the token goes from the device to the device, [`Runner::poll_ahead`] tells it to the host
    /// later. The last step has to be complete on the host's side. At most [`MAX_AHEAD`] such tokens may be outstanding;
    /// [`Runner::begin`] and [`Runner::abandon`] forget them. Returns false, having done nothing, where the backend can
    /// not do this for the request.
    ///
    /// # Errors
    /// As [`Runner::begin_sample`] and [`Runner::begin`].
    fn begin_ahead(&mut self, request: &SampleRequest<'_>, position: u32) -> Result<bool> {
        let _ = (request, position);
        Ok(false)
    }

    /// The oldest token of [`Runner::begin_ahead`] that was not told yet, or `None` while the device works on it.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if there is none, or a device error.
    fn poll_ahead(&mut self) -> Result<Option<u32>> {
        Err(Error::new(ErrorKind::InvalidInput, "no token was chosen ahead"))
    }

    /// Takes back the step over the newest token chosen ahead, which is not complete on the host's side: the choice
    /// stays, as if [`Runner::begin_sample`] had made it.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if there is none, or a device error.
    fn retract_ahead(&mut self) -> Result<()> {
        Err(Error::new(ErrorKind::InvalidInput, "no token was chosen ahead"))
    }

    /// Runs the step like [`Runner::run`] and measures the device time of every operation, in order.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the backend or the device can not tell, else as [`Runner::run`].
    fn profile(&mut self, step: &Step<'_>) -> Result<Vec<OpTime>> {
        let _ = step;
        Err(Error::new(ErrorKind::Unsupported, "this backend does not time its operations"))
    }

    /// Goes on with the same weights on another backend, because those were evicted and came back. False, with nothing
    /// changed, if that is on another device: then a new runner has to be made.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] or a device error.
    fn rebind(&mut self, backend: Arc<dyn Backend>) -> Result<bool>;

    /// Element type of the KV cache.
    fn kv_type(&self) -> KvType;

    /// Bytes held for this session: KV cache, activations, tables.
    fn bytes(&self) -> u64;
}

/// Whether a fork may keep positions once for several runners.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// No.
    Never,
    /// Where what is computed stays the same to the last bit.
    Exact,
    /// Wherever the backend can.
    Always,
}

/// Positions at the start of a KV cache that several runners share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shared {
    /// Equal for runners that share them.
    pub id: usize,
    /// How many.
    pub positions: u32,
    /// Bytes that they take, once for all.
    pub bytes: u64,
}
