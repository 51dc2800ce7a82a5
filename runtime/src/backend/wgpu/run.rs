//! One step of a program: writes the step's numbers, encodes the planned dispatches, submits them in bounded pieces.

use std::sync::Arc;

use awqua_shaders as shaders;

use super::WgpuBackend;
use super::device::{Gpu, Ticket};
use super::memory::Memory;
use super::plan::Plan;
use super::profile;
use super::readback::Readback;
use super::sampling::Sampler;
use crate::backend::{KvType, OpTime, Program, Runner, RunnerConfig, Step};
use crate::error::{Error, ErrorKind, Result};
use crate::session::sampler::{SampleRequest, pick};

/// Bytes of logits read back at once, unless one row is larger.
const READ_BYTES: u64 = 8 << 20;

/// Most dispatches of a submission: the device begins with the first ones while the host encodes the next.
const DISPATCHES: usize = 128;

/// The session's side of the wgpu backend.
pub(super) struct WgpuRunner {
    backend: Arc<WgpuBackend>,
    program: Arc<Program>,
    config: RunnerConfig,
    memory: Memory,
    plan: Plan,
    sampler: Sampler,
    readback: Readback,
    /// The step uniform of the last run.
    step: shaders::Step,
    /// Ends of the last two runs.
    latest: Option<Ticket>,
    previous: Option<Ticket>,
    /// Copy of the logits row for the sampler on the CPU.
    row: Vec<f32>,
}

impl WgpuRunner {
    /// Allocates and plans.
    ///
    /// # Errors
    /// As [`crate::backend::Backend::runner`].
    pub(super) fn new(backend: Arc<WgpuBackend>, program: &Arc<Program>, config: &RunnerConfig) -> Result<Self> {
        let gpu = &backend.gpu;
        gpu.check()?;
        if config.max_tokens > shaders::MAX_GROUPS || config.max_tokens == 0 || config.context == 0 {
            let message = format!("{} tokens a step of a context of {}", config.max_tokens, config.context);
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let config = RunnerConfig { max_logits_rows: config.max_logits_rows.max(1), ..config.clone() };
        if program.buffers.get(program.logits.0 as usize).is_none_or(|desc| desc.width != program.vocab_size) {
            return Err(Error::new(ErrorKind::InvalidInput, "the logits buffer is not as wide as the vocabulary"));
        }
        let memory = Memory::new(gpu, program, &config)?;
        let plan = Plan::new(&backend, program, &memory, config.max_tokens)?;
        let logits = &memory.activations[program.logits.0 as usize];
        let sampler = Sampler::new(&backend, program.vocab_size, config.context)?;
        let row_bytes = u64::from(logits.stride) * 4;
        let readback = Readback::new(gpu, (READ_BYTES / row_bytes * row_bytes).clamp(row_bytes, logits.buffer.size()))?;
        Ok(Self {
            program: program.clone(),
            config,
            memory,
            plan,
            sampler,
            readback,
            step: shaders::Step { n_tokens: 0, position: 0, logits_start: 0, logits_rows: 0 },
            latest: None,
            previous: None,
            row: Vec::new(),
            backend,
        })
    }

    /// Reads `rows` of the logits into `out`, (rows, vocab_size).
    fn read_rows(&mut self, rows: std::ops::Range<u32>, out: &mut Vec<f32>) -> Result<()> {
        let logits = &self.memory.activations[self.program.logits.0 as usize];
        let stride = logits.stride as usize;
        let at_once = (self.readback.capacity() / (stride as u64 * 4)).max(1) as u32;
        out.clear();
        for first in rows.clone().step_by(at_once as usize) {
            let count = at_once.min(rows.end - first);
            let source = (&logits.buffer, u64::from(first) * stride as u64 * 4);
            self.readback.read(&self.backend.gpu, source, u64::from(count) * stride as u64 * 4, |bytes| {
                for row in bytes.chunks(stride * 4) {
                    let row = &row[..self.program.vocab_size as usize * 4];
                    out.extend(row.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)));
                }
            })?;
        }
        Ok(())
    }

    /// Checks the step and writes its numbers and tokens; what it returns becomes `self.step` once the step has run.
    fn begin(&mut self, step: &Step<'_>) -> Result<shaders::Step> {
        let gpu = &self.backend.gpu;
        gpu.check()?;
        step.check(&self.program, &self.config)?;
        // At most two steps are queued, so that a prompt that is abandoned ends soon.
        if let Some(ticket) = self.previous.take() {
            gpu.wait(&ticket)?;
        }
        let logits = step.logits.range(step.tokens.len());
        let uniform = shaders::Step {
            n_tokens: step.tokens.len() as u32,
            position: step.position,
            logits_start: logits.start as u32,
            logits_rows: logits.len() as u32,
        };
        // Nothing of an unfinished run may be taken for logits.
        self.step = shaders::Step { logits_rows: 0, ..uniform };
        gpu.queue.write_buffer(&self.memory.step, 0, shaders::uniform_bytes(&uniform));
        gpu.queue.write_buffer(&self.memory.tokens, 0, bytemuck::cast_slice(step.tokens));
        Ok(uniform)
    }

    fn last_row(&self) -> Result<u32> {
        let none = || Error::new(ErrorKind::InvalidInput, "the last step computed no logits");
        self.step.logits_rows.checked_sub(1).ok_or_else(none)
    }
}

