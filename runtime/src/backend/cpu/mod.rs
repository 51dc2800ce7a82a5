//! CPU backend: weights stay in their canonical or mapped form; a step is computed in pieces that a deadline can part.

use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{
    Activation, Backend, BackendInfo, Budget, BufferId, Device, KvType, LogitsRows, NormKind, Op, Program, Progress,
    Rows, Runner, RunnerConfig, Sharing, Span, Step, WeightId,
};
use crate::error::{Error, ErrorKind, Result};
use crate::session::sampler::{self, SampleRequest};
use crate::tensor::{BlockMatrix, Bytes, DenseMatrix, Weight, WeightShape};
use kernels::Kernels;
use pool::Pool;

mod attention;
mod integer;
#[cfg(target_arch = "x86_64")]
mod integer_x86;
mod kernels;
mod matmul;
mod pool;
#[cfg(target_arch = "x86_64")]
mod x86;

/// An empty CPU backend.
pub fn open() -> Box<dyn Backend> {
    Processor::default().backend()
}

/// The processor as a device.
#[derive(Debug, Clone, Copy, Default)]
pub struct Processor {
    /// Compute without wide instructions, so that every processor of this family gets the same bits.
    pub portable: bool,
}

impl Device for Processor {
    fn backend(&self) -> Box<dyn Backend> {
        let kernels =
            if self.portable { Box::new(kernels::Portable) as Box<dyn kernels::Kernels> } else { kernels::best() };
        Box::new(Cpu {
            weights: Mutex::new(Some(Arc::default())),
            filling: None,
            weight_bytes: 0,
            kernels: kernels.into(),
        })
    }
}

/// Bytes of host memory that a session takes.
pub(crate) fn runner_bytes(program: &Program, config: &RunnerConfig) -> u64 {
    let activations =
        program.buffers.iter().map(|desc| u64::from(desc.rows(config)).saturating_mul(u64::from(desc.width)));
    let ropes = u64::from(program.rope_tables) * u64::from(config.context) * u64::from(program.attention.rotary_dim);
    let (weights, sums) = scratch(program, config);
    let threads = config.jobs.as_ref().map_or(config.threads.unwrap_or(1), |jobs| jobs.0.threads()).max(1);
    // The row that sampling changes, and its candidates of two words each.
    let sampling = 3 * u64::from(program.vocab_size);
    let floats = activations.fold(ropes + sampling + gathered_len(program, config), u64::saturating_add);
    let floats = floats.saturating_add((weights as u64).saturating_add(sums as u64).saturating_mul(threads as u64));
    let kv = super::kv_bytes(program, config.kv_type.unwrap_or(KvType::F32), config.context);
    floats.saturating_mul(4).saturating_add(kv).saturating_add(integer::bytes(program, config))
}

/// Elements of [`Gathered::x`].
fn gathered_len(program: &Program, config: &RunnerConfig) -> u64 {
    let inputs = program.ops.iter().filter_map(|op| match op {
        Op::Experts { x, out, .. } => {
            Some((program.buffers.get(x.0 as usize)?, program.buffers.get(out.buffer.0 as usize)?))
        }
        _ => None,
    });
    inputs.map(|(x, out)| u64::from(out.rows(config)).saturating_mul(u64::from(x.width))).max().unwrap_or(0)
}

/// Elements of the two parts of [`Scratch`].
fn scratch(program: &Program, config: &RunnerConfig) -> (usize, usize) {
    let shape = &program.attention;
    (
        matmul::scratch_weights().max(attention::scratch_rows(shape)),
        matmul::scratch_sums(config.max_tokens as usize).max(attention::scratch_scores(shape, config.context as usize)),
    )
}

struct Cpu {
    /// Those reserved and not filled have no rows yet; `None` once they were evicted.
    weights: Mutex<Option<Weights>>,
    /// The weight whose rows are coming, and the shape it will have.
    filling: Option<(usize, WeightShape, Partial)>,
    weight_bytes: u64,
    kernels: Arc<dyn Kernels>,
}

type Weights = Arc<Vec<Weight>>;

impl Cpu {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Weights>> {
        self.weights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The weights, which stay in memory as long as somebody holds them.
    fn weights(&self) -> Result<Weights> {
        self.lock().clone().ok_or_else(|| Error::new(ErrorKind::Evicted, "the weights were evicted"))
    }

