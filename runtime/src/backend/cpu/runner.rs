//! Computes steps, in pieces that a deadline can part.

use std::any::Any;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::pool::Pool;
use super::weights::Weights;
use super::{
    Cpu, Scratch, Zeros, attention, fitting, gathered_len, integer, matmul, out_of_memory, partials_len, runner_bytes,
    scratch, zeros,
};
use crate::backend::{
    Backend, Budget, BufferId, KvType, LogitsRows, Op, Program, Progress, Rows, Runner, RunnerConfig, Sharing, Step,
    check_kv,
};
use crate::error::{Error, ErrorKind, Result};
use crate::session::sampler::{self, SampleRequest};

use ops::Way;

mod group;
mod ops;

pub(super) use group::CpuGroup;

/// Inputs of [`Op::Experts`], those of the same expert one behind the other.
#[derive(Default)]
struct Gathered {
    groups: Vec<matmul::Group>,
    /// The row of the output that each of them belongs to.
    order: Vec<usize>,
    /// (rows, K)
    x: Vec<f32>,
}

pub(super) struct CpuRunner {
    backend: Arc<Cpu>,
    program: Arc<Program>,
    config: RunnerConfig,
    kv_type: KvType,
    pool: Pool,
    scratch: Vec<Mutex<Scratch>>,
    /// One allocation a program buffer: (rows, width).
    buffers: Vec<Zeros<f32>>,
    /// Keys and values of each layer.
    caches: Vec<attention::Cache>,
    /// Results of attention's splits.
    partials: Vec<f32>,
    /// Rotary tables, (context, rotary_dim / 2, 2).
    ropes: Vec<Vec<f32>>,
    /// Inputs of experts.
    gathered: Gathered,
    /// Input of the product under way, if that is computed in integers.
    rounded: integer::Activations,
    /// Memory for such products, one a thread.
    workers: Vec<Mutex<Box<integer::Worker>>>,
    /// Logits rows of the last run.
    logits_rows: usize,
    /// Copy of the logits row that sampling may change.
    sample_row: Vec<f32>,
    /// Memory of the sampler.
    candidates: Vec<(f32, u32)>,
    /// The chosen token, until it is asked for.
    chosen: Option<u32>,
    /// Tokens that were embedded since the table was, or could have been, given back.
    embedded: usize,
    cursor: Cursor,
}

/// Computes some units of an operation.
type RunOp<'a> = dyn FnMut(&mut CpuRunner, &Weights, &Op, std::ops::Range<usize>) -> Result<()> + 'a;

/// The step under way.
struct Cursor {
    tokens: Vec<u32>,
    position: u32,
    logits: LogitsRows,
    /// Next operation; behind the last one if there is nothing to do.
    op: usize,
    /// Units of that operation already computed.
    unit: usize,
    /// Seconds a unit of work took, by kind of operation; 0 if unknown.
    pace: [f64; 4],
}

/// Tokens after which mapped pages of embeddings are given back: with each row systems map what else of its 64 KiB they
/// have in memory, which after a long prompt is most of the table.
const EMBEDDED: usize = 256;
/// Longest piece between two looks at the clock.
const PIECE: Duration = Duration::from_micros(250);

