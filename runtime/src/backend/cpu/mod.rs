//! CPU backend: weights stay in their canonical or mapped form, one thread pool a session.

use std::sync::{Arc, Mutex};

use super::{Backend, BackendInfo, BufferId, KvType, Op, Program, Rows, Runner, RunnerConfig, Span, Step, WeightId};
use crate::error::{Error, ErrorKind, Result};
use crate::session::sampler::{self, SampleRequest};
use crate::tensor::Weight;
use kernels::Kernels;
use pool::Pool;

mod attention;
mod kernels;
mod matmul;
mod pool;
#[cfg(target_arch = "x86_64")]
mod x86;

/// Most threads a session gets unless it asks for more: beyond this, decode waits for memory, not for threads.
const DEFAULT_MAX_THREADS: usize = 16;

/// An empty CPU backend.
pub fn open() -> Box<dyn Backend> {
    Box::new(Cpu { weights: Vec::new(), weight_bytes: 0, kernels: kernels::best().into() })
}

struct Cpu {
    weights: Vec<Weight>,
    weight_bytes: u64,
    kernels: Arc<dyn Kernels>,
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

    fn upload(&mut self, name: &str, weight: Weight) -> Result<WeightId> {
        let id = u32::try_from(self.weights.len())
            .map_err(|_| Error::new(ErrorKind::Unsupported, "more than 2^32 weights").in_tensor(name))?;
        self.weight_bytes += match &weight {
            Weight::W4(m) => 4 * (m.qweight.len() + m.group_params.len()) as u64,
            Weight::Dense(m) => m.bytes.len() as u64,
            Weight::Vector(v) => 4 * v.len() as u64,
        };
        self.weights.push(weight);
        Ok(WeightId(id))
    }