    /// The weights while they are loaded and nobody else has them.
    fn loading(&mut self) -> Result<&mut Vec<Weight>> {
        let weights = self.weights.get_mut().unwrap_or_else(PoisonError::into_inner);
        weights
            .as_mut()
            .and_then(Arc::get_mut)
            .ok_or_else(|| Error::new(ErrorKind::Evicted, "the weights were evicted"))
    }
}

impl Backend for Cpu {
    fn info(&self) -> BackendInfo {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        BackendInfo {
            backend: "cpu",
            device: format!("{} ({threads} threads available)", std::env::consts::ARCH),
            variant: format!("{} (best instruction set this processor reports)", self.kernels.name()),
            default_kv: KvType::F32,
            weight_bytes: self.weight_bytes,
        }
    }

    fn reserve(&mut self, name: &str, shape: &WeightShape) -> Result<WeightId> {
        let weights = self.loading()?;
        let id = u32::try_from(weights.len())
            .map_err(|_| Error::new(ErrorKind::Unsupported, "more than 2^32 weights").in_tensor(name))?;
        weights.push(Weight::Vector(Vec::new()));
        self.weight_bytes += self.weight_bytes(shape);
        self.filling = Some((id as usize, *shape, Partial::Nothing));
        Ok(WeightId(id))
    }

    fn fill(&mut self, id: WeightId, rows: Weight) -> Result<()> {
        let at = id.0 as usize;
        let Some((_, shape, partial)) = self.filling.as_mut().filter(|(filling, ..)| *filling == at) else {
            return Err(Error::new(ErrorKind::InvalidInput, format!("weight {at} takes no rows")));
        };
        partial.push(shape, rows)?;
        if partial.rows() == shape.rows() {
            let whole = partial.finish(shape)?;
            self.filling = None;
            self.loading()?[at] = whole;
        }
        Ok(())
    }

    fn weight_bytes(&self, shape: &WeightShape) -> u64 {
        shape.bytes(shape.rows())
    }

    fn is_host(&self) -> bool {
        true
    }

    fn runner_bytes(&self, program: &Program, config: &RunnerConfig) -> u64 {
        runner_bytes(program, config)
    }

    fn evict(&self) {
        *self.lock() = None;
    }

    fn runner(self: Arc<Self>, program: &Arc<Program>, config: &RunnerConfig) -> Result<Box<dyn Runner>> {
        Ok(Box::new(CpuRunner::new(self, Arc::clone(program), config)?))
    }
}

/// Rows of a weight so far.
enum Partial {
    Nothing,
    Whole(Weight),
    /// Rows of a dense matrix or of blocks, copied.
    Bytes(usize, Vec<u8>),
}

impl Partial {
    fn rows(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Whole(weight) => weight.shape().rows(),
            Self::Bytes(rows, _) => *rows,
        }
    }