impl CpuRunner {
    pub(super) fn new(backend: Arc<Cpu>, program: Arc<Program>, config: &RunnerConfig) -> Result<Self> {
        let max_tokens = config.max_tokens as usize;
        let context = config.context as usize;
        let shape = program.attention;
        let kv_type = config.kv_type.unwrap_or(KvType::F32);
        let buffers = program
            .buffers
            .iter()
            .map(|desc| {
                let n = (desc.rows(config) as usize).checked_mul(desc.width as usize);
                Zeros::new(n, &format!("activation buffer `{}`", desc.name))
            })
            .collect::<Result<Vec<_>>>()?;
        let layout = attention::Layout::new(&shape, context, kv_type);
        let whole = layout.and_then(|layout| layout.bytes()?.checked_mul(2 * program.layers as usize));
        // Checked as a whole first: each layer alone could still fit.
        fitting(whole, &format!("a KV cache of {context} tokens"))?;
        let layout = layout.ok_or_else(|| out_of_memory("a KV cache", "more than 2^64"))?;
        let caches = (0..program.layers).map(|_| attention::Cache::new(layout)).collect::<Result<Vec<_>>>()?;
        let rope_len = context.checked_mul(shape.rotary_dim as usize);
        let ropes =
            (0..program.rope_tables).map(|_| zeros(rope_len, "the rotary table")).collect::<Result<Vec<_>>>()?;
        let pool = match &config.jobs {
            Some(jobs) => Pool::on(jobs.clone()),
            None => Pool::new(config.threads.unwrap_or(1)),
        };
        let (weights, sums) = scratch(&program, config);
        let gathered = usize::try_from(gathered_len(&program, config)).ok();
        let gathered = fitting(gathered.and_then(|n| n.checked_mul(4)), "inputs of experts")? / 4;
        let scratch = (0..pool.threads())
            .map(|_| {
                Ok(Mutex::new(Scratch {
                    weights: zeros(Some(weights), "scratch memory")?,
                    sums: zeros(Some(sums), "scratch memory")?,
                }))
            })
            .collect::<Result<Vec<_>>>()?;
        let sample_row = zeros(Some(program.vocab_size as usize), "the sampling row")?;
        let rounded = integer::Activations::new(&program, config)?;
        let workers = if config.exact { 0 } else { pool.threads() };
        let columns = integer::columns(&program, config);
        let workers =
            (0..workers).map(|_| integer::Worker::new(columns).map(Mutex::new)).collect::<Result<Vec<_>>>()?;
        Ok(Self {
            backend,
            config: config.clone(),
            kv_type,
            pool,
            scratch,
            buffers,
            caches,
            partials: zeros(partials_len(&program, config), "attention of the splits")?,
            ropes,
            gathered: Gathered { x: Vec::with_capacity(gathered), ..Gathered::default() },
            rounded,
            workers,
            logits_rows: 0,
            sample_row,
            candidates: Vec::with_capacity(program.vocab_size as usize),
            chosen: None,
            embedded: 0,
            cursor: Cursor {
                tokens: Vec::with_capacity(max_tokens),
                position: 0,
                logits: LogitsRows::None,
                op: program.ops.len(),
                unit: 0,
                pace: [0.0; 4],
            },
            program,
        })
    }

    /// Units that operation `op` of the step under way can be parted into, multiplications a unit about, and its kind
    /// for [`Cursor::pace`].
    fn units(&self, weights: &Weights, op: &Op) -> (usize, usize, usize) {
        let n_tokens = self.cursor.tokens.len();
        let count = |rows: Rows| self.rows(rows).len();
        match *op {
            Op::Embed { out, .. } => (n_tokens, self.width(out), 0),
            Op::Norm { dim, segments, rows, .. } => (count(rows), (dim * segments) as usize, 0),
            Op::Glu { out, .. } => (n_tokens * self.per_token(out), self.width(out), 1),
            Op::Route { logits, .. } => (n_tokens, 4 * self.width(logits), 1),
            Op::Gate { x, .. } => (n_tokens, self.width(x), 1),
            Op::Combine { x, .. } => (n_tokens, self.width(x) * self.per_token(x), 0),
            Op::Experts { x, weight, count, out, .. } => {
                let pairs = n_tokens * self.per_token(out.buffer);
                match self.blocks_of_experts(weights, weight, count) {
                    Some(blocks) => (blocks, self.width(x) * pairs * integer::rows::LANES, 2),
                    None => {
                        let matrix = weights.matrix(weight.0 as usize);
                        (matmul::blocks(&matrix), self.width(x) * 3 * pairs * matmul::block_rows(&matrix), 2)
                    }
                }
            }
            Op::Scale { x, rows, .. } => (count(rows), self.width(x), 1),
            Op::Arrange { out, rows, .. } => (count(rows), self.width(out), 0),
            Op::RopeAppend { qkv, .. } => (n_tokens, self.width(qkv), 0),
            Op::Linear { x, weight, out, rows, .. } => {
                let matrix = weights.matrix(weight.0 as usize);
                let rows = count(rows);
                let (blocks, work) = match self.way(weights, weight, out.buffer) {
                    Way::Blocks(shape) | Way::Rounded(shape) => (shape.blocks(), rows * integer::rows::LANES),
                    // Expanding a weight costs about as much as multiplying it twice.
                    Way::Single => (matmul::blocks(&matrix), (rows + 2) * matmul::block_rows(&matrix)),
                };
                (if rows == 0 { 0 } else { blocks }, self.width(x) * work, 2)
            }
            Op::Attention { out, window, .. } => {
                let shape = &self.program.attention;
                let position = self.cursor.position as usize;
                let window = window.map_or(usize::MAX, |window| window as usize);
                let heads = n_tokens.div_ceil(attention::TOKENS) * shape.kv_heads as usize;
                let units = match self.caches.is_empty() {
                    // Of several sessions, which have as many splits as they have positions.
                    true => heads,
                    false => attention::units(shape, position, n_tokens, window),
                };
                let tokens = n_tokens.min(attention::TOKENS);
                let seen = (position + n_tokens).min(window.saturating_add(n_tokens));
                let of_head = 2 * tokens * seen * self.width(out) / shape.kv_heads as usize;
                (units, of_head * heads / units.max(1), 3)
            }
        }
    }