    fn runner(self: Arc<Self>, program: &Arc<Program>, config: &RunnerConfig) -> Result<Box<dyn Runner>> {
        Ok(Box::new(CpuRunner::new(self, Arc::clone(program), config)?))
    }
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
    /// Logits rows of the last run.
    logits_rows: usize,
    /// Copy of the logits row that sampling may change.
    sample_row: Vec<f32>,
}

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
        let threads = config
            .threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()).min(DEFAULT_MAX_THREADS));
        let max_tokens = config.max_tokens as usize;
        let context = config.context as usize;
        let shape = program.attention;
        let kv_type = config.kv_type.unwrap_or(KvType::F32);
        let buffers = program
            .buffers
            .iter()
            .map(|desc| {
                let rows = if desc.logits_rows { config.max_logits_rows } else { config.max_tokens } as usize;
                zeros(rows.checked_mul(desc.width as usize), &format!("activation buffer `{}`", desc.name))
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
        let pool = Pool::new(threads);
        let (weights, sums) = (
            matmul::scratch_weights().max(attention::scratch_rows(&shape)),
            matmul::scratch_sums(max_tokens).max(attention::scratch_scores(&shape, context)),
        );
        let scratch = (0..pool.threads())
            .map(|_| {
                Ok(Mutex::new(Scratch {
                    weights: zeros(Some(weights), "scratch memory")?,
                    sums: zeros(Some(sums), "scratch memory")?,
                }))
            })
            .collect::<Result<Vec<_>>>()?;
        let sample_row = zeros(Some(program.vocab_size as usize), "the sampling row")?;
        Ok(Self {
            backend,
            config: config.clone(),
            kv_type,
            pool,
            scratch,
            buffers,
            caches,
            ropes,
            logits_rows: 0,
            sample_row,
            program,
        })
    }

    fn width(&self, buffer: BufferId) -> usize {
        self.program.buffers[buffer.0 as usize].width as usize
    }

    fn run_op(&mut self, op: &Op, step: &Step<'_>) -> Result<()> {
        let n_tokens = step.tokens.len();
        let selected = |rows: Rows| match rows {
            Rows::All => 0..n_tokens,
            Rows::Logits => step.logits.range(n_tokens),
            Rows::Compacted => 0..step.logits.range(n_tokens).len(),
        };
        match *op {
            Op::Embed { table, out } => self.embed(table, out, step.tokens),
            Op::RmsNorm { x, weight, out, dim, segments, eps, rows } => {
                let range = selected(rows);
                self.rms_norm(x, weight, out, (dim as usize, segments as usize), eps, range)
            }
            Op::Linear { x, weight, bias, out, accumulate, rows } => {
                let range = selected(rows);
                self.linear(x, weight, bias, out, accumulate, range)
            }
            Op::RopeAppend { qkv, layer, rope } => {
                let width = self.width(qkv);
                attention::rope_append(
                    &mut self.buffers[qkv.0 as usize][..n_tokens * width],
                    width,
                    &mut self.caches[layer as usize],
                    rope.map(|table| &self.ropes[table as usize][..]),
                    &self.program.attention,
                    self.config.context as usize,
                    step.position as usize,
                    &*self.backend.kernels,
                );
                Ok(())
            }
            Op::Attention { qkv, out, layer, scale, window } => {
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
                        position: step.position as usize,
                        n_tokens,
                        scale,
                        window: window.map_or(usize::MAX, |w| w as usize),
                    },
                    &mut output,
                );
                self.buffers[out.0 as usize] = output;
                Ok(())
            }
            Op::SiluMul { x, out } => {
                self.silu_mul(x, out, n_tokens);
                Ok(())
            }
        }
    }

    fn embed(&mut self, table: WeightId, out: BufferId, tokens: &[u32]) -> Result<()> {
        let width = self.width(out);
        let backend = Arc::clone(&self.backend);
        let Weight::Dense(table) = &backend.weights[table.0 as usize] else { return Err(mismatch("a dense matrix")) };
        for (&token, out) in tokens.iter().zip(self.buffers[out.0 as usize].chunks_exact_mut(width)) {
            let row = &table.bytes[token as usize * table.row_bytes()..][..table.row_bytes()];
            matmul::widen(&*backend.kernels, table.dtype, row, out);
        }
        Ok(())
    }

    fn rms_norm(
        &mut self,
        x: Span,
        weight: WeightId,
        out: Span,
        (dim, segments): (usize, usize),
        eps: f32,
        rows: std::ops::Range<usize>,
    ) -> Result<()> {
        let (x_width, out_width) = (self.width(x.buffer), self.width(out.buffer));
        let in_place = x.buffer == out.buffer;
        let backend = Arc::clone(&self.backend);
        let Weight::Vector(weight) = &backend.weights[weight.0 as usize] else { return Err(mismatch("a vector")) };
        let mut output = std::mem::take(&mut self.buffers[out.buffer.0 as usize]);
        for (to, from) in rows.enumerate() {
            for segment in 0..segments {
                let x_at = from * x_width + x.offset as usize + segment * dim;
                let out_at = to * out_width + out.offset as usize + segment * dim;
                if in_place {
                    output.copy_within(x_at..x_at + dim, out_at);
                } else {
                    output[out_at..out_at + dim].copy_from_slice(&self.buffers[x.buffer.0 as usize][x_at..x_at + dim]);
                }
                let run = &mut output[out_at..out_at + dim];
                let mean = self.backend.kernels.dot(run, run) / dim as f32;
                let factor = 1.0 / (mean + eps).sqrt();
                for (v, w) in run.iter_mut().zip(weight) {
                    *v = *v * factor * w;
                }
            }
        }
        self.buffers[out.buffer.0 as usize] = output;
        Ok(())
    }

    fn linear(
        &mut self,
        x: BufferId,
        weight: WeightId,
        bias: Option<WeightId>,
        out: Span,
        accumulate: bool,
        rows: std::ops::Range<usize>,
    ) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let out_width = self.width(out.buffer);
        let x_width = self.width(x);
        let backend = Arc::clone(&self.backend);
        let bias = match bias {
            Some(id) => match &backend.weights[id.0 as usize] {
                Weight::Vector(v) => Some(&v[..]),
                _ => return Err(mismatch("a vector")),
            },
            None => None,
        };
        let mut output = std::mem::take(&mut self.buffers[out.buffer.0 as usize]);
        let result = matmul::matmul(
            &mut self.pool,
            &self.scratch,
            &*backend.kernels,
            &backend.weights[weight.0 as usize],
            &self.buffers[x.0 as usize][rows.start * x_width..rows.end * x_width],
            rows.len(),
            bias,
            accumulate,
            &mut output[out.offset as usize..],
            out_width,
        );
        self.buffers[out.buffer.0 as usize] = output;
        result
    }

    fn silu_mul(&mut self, x: BufferId, out: BufferId, n_tokens: usize) {
        let width = self.width(out);
        let mut output = std::mem::take(&mut self.buffers[out.0 as usize]);
        let input = &self.buffers[x.0 as usize];
        for (x, out) in input.chunks_exact(2 * width).zip(output.chunks_exact_mut(width)).take(n_tokens) {
            let (gate, up) = x.split_at(width);
            for ((g, u), out) in gate.iter().zip(up).zip(out) {
                *out = g / (1.0 + (-g).exp()) * u;
            }
        }
        self.buffers[out.0 as usize] = output;
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

    fn run(&mut self, step: &Step<'_>) -> Result<()> {
        let program = Arc::clone(&self.program);
        step.check(&program, &self.config)?;
        self.logits_rows = 0;
        for op in &program.ops {
            self.run_op(op, step)?;
        }
        self.logits_rows = step.logits.range(step.tokens.len()).len();
        Ok(())
    }

    fn read_logits(&mut self, out: &mut Vec<f32>) -> Result<()> {
        let vocab = self.program.vocab_size as usize;
        out.clear();
        out.extend_from_slice(&self.buffers[self.program.logits.0 as usize][..self.logits_rows * vocab]);
        Ok(())
    }

    fn sample(&mut self, request: &SampleRequest<'_>) -> Result<u32> {
        let vocab = self.program.vocab_size as usize;
        let last = self
            .logits_rows
            .checked_sub(1)
            .ok_or_else(|| Error::new(ErrorKind::InvalidInput, "the last step computed no logits to sample from"))?;
        self.sample_row.copy_from_slice(&self.buffers[self.program.logits.0 as usize][last * vocab..][..vocab]);
        Ok(sampler::pick(&mut self.sample_row, request))
    }

    fn kv_type(&self) -> KvType {
        self.kv_type
    }

    fn bytes(&self) -> u64 {
        let floats = self.buffers.iter().chain(&self.ropes).map(Vec::len).sum::<usize>() + self.sample_row.len();
        let kv = self.program.layers as u64
            * 2
            * u64::from(self.config.context)
            * u64::from(self.program.attention.kv_heads * self.program.attention.head_dim)
            * self.kv_type.size() as u64;
        4 * floats as u64 + kv
    }
}