    fn push(&mut self, shape: &WeightShape, rows: Weight) -> Result<()> {
        let count = rows.shape().rows();
        if rows.shape() != shape.with_rows(count) || self.rows() + count > shape.rows() {
            let message = format!("{:?} does not continue {} rows of {shape:?}", rows.shape(), self.rows());
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let bytes = usize::try_from(shape.bytes(shape.rows())).ok();
        match (&mut *self, rows) {
            (Self::Nothing, rows) if count == shape.rows() => *self = Self::Whole(rows),
            (
                Self::Nothing,
                Weight::Dense(DenseMatrix { bytes: rows, .. }) | Weight::Blocks(BlockMatrix { bytes: rows, .. }),
            ) => {
                let mut all = Vec::new();
                let bytes = fitting(bytes, "a weight")?;
                all.try_reserve_exact(bytes).map_err(|_| out_of_memory("a weight", bytes))?;
                all.extend_from_slice(&rows);
                *self = Self::Bytes(count, all);
            }
            (Self::Nothing, mut rows) => {
                let bytes = fitting(bytes, "a weight")?;
                let more = shape.rows() - count;
                let reserved = match &mut rows {
                    Weight::W4(m) => m
                        .qweight
                        .try_reserve_exact(more * (m.k / 8))
                        .and_then(|()| m.group_params.try_reserve_exact(more * (m.k / m.group_size))),
                    Weight::Packed(m) => m.reserve(more),
                    Weight::Vector(v) => v.try_reserve_exact(more),
                    Weight::Order(v) => v.try_reserve_exact(more),
                    Weight::Dense(_) | Weight::Blocks(_) => Ok(()),
                };
                reserved.map_err(|_| out_of_memory("a weight", bytes))?;
                *self = Self::Whole(rows);
            }
            (Self::Whole(all), rows) => all.append(rows)?,
            (
                Self::Bytes(n, all),
                Weight::Dense(DenseMatrix { bytes: rows, .. }) | Weight::Blocks(BlockMatrix { bytes: rows, .. }),
            ) => {
                all.extend_from_slice(&rows);
                *n += count;
            }
            (Self::Bytes(..), _) => return Err(mismatch("a matrix of bytes")),
        }
        Ok(())
    }

    fn finish(&mut self, shape: &WeightShape) -> Result<Weight> {
        match (std::mem::replace(self, Self::Nothing), *shape) {
            (Self::Whole(weight), _) => Ok(weight),
            (Self::Bytes(_, bytes), WeightShape::Dense { n, k, dtype }) => {
                DenseMatrix::new(n, k, dtype, Bytes::owned(bytes)).map(Weight::Dense)
            }
            (Self::Bytes(_, bytes), WeightShape::Blocks { n, k, ggml_type }) => {
                BlockMatrix::new(n, k, ggml_type, Bytes::owned(bytes)).map(Weight::Blocks)
            }
            _ => Err(mismatch("a whole weight")),
        }
    }
}

/// Inputs of [`Op::Experts`], those of the same expert one behind the other.
#[derive(Default)]
struct Gathered {
    groups: Vec<matmul::Group>,
    /// The row of the output that each of them belongs to.
    order: Vec<usize>,
    /// (rows, K)
    x: Vec<f32>,
}

/// Scratch memory of one worker, allocated once.
struct Scratch {
    /// Expanded weight rows, or expanded keys and values.
    weights: Vec<f32>,
    /// Partial sums of a block of weight rows, or attention scores.
    sums: Vec<f32>,
}

struct CpuRunner {
    backend: Arc<Cpu>,
    program: Arc<Program>,
    config: RunnerConfig,
    kv_type: KvType,
    pool: Pool,
    scratch: Vec<Mutex<Scratch>>,
    /// One allocation a program buffer: (rows, width).
    buffers: Vec<Vec<f32>>,
    /// Keys and values of each layer.
    caches: Vec<attention::Cache>,
    /// Rotary tables, (context, rotary_dim / 2, 2).
    ropes: Vec<Vec<f32>>,
    /// Inputs of experts.
    gathered: Gathered,
    /// Input of the product under way, if that is computed in integers.
    rounded: integer::Activations,
    /// The run of columns that a norm works on.
    norm_row: Vec<f32>,
    /// Logits rows of the last run.
    logits_rows: usize,
    /// Copy of the logits row that sampling may change.
    sample_row: Vec<f32>,
    /// Memory of the sampler.
    candidates: Vec<(f32, u32)>,
    /// The chosen token, until it is asked for.
    chosen: Option<u32>,
    cursor: Cursor,
}

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

/// Longest piece between two looks at the clock.
const PIECE: Duration = Duration::from_micros(250);

/// `n` zeros, or an error that names the need.
fn zeros(n: Option<usize>, what: &str) -> Result<Vec<f32>> {
    let bytes = fitting(n.and_then(|n| n.checked_mul(size_of::<f32>())), what)?;
    let n = bytes / size_of::<f32>();
    // `vec!` leaves fresh pages untouched but aborts where there are none; so ask first.
    Vec::<f32>::new().try_reserve_exact(n).map_err(|_| out_of_memory(what, bytes))?;
    Ok(vec![0.0; n])
}

/// `bytes` zero bytes of untouched pages, or an error that names the need.
fn zero_pages(bytes: Option<usize>, what: &str) -> Result<memmap2::MmapMut> {
    let bytes = fitting(bytes, what)?;
    memmap2::MmapMut::map_anon(bytes).map_err(|_| out_of_memory(what, bytes))
}

/// Passes on a byte count that this machine could provide. Linux hands out address space beyond the memory it has,
/// so a failed allocation is not enough to find out.
fn fitting(bytes: Option<usize>, what: &str) -> Result<usize> {
    match bytes {
        Some(bytes) if available_memory().is_none_or(|available| bytes as u64 <= available) => Ok(bytes),
        Some(bytes) => Err(out_of_memory(what, bytes)),
        None => Err(out_of_memory(what, "more than 2^64")),
    }
}

fn out_of_memory(what: &str, bytes: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::OutOfMemory, format!("{what} needs {bytes} bytes"))
}