    /// Token rows that `rows` stands for in the step under way.
    fn rows(&self, rows: Rows) -> std::ops::Range<usize> {
        let n_tokens = self.cursor.tokens.len();
        let logits = self.cursor.logits;
        match rows {
            Rows::All => 0..n_tokens,
            Rows::Logits => logits.range(n_tokens),
            Rows::Compacted if logits == LogitsRows::Hidden => 0..0,
            Rows::Compacted => 0..logits.range(n_tokens).len(),
        }
    }

    /// Rows of a token.
    fn per_token(&self, buffer: BufferId) -> usize {
        self.program.buffers[buffer.0 as usize].per_token as usize
    }

    fn width(&self, buffer: BufferId) -> usize {
        self.program.buffers[buffer.0 as usize].width as usize
    }

    /// As [`Runner::advance`], with every piece of an operation computed by `run`.
    fn advance_by(&mut self, budget: &Budget, run: &mut RunOp<'_>) -> Result<Progress> {
        let program = Arc::clone(&self.program);
        if self.cursor.op == program.ops.len() {
            return Ok(Progress::Done);
        }
        // Held only while computing, so that they can be evicted between two calls.
        let weights = self.backend.weights()?;
        let mut begun = false;
        while let Some(op) = program.ops.get(self.cursor.op) {
            let (units, work, kind) = self.units(&weights, op);
            while self.cursor.unit < units {
                let left = units - self.cursor.unit;
                let mut n = left;
                let now = Instant::now();
                if let Some(deadline) = budget.deadline {
                    let time = deadline.saturating_duration_since(now);
                    if begun && time.is_zero() {
                        return Ok(Progress::Working);
                    }
                    begun = true;
                    let unit_seconds = self.cursor.pace[kind] * work as f64;
                    n = match unit_seconds > 0.0 {
                        // At least one unit a thread, so that every budget makes progress.
                        true => (time.min(PIECE).as_secs_f64() / unit_seconds) as usize,
                        false => 0,
                    };
                    n = n.max(self.pool.threads()).min(left);
                }
                let result = run(self, &weights, op, self.cursor.unit..self.cursor.unit + n);
                if let Err(error) = result {
                    self.abandon();
                    return Err(error);
                }
                let pace = now.elapsed().as_secs_f64() / (n * work.max(1)) as f64;
                let known = &mut self.cursor.pace[kind];
                *known = if *known == 0.0 { pace } else { 0.75 * *known + 0.25 * pace };
                self.cursor.unit += n;
            }
            self.cursor.op += 1;
            self.cursor.unit = 0;
            if self.cursor.op == program.ops.len() {
                self.logits_rows = self.cursor.logits.range(self.cursor.tokens.len()).len();
            }
        }
        Ok(Progress::Done)
    }
}

impl Runner for CpuRunner {
    fn write_rope(&mut self, table: u32, first: u32, rows: &[f32]) -> Result<()> {
        let width = self.program.attention.rotary_dim as usize;
        let start = first as usize * width;
        self.ropes
            .get_mut(table as usize)
            .and_then(|t| t.get_mut(start..start + rows.len()))
            .ok_or_else(|| Error::new(ErrorKind::ContextFull, "rotary rows lie outside the context"))?
            .copy_from_slice(rows);
        Ok(())
    }