impl Runner for WgpuRunner {
    fn write_rope(&mut self, table: u32, first: u32, rows: &[f32]) -> Result<()> {
        let buffer = self.memory.rope(table)?;
        let width = self.program.attention.rotary_dim as usize;
        let count = rows.len().checked_div(width).unwrap_or(0);
        if count * width != rows.len() || first as usize + count > self.config.context as usize {
            let message = format!("{} numbers from position {first} do not fit the rotary table", rows.len());
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let offset = u64::from(first) * width as u64 * 4;
        self.backend.gpu.write(buffer, offset, bytemuck::cast_slice(rows))
    }

    fn run(&mut self, step: &Step<'_>) -> Result<()> {
        let uniform = self.begin(step)?;
        let gpu = &self.backend.gpu;
        self.previous = self.latest.take();
        self.latest = submit(gpu, &self.plan, &uniform);
        gpu.check()?;
        self.step = uniform;
        Ok(())
    }

    fn read_logits(&mut self, out: &mut Vec<f32>) -> Result<()> {
        self.backend.gpu.check()?;
        self.read_rows(0..self.step.logits_rows, out)
    }

    fn sample(&mut self, request: &SampleRequest<'_>) -> Result<u32> {
        self.backend.gpu.check()?;
        let row = self.last_row()?;
        if self.sampler.handles(request) {
            let logits = &self.memory.activations[self.program.logits.0 as usize];
            let offset = u64::from(row) * u64::from(logits.stride) * 4;
            return self.sampler.sample(&self.backend.gpu, request, (&logits.buffer, offset), &self.readback);
        }
        let mut values = std::mem::take(&mut self.row);
        let read = self.read_rows(row..row + 1, &mut values);
        let token = read.map(|()| pick(&mut values, request));
        self.row = values;
        token
    }

    fn profile(&mut self, step: &Step<'_>) -> Result<Vec<OpTime>> {
        let uniform = self.begin(step)?;
        let times = profile::run(&self.backend.gpu, &self.plan, &uniform)?;
        self.step = uniform;
        Ok(times)
    }

    fn kv_type(&self) -> KvType {
        self.memory.kv_type
    }

    fn bytes(&self) -> u64 {
        self.memory.bytes + self.plan.bytes + self.sampler.bytes() + self.readback.capacity()
    }
}

/// Encodes every dispatch of the step; a new submission begins whenever the last one is long enough, because systems
/// reset devices that work on one for seconds, and others want to use the device too.
fn submit(gpu: &Gpu, plan: &Plan, step: &shaders::Step) -> Option<Ticket> {
    let budget = gpu.submission_flops;
    let mut dispatches = plan.ops.iter().flat_map(|op| op.dispatches(step)).peekable();
    let mut ticket = None;
    while dispatches.peek().is_some() {
        let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("step") });
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            let mut flops = 0;
            for dispatch in dispatches.by_ref().take(DISPATCHES) {
                let launch = dispatch.launch(step);
                let [x, y, z] = launch.grid;
                pass.set_pipeline(&dispatch.pipeline.compute);
                pass.set_bind_group(0, &dispatch.bind_group, &[]);
                pass.dispatch_workgroups(x, y, z);
                flops += launch.cost.flops;
                if flops >= budget {
                    break;
                }
            }
        }
        ticket = Some(gpu.submit(Some(encoder.finish())));
    }
    ticket
}