/// Bytes of memory this system could still provide, where it says so.
pub(in crate::backend) fn available_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = |key: &str| {
        info.lines().find_map(|l| l.strip_prefix(key)?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
    };
    Some((kib("MemAvailable:")?.saturating_add(kib("SwapFree:").unwrap_or(0))).saturating_mul(1024))
}

impl CpuRunner {
    fn new(backend: Arc<Cpu>, program: Arc<Program>, config: &RunnerConfig) -> Result<Self> {
        let max_tokens = config.max_tokens as usize;
        let context = config.context as usize;
        let shape = program.attention;
        let kv_type = config.kv_type.unwrap_or(KvType::F32);
        let buffers = program
            .buffers
            .iter()
            .map(|desc| {
                zeros(
                    (desc.rows(config) as usize).checked_mul(desc.width as usize),
                    &format!("activation buffer `{}`", desc.name),
                )
            })
            .collect::<Result<Vec<_>>>()?;
        let per_layer = context.checked_mul((shape.kv_heads * shape.head_dim) as usize);
        let whole = per_layer.and_then(|n| n.checked_mul(2 * program.layers as usize * kv_type.size()));
        // Checked as a whole first: each layer alone could still fit.
        fitting(whole, &format!("a KV cache of {context} tokens"))?;
        let caches =
            (0..program.layers).map(|_| attention::Cache::new(kv_type, per_layer)).collect::<Result<Vec<_>>>()?;
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
        Ok(Self {
            backend,
            config: config.clone(),
            kv_type,
            pool,
            scratch,
            buffers,
            caches,
            ropes,
            gathered: Gathered { x: Vec::with_capacity(gathered), ..Gathered::default() },
            rounded,
            norm_row: Vec::new(),
            logits_rows: 0,
            sample_row,
            candidates: Vec::with_capacity(program.vocab_size as usize),
            chosen: None,
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
    fn units(&self, weights: &[Weight], op: &Op) -> (usize, usize, usize) {
        let n_tokens = self.cursor.tokens.len();
        let count = |rows: Rows| self.rows(rows).len();
        match *op {
            Op::Embed { out, .. } => (n_tokens, self.width(out), 0),
            Op::Norm { dim, segments, rows, .. } => (count(rows), (dim * segments) as usize, 0),
            Op::Glu { out, .. } => (n_tokens * self.per_token(out), self.width(out), 1),
            Op::Route { logits, .. } => (n_tokens, 4 * self.width(logits), 1),
            Op::Gate { x, .. } => (n_tokens, self.width(x), 1),
            Op::Combine { x, .. } => (n_tokens, self.width(x) * self.per_token(x), 0),
            Op::Experts { x, weight, out, .. } => {
                let pairs = n_tokens * self.per_token(out.buffer);
                let n = matmul::rows_of(&weights[weight.0 as usize]);
                (matmul::blocks(n), self.width(x) * 3 * pairs * kernels::TILE, 2)
            }
            Op::Scale { x, rows, .. } => (count(rows), self.width(x), 1),
            Op::Arrange { out, rows, .. } => (count(rows), self.width(out), 0),
            Op::RopeAppend { qkv, .. } => (n_tokens, self.width(qkv), 0),
            Op::Linear { x, weight, rows, .. } => {
                let (n, _) = weights[weight.0 as usize].dims();
                // Expanding a weight costs about as much as multiplying it twice.
                let rows = count(rows);
                (if rows == 0 { 0 } else { matmul::blocks(n) }, self.width(x) * (rows + 2) * kernels::TILE, 2)
            }
            Op::Attention { out, .. } => {
                let kv_heads = self.program.attention.kv_heads as usize;
                let seen = self.cursor.position as usize + n_tokens;
                (n_tokens * kv_heads, 2 * seen * self.width(out) / kv_heads, 3)
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

    /// Computes the units `part` of an operation of the step under way.
    fn run_op(&mut self, weights: &[Weight], op: &Op, part: std::ops::Range<usize>) -> Result<()> {
        let n_tokens = self.cursor.tokens.len();
        let position = self.cursor.position as usize;
        match *op {
            Op::Embed { table, out, scale } => self.embed(&weights[table.0 as usize], out, scale, part),
            Op::Norm { rows, .. } => {
                let first = self.rows(rows).start;
                self.norm(weights, op, first, part)
            }
            Op::Linear { x, weight, bias, out, accumulate, rows } => {
                let range = self.rows(rows);
                let bias = bias.map(|bias| &weights[bias.0 as usize]);
                self.linear(x, &weights[weight.0 as usize], bias, out, accumulate, range, part)
            }
            Op::RopeAppend { qkv, layer, rope } => {
                let width = self.width(qkv);
                attention::rope_append(
                    &mut self.buffers[qkv.0 as usize][part.start * width..part.end * width],
                    width,
                    &mut self.caches[layer as usize],
                    rope.map(|table| &self.ropes[table as usize][..]),
                    &self.program.attention,
                    self.config.context as usize,
                    position + part.start,
                    &*self.backend.kernels,
                );
                Ok(())
            }
            Op::Attention { qkv, out, layer, scale, softcap, window } => {
                let qkv_width = self.width(qkv);
                let mut output = std::mem::take(&mut self.buffers[out.0 as usize]);
                attention::attention(
                    &mut self.pool,
                    &self.scratch,
                    &*self.backend.kernels,
                    &attention::Inputs {
                        qkv: &self.buffers[qkv.0 as usize],
                        qkv_width,
                        cache: &self.caches[layer as usize],
                        shape: self.program.attention,
                        context: self.config.context as usize,
                        position,
                        n_tokens,
                        scale,
                        softcap,
                        window: window.map_or(usize::MAX, |w| w as usize),
                    },
                    part,
                    &mut output,
                );
                self.buffers[out.0 as usize] = output;
                Ok(())
            }
            Op::Glu { x, out, activation } => {
                self.glu(x, out, activation, part);
                Ok(())
            }
            Op::Route { logits, routes, top_k, renormalise } => {
                self.route(logits, routes, top_k as usize, renormalise, part);
                Ok(())
            }
            Op::Experts { x, weight, count, routes, out } => {
                if part.start == 0 {
                    self.gather(x, routes, count as usize)?;
                }
                let first = weight.0 as usize;
                let experts = weights.get(first..first + count as usize).ok_or_else(|| mismatch("experts"))?;
                let stride = self.width(out.buffer);
                let in_integers = !self.config.exact && experts.iter().all(|weight| integer::takes(weight).is_some());
                if let Some(matrix) =
                    experts.first().and_then(integer::takes).filter(|_| in_integers && part.start == 0)
                {
                    self.rounded.round(&mut self.pool, &*self.backend.kernels, matrix, &self.gathered.x)?;
                }
                let mut output = std::mem::take(&mut self.buffers[out.buffer.0 as usize]);
                if in_integers {
                    let result = integer::matmul(
                        &mut self.pool,
                        &*self.backend.kernels,
                        &self.rounded,
                        experts,
                        &self.gathered.groups,
                        Some(&self.gathered.order),
                        part,
                        None,
                        false,
                        &mut output[out.offset as usize..],
                        stride,
                    );
                    self.buffers[out.buffer.0 as usize] = output;
                    return result;
                }
                let result = matmul::experts(
                    &mut self.pool,
                    &self.scratch,
                    &*self.backend.kernels,
                    experts,
                    &self.gathered.groups,
                    &self.gathered.order,
                    part,
                    &self.gathered.x,
                    &mut output[out.offset as usize..],
                    stride,
                );
                self.buffers[out.buffer.0 as usize] = output;
                result
            }
            Op::Combine { x, routes, out } => {
                let (width, top_k) = (self.width(out), self.per_token(x));
                let mut output = std::mem::take(&mut self.buffers[out.0 as usize]);
                for t in part {
                    let route = &self.buffers[routes.0 as usize][2 * top_k * t..][..top_k];
                    let rows = &self.buffers[x.0 as usize][top_k * width * t..][..top_k * width];
                    for (&weight, row) in route.iter().zip(rows.chunks_exact(width)) {
                        self.backend.kernels.axpy(weight, row, &mut output[width * t..][..width]);
                    }
                }
                self.buffers[out.0 as usize] = output;
                Ok(())
            }
            Op::Gate { x, gate } => {
                let width = self.width(x);
                let mut output = std::mem::take(&mut self.buffers[x.0 as usize]);
                for t in part {
                    let factor = 1.0 / (1.0 + (-self.buffers[gate.0 as usize][t]).exp());
                    output[width * t..][..width].iter_mut().for_each(|v| *v *= factor);
                }
                self.buffers[x.0 as usize] = output;
                Ok(())
            }
            Op::Scale { x, scale, cap, .. } => {
                let width = self.width(x);
                for value in &mut self.buffers[x.0 as usize][part.start * width..part.end * width] {
                    *value = softcap(*value * scale, cap);
                }
                Ok(())
            }
            Op::Arrange { x, order, factors, out, rows } => {
                let first = self.rows(rows).start;
                let [order, factors] = [order, factors].map(|id| id.map(|id| &weights[id.0 as usize]));
                self.arrange(x, order, factors, out, first, part)
            }
        }
    }

    fn embed(&mut self, table: &Weight, out: BufferId, scale: f32, part: std::ops::Range<usize>) -> Result<()> {
        let width = self.width(out);
        let backend = Arc::clone(&self.backend);
        if table.dims().1 != width {
            return Err(mismatch("a table of this width"));
        }
        let rows = self.buffers[out.0 as usize].chunks_exact_mut(width).skip(part.start);
        for (&token, out) in self.cursor.tokens[part].iter().zip(rows) {
            matmul::expand(&*backend.kernels, table, token as usize, 0, out);
            if scale != 1.0 {
                out.iter_mut().for_each(|v| *v *= scale);
            }
        }
        Ok(())
    }

    /// [`Op::Route`] of the tokens `part`.
    fn route(
        &mut self,
        logits: BufferId,
        routes: BufferId,
        top_k: usize,
        renormalise: bool,
        part: std::ops::Range<usize>,
    ) {
        let experts = self.width(logits);
        let mut output = std::mem::take(&mut self.buffers[routes.0 as usize]);
        for t in part {
            let logits = &self.buffers[logits.0 as usize][experts * t..][..experts];
            let (weights, numbers) = output[2 * top_k * t..][..2 * top_k].split_at_mut(top_k);
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let all: f32 = logits.iter().map(|l| (l - largest).exp()).sum();
            let mut last = (f32::INFINITY, 0);
            for (weight, number) in weights.iter_mut().zip(&mut *numbers) {
                // The next one in the order of falling logits, then of rising numbers.
                let after = |&(i, l): &(usize, &f32)| *l < last.0 || *l == last.0 && i > last.1;
                let behind = logits.iter().enumerate().filter(after);
                let best = behind.reduce(|a, b| if b.1 > a.1 { b } else { a });
                let (i, &logit) = best.unwrap_or((0, &f32::NEG_INFINITY));
                last = (logit, i);
                (*weight, *number) = ((logit - largest).exp() / all, i as f32);
            }
            if renormalise {
                let sum: f32 = weights.iter().sum();
                weights.iter_mut().for_each(|weight| *weight /= sum);
            }
        }
        self.buffers[routes.0 as usize] = output;
    }

    /// Brings the rows that go through the same expert together.
    fn gather(&mut self, x: BufferId, routes: BufferId, count: usize) -> Result<()> {
        let (width, per_token) = (self.width(x), self.per_token(x));
        let top_k = self.width(routes) / 2;
        let n_tokens = self.cursor.tokens.len();
        let pairs = n_tokens * top_k;
        let routes = &self.buffers[routes.0 as usize];
        let expert = |pair: usize| routes[2 * top_k * (pair / top_k) + top_k + pair % top_k] as usize;
        let gathered = &mut self.gathered;
        gathered.order.clear();
        gathered.order.extend(0..pairs);
        gathered.order.sort_by_key(|&pair| expert(pair));
        gathered.groups.clear();
        gathered.x.clear();
        for (i, &pair) in gathered.order.iter().enumerate() {
            match gathered.groups.last_mut() {
                // Without NaN among the logits a token goes through an expert once; with it, rows still fit the scratch.
                Some(group) if group.expert == expert(pair) && group.rows.len() < n_tokens => group.rows.end = i + 1,
                _ => gathered.groups.push(matmul::Group { expert: expert(pair).min(count - 1), rows: i..i + 1 }),
            }
            let row = if per_token == 1 { pair / top_k } else { pair };
            gathered.x.extend_from_slice(&self.buffers[x.0 as usize][row * width..][..width]);
        }
        Ok(())
    }

    /// [`Op::Norm`] of the rows `part`, counted from row `first` of the input.
    fn norm(&mut self, weights: &[Weight], op: &Op, first: usize, part: std::ops::Range<usize>) -> Result<()> {
        let Op::Norm { kind, x, weight, bias, out, dim, segments, eps, accumulate, .. } = *op else {
            return Err(mismatch("a norm"));
        };
        let dim = dim as usize;
        let (x_width, out_width) = (self.width(x.buffer), self.width(out.buffer));
        let in_place = x.buffer == out.buffer;
        let vector = |id: WeightId| match &weights[id.0 as usize] {
            Weight::Vector(vector) => Ok(&vector[..]),
            _ => Err(mismatch("a vector")),
        };
        let (weight, bias) = (vector(weight)?, bias.map(vector).transpose()?);
        let own_weights = weight.len() > dim;
        let mut output = std::mem::take(&mut self.buffers[out.buffer.0 as usize]);
        // Grows to the widest norm in the first step.
        let mut run = std::mem::take(&mut self.norm_row);
        run.resize(dim, 0.0);
        for to in part {
            let from = first + to;
            for segment in 0..segments as usize {
                let x_at = from * x_width + x.offset as usize + segment * dim;
                let out_at = to * out_width + out.offset as usize + segment * dim;
                let source = if in_place { &output } else { &self.buffers[x.buffer.0 as usize] };
                run.copy_from_slice(&source[x_at..x_at + dim]);
                if kind == NormKind::Layer {
                    let mean = run.iter().sum::<f32>() / dim as f32;
                    run.iter_mut().for_each(|v| *v -= mean);
                }
                let mean = self.backend.kernels.dot(&run, &run) / dim as f32;
                let factor = 1.0 / (mean + eps).sqrt();
                let weight = if own_weights { &weight[segment * dim..] } else { weight };
                run.iter_mut().zip(weight).for_each(|(v, w)| *v = *v * factor * w);
                if let Some(bias) = bias {
                    run.iter_mut().zip(bias).for_each(|(v, b)| *v += b);
                }
                let out = &mut output[out_at..out_at + dim];
                match accumulate {
                    true => out.iter_mut().zip(&run).for_each(|(out, v)| *out += v),
                    false => out.copy_from_slice(&run),
                }
            }
        }
        self.buffers[out.buffer.0 as usize] = output;
        self.norm_row = run;
        Ok(())
    }

    #[allow(clippy::too_many_arguments, reason = "the operation's operands, each of another kind")]
    fn linear(
        &mut self,
        x: BufferId,
        weight: &Weight,
        bias: Option<&Weight>,
        out: Span,
        accumulate: bool,
        rows: std::ops::Range<usize>,
        part: std::ops::Range<usize>,
    ) -> Result<()> {
        let out_width = self.width(out.buffer);
        let x_width = self.width(x);
        let backend = Arc::clone(&self.backend);
        let bias = match bias {
            Some(Weight::Vector(v)) => Some(&v[..]),
            Some(_) => return Err(mismatch("a vector")),
            None => None,
        };
        let in_integers = integer::takes(weight).filter(|_| !self.config.exact);
        let input = &self.buffers[x.0 as usize][rows.start * x_width..rows.end * x_width];
        if let Some(matrix) = in_integers.filter(|_| part.start == 0) {
            self.rounded.round(&mut self.pool, &*backend.kernels, matrix, input)?;
        }
        // An operation may not read what it writes.
        let mut output = std::mem::take(&mut self.buffers[out.buffer.0 as usize]);
        let input = &self.buffers[x.0 as usize][rows.start * x_width..rows.end * x_width];
        let result = match in_integers {
            Some(_) => integer::matmul(
                &mut self.pool,
                &*backend.kernels,
                &self.rounded,
                std::slice::from_ref(weight),
                &[matmul::Group { expert: 0, rows: 0..rows.len() }],
                None,
                part,
                bias,
                accumulate,
                &mut output[out.offset as usize..],
                out_width,
            ),
            None => matmul::matmul(
                &mut self.pool,
                &self.scratch,
                &*backend.kernels,
                weight,
                part,
                input,
                rows.len(),
                bias,
                accumulate,
                &mut output[out.offset as usize..],
                out_width,
            ),
        };
        self.buffers[out.buffer.0 as usize] = output;
        result
    }

    fn arrange(
        &mut self,
        x: BufferId,
        order: Option<&Weight>,
        factors: Option<&Weight>,
        out: BufferId,
        first: usize,
        part: std::ops::Range<usize>,
    ) -> Result<()> {
        let (x_width, width) = (self.width(x), self.width(out));
        let order = match order {
            None => None,
            Some(Weight::Order(order)) if order.len() == width && order.iter().all(|&i| (i as usize) < x_width) => {
                Some(order)
            }
            Some(_) => return Err(mismatch("an order of the input columns")),
        };
        let factors = match factors {
            None => None,
            Some(Weight::Vector(factors)) if factors.len() == width => Some(factors),
            Some(_) => return Err(mismatch("a factor for every column")),
        };
        let mut output = std::mem::take(&mut self.buffers[out.0 as usize]);
        for to in part {
            let x = &self.buffers[x.0 as usize][(first + to) * x_width..][..x_width];
            let out = &mut output[to * width..][..width];
            match order {
                Some(order) => out.iter_mut().zip(order).for_each(|(out, &i)| *out = x[i as usize]),
                None => out.copy_from_slice(&x[..width]),
            }
            if let Some(factors) = factors {
                out.iter_mut().zip(factors).for_each(|(out, factor)| *out *= factor);
            }
        }
        self.buffers[out.0 as usize] = output;
        Ok(())
    }

    fn glu(&mut self, x: BufferId, out: BufferId, activation: Activation, part: std::ops::Range<usize>) {
        let width = self.width(out);
        let mut output = std::mem::take(&mut self.buffers[out.0 as usize]);
        let input = &self.buffers[x.0 as usize];
        let rows = input.chunks_exact(2 * width).zip(output.chunks_exact_mut(width));
        for (x, out) in rows.skip(part.start).take(part.len()) {
            let (gate, up) = x.split_at(width);
            for ((&g, u), out) in gate.iter().zip(up).zip(out) {
                *out = activate(activation, g) * u;
            }
        }
        self.buffers[out.0 as usize] = output;
    }
}

fn activate(activation: Activation, v: f32) -> f32 {
    match activation {
        Activation::Silu => v / (1.0 + (-v).exp()),
        // v / 2 * (1 + tanh(z / 2)) is v / (1 + exp(-z)).
        Activation::GeluTanh => v / (1.0 + (-1.595_769 * (v + 0.044_715 * v * v * v)).exp()),
        Activation::Gelu => 0.5 * v * (1.0 + erf(v * std::f32::consts::FRAC_1_SQRT_2)),
    }
}

/// The error function by Abramowitz and Stegun 7.1.26: at most 1.5e-7 off.
fn erf(v: f32) -> f32 {
    let t = 1.0 / (1.0 + 0.327_591_1 * v.abs());
    let coefficients = [1.061_405_4, -1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6];
    let poly = coefficients.iter().fold(0.0, |sum, c| (sum + c) * t);
    v.signum() * (1.0 - poly * (-v * v).exp())
}

/// `cap * tanh(value / cap)`, or the value where there is no cap.
fn softcap(value: f32, cap: Option<f32>) -> f32 {
    match cap {
        Some(cap) => cap * (value / cap).tanh(),
        None => value,
    }
}

/// The program and the uploaded weights disagree; the model loader checks shapes, so this is its bug.
fn mismatch(expected: &str) -> Error {
    Error::new(ErrorKind::InvalidTensor, format!("the program expects {expected} here"))
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
                let result = self.run_op(&weights, op, self.cursor.unit..self.cursor.unit + n);
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
        super::check_kv(&self.program, &self.config, self.kv_type, n, out.len())?;
        let layer_bytes = out.len() / self.caches.len().max(1);
        for (cache, out) in self.caches.iter().zip(out.chunks_exact_mut(layer_bytes.max(1))) {
            cache.save(&self.program.attention, self.config.context as usize, n as usize, out);
        }
        Ok(())
    }

    fn load_kv(&mut self, n: u32, bytes: &[u8]) -> Result<()> {
        super::check_kv(&self.program, &self.config, self.kv_type, n, bytes.len())?;
        self.abandon();
        let layer_bytes = bytes.len() / self.caches.len().max(1);
        for (cache, bytes) in self.caches.iter_mut().zip(bytes.chunks_exact(layer_bytes.max(1))) {
            cache.load(&self.program.attention, self.config.context as usize, n as usize, bytes);
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