    fn begin(&mut self, step: &Step<'_>) -> Result<()> {
        step.check(&self.program, &self.config)?;
        self.abandon();
        self.logits_rows = 0;
        self.cursor.tokens.clear();
        self.cursor.tokens.extend_from_slice(step.tokens);
        self.cursor.position = step.position;
        self.cursor.logits = step.logits;
        self.cursor.op = 0;
        self.caches.iter_mut().for_each(|cache| cache.truncate(step.position as usize));
        Ok(())
    }

    fn advance(&mut self, budget: &Budget) -> Result<Progress> {
        self.advance_by(budget, &mut Self::run_op)
    }

    fn abandon(&mut self) {
        self.cursor.op = self.program.ops.len();
        self.cursor.unit = 0;
        self.chosen = None;
    }

    fn begin_sample(&mut self, request: &SampleRequest<'_>) -> Result<()> {
        let vocab = self.program.vocab_size as usize;
        let last =
            self.logits_rows.checked_sub(1).filter(|_| self.cursor.logits != LogitsRows::Hidden).ok_or_else(|| {
                Error::new(ErrorKind::InvalidInput, "the last step computed no logits to sample from")
            })?;
        self.sample_row.copy_from_slice(&self.buffers[self.program.logits.0 as usize][last * vocab..][..vocab]);
        self.chosen = Some(sampler::pick_in(&mut self.sample_row, request, &mut self.candidates));
        Ok(())
    }

    fn poll_sample(&mut self) -> Result<Option<u32>> {
        match self.chosen.take() {
            None => Err(Error::new(ErrorKind::InvalidInput, "no choice is under way")),
            chosen => Ok(chosen),
        }
    }

    fn wait(&mut self) -> Result<()> {
        Ok(())
    }

    fn read_logits(&mut self, out: &mut Vec<f32>) -> Result<()> {
        let vocab = self.program.vocab_size as usize;
        let rows = if self.cursor.logits == LogitsRows::Hidden { 0 } else { self.logits_rows };
        out.clear();
        out.extend_from_slice(&self.buffers[self.program.logits.0 as usize][..rows * vocab]);
        Ok(())
    }

    fn begin_hidden(&mut self) -> Result<()> {
        self.program.last_hidden().map(|_| ())
    }

    fn poll_hidden(&mut self, out: &mut Vec<f32>) -> Result<bool> {
        let buffer = self.program.last_hidden()?;
        let width = self.width(buffer);
        out.extend_from_slice(&self.buffers[buffer.0 as usize][..self.logits_rows * width]);
        Ok(true)
    }

    fn save_kv(&mut self, n: u32, out: &mut [u8]) -> Result<()> {
        check_kv(&self.program, &self.config, self.kv_type, n, out.len())?;
        let layer_bytes = out.len() / self.caches.len().max(1);
        for (cache, out) in self.caches.iter().zip(out.chunks_exact_mut(layer_bytes.max(1))) {
            cache.save(n as usize, out);
        }
        Ok(())
    }

    fn load_kv(&mut self, n: u32, bytes: &[u8]) -> Result<()> {
        check_kv(&self.program, &self.config, self.kv_type, n, bytes.len())?;
        self.abandon();
        let layer_bytes = bytes.len() / self.caches.len().max(1);
        for (cache, bytes) in self.caches.iter_mut().zip(bytes.chunks_exact(layer_bytes.max(1))) {
            cache.load(n as usize, bytes);
        }
        Ok(())
    }

    fn fork(&mut self, n: u32, _: Sharing) -> Result<Box<dyn Runner>> {
        let mut fork = Self::new(Arc::clone(&self.backend), Arc::clone(&self.program), &self.config)?;
        fork.caches = self.caches.iter_mut().map(|cache| cache.fork(n as usize)).collect::<Result<Vec<_>>>()?;
        for (to, from) in fork.ropes.iter_mut().zip(&self.ropes) {
            to.copy_from_slice(from);
        }
        Ok(Box::new(fork))
    }

    fn rebind(&mut self, backend: Arc<dyn Backend>) -> Result<bool> {
        let backend: Arc<dyn Any + Send + Sync> = backend;
        let Ok(backend) = backend.downcast::<Cpu>() else { return Ok(false) };
        self.abandon();
        self.backend = backend;
        Ok(true)
    }

    fn kv_type(&self) -> KvType {
        self.kv_type
    }

    fn bytes(&self) -> u64 {
        runner_bytes(&self.program, &RunnerConfig { kv_type: Some(self.kv_type), ..self.config.clone() })
    }
}
