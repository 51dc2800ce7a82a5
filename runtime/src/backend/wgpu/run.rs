//! One step of a program: writes the step's numbers, encodes the planned dispatches, submits them in bounded pieces.

mod cache;

use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use awqua_shaders as shaders;
use awqua_shaders::RowMode;

use super::WgpuBackend;
use super::choices::PassTokens;
use super::device::Ticket;
use super::memory::{self, Memory, Prefix};
use super::pace::{self, Pace};
use super::plan::{MOST_FEW_ROWS, Plan, PlannedOp};
use super::profile;
use super::readback::Readback;
use super::sampling::{self, Sampler};
use crate::backend::forks::Lent;
use crate::backend::{
    Backend, Budget, BufferId, KvType, LogitsRows, MAX_AHEAD, Op, OpTime, Program, Progress, Runner, RunnerConfig,
    Shared, Sharing, Step, check_kv,
};
use crate::error::{Error, ErrorKind, Result};
use crate::session::sampler::{KeptRequest, SampleRequest, pick_in};

/// Bytes of logits read back at once, unless one row is larger.
const READ_BYTES: u64 = 8 << 20;
/// Bytes of a token.
const TOKEN_BYTES: u64 = 4;

/// Bytes of the readback buffer for logits of `row_bytes` a row and `all` bytes.
fn readback_bytes(row_bytes: u64, all: u64) -> u64 {
    (READ_BYTES / row_bytes.max(1) * row_bytes).clamp(row_bytes, all.max(row_bytes))
}

/// Bytes of device memory that a session takes, from above: what is staged between kernels depends on the weights.
pub(super) fn bytes(program: &Program, config: &RunnerConfig) -> u64 {
    let vocab = u64::from(program.vocab_size);
    let rows = u64::from(config.max_logits_rows);
    let hidden = program.last_hidden().map_or(0, |id| u64::from(program.buffers[id.0 as usize].width) * 4 * rows);
    let readback = readback_bytes(vocab * 4, vocab * 4 * rows).max(hidden);
    let widths = program.buffers.iter().map(|desc| u64::from(desc.width) * u64::from(desc.per_token)).sum::<u64>();
    // Rows by expert and their tiles, of which there is at most one a row.
    let per_token = program.buffers.iter().map(|desc| desc.per_token).max().unwrap_or(1);
    let by_expert = u64::from(config.max_tokens).saturating_mul(u64::from(per_token) * 20 * 2);
    // Staged rows of few tokens in f32 with their sums, halves of many, and a uniform block for every dispatch.
    let staged =
        widths.saturating_mul(5 * u64::from(MOST_FEW_ROWS) + 2 * u64::from(config.max_tokens.next_multiple_of(128)));
    let uniforms = 256 * 8 * program.ops.len() as u64;
    memory::bytes(program, config)
        .saturating_add(sampling::bytes(program.vocab_size, config.context))
        .saturating_add(readback)
        .saturating_add(staged)
        .saturating_add(if per_token > 1 { by_expert } else { 0 })
        .saturating_add(uniforms)
}

/// Most dispatches of the first submission: the device begins with them while the host encodes the others.
const DISPATCHES_FIRST: u32 = 32;
/// Most dispatches of a submission while the device has something to do: each costs it some microseconds.
const DISPATCHES: u32 = 1024;
/// The same under a deadline, which is looked at between submissions.
const DISPATCHES_TIMED: u32 = 48;

/// The session's side of the wgpu backend.
pub(super) struct WgpuRunner {
    pub(super) backend: Arc<WgpuBackend>,
    program: Arc<Program>,
    pub(super) config: RunnerConfig,
    pub(super) memory: Memory,
    pub(super) plan: Plan,
    sampler: Sampler,
    readback: Readback,
    /// The step uniform of the last run.
    step: shaders::Step,
    /// Ends of the last two runs.
    latest: Option<Ticket>,
    previous: Option<Ticket>,
    pace: Pace,
    /// Next operation of the step under way, behind the last one if there is none, and its next dispatch.
    next: (usize, usize),
    /// The step under way has been queued as a whole or there is none.
    queued: bool,
    /// Whether the step computes hidden states and no logits.
    hidden_only: bool,
    /// Whether the last step was one of several sessions, which leaves logits here and nothing else.
    in_pass: bool,
    choice: Choice,
    /// Copy of the logits row for the sampler on the CPU, and its memory.
    row: Vec<f32>,
    candidates: Vec<(f32, u32)>,
    /// The ways back of tokens sampled ahead, taken in turn.
    token_slots: [Readback; MAX_AHEAD],
    /// Tokens sampled ahead, the oldest first.
    ahead: VecDeque<Ahead>,
    /// Slot of the next one.
    next_slot: usize,
    /// Whether a pass makes the last one, and who chooses if that has not begun.
    ahead_in_pass: bool,
    choosing: Option<Choosing>,
    /// Commands in front of the next submission, with the ticket of those that went last, and behind the last one of a step.
    pub(super) lead: Vec<wgpu::CommandBuffer>,
    pub(super) led: Option<Ticket>,
    pub(super) tail: Option<wgpu::CommandBuffer>,
    /// A copy of the first positions that forks share, as long as they are what it holds.
    lent: Lent<Prefix>,
}

/// Where a token sampled ahead comes to the host.
#[derive(Clone)]
enum Ahead {
    /// In this slot.
    Slot(usize),
    /// In this row of a pass.
    Pass(Arc<PassTokens>, usize),
}

/// A choice that is not submitted yet.
pub(super) enum Choosing {
    /// By these commands.
    Commands(wgpu::CommandEncoder),
    /// By the pass.
    Pass,
}

/// The choice under way.
enum Choice {
    None,
    /// By the kernels.
    Device,
    /// By the kernels, ahead for a pass that did not come.
    Ahead(Ahead),
    /// By the CPU, once the row has come.
    Host(Box<KeptRequest>),
    /// None: hidden states are on their way instead.
    Hidden,
}

impl WgpuRunner {
    /// Allocates and plans.
    ///
    /// # Errors
    /// As [`crate::backend::Backend::runner`].
    pub(super) fn new(backend: Arc<WgpuBackend>, program: &Arc<Program>, config: &RunnerConfig) -> Result<Self> {
        Self::behind(backend, program, config, None)
    }

    /// As [`Self::new`], behind positions that are there already.
    fn behind(
        backend: Arc<WgpuBackend>,
        program: &Arc<Program>,
        config: &RunnerConfig,
        prefix: Option<Arc<Prefix>>,
    ) -> Result<Self> {
        let gpu = &backend.gpu;
        gpu.check()?;
        let per_token = program.buffers.iter().map(|desc| desc.per_token).max().unwrap_or(1);
        let rows = config.max_tokens.saturating_mul(per_token);
        if rows > shaders::MAX_GROUPS || config.max_tokens == 0 || config.context == 0 {
            let message = format!("{} tokens a step of a context of {}", config.max_tokens, config.context);
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let config = RunnerConfig { max_logits_rows: config.max_logits_rows.max(1), ..config.clone() };
        if program.buffers.get(program.logits.0 as usize).is_none_or(|desc| desc.width != program.vocab_size) {
            return Err(Error::new(ErrorKind::InvalidInput, "the logits buffer is not as wide as the vocabulary"));
        }
        let memory = Memory::new(gpu, program, &config, prefix)?;
        let plan = Plan::new(&backend, program, &memory, config.max_tokens)?;
        Self::with(backend, program, config, memory, plan)
    }

    /// What computes rows of several sessions, whose caches are theirs; `places` as in [`Plan::for_passes`].
    ///
    /// # Errors
    /// As [`Self::new`].
    pub(super) fn for_passes(
        backend: Arc<WgpuBackend>,
        program: &Arc<Program>,
        config: &RunnerConfig,
        places: &wgpu::Buffer,
    ) -> Result<Self> {
        // Rotary tables hold the rows of the members' positions.
        let own = RunnerConfig { context: config.max_tokens, ..config.clone() };
        let without = Arc::new(Program { layers: 0, ..(**program).clone() });
        let memory = Memory::new(&backend.gpu, &without, &own, None)?;
        let plan = Plan::for_passes(&backend, program, &memory, config, places)?;
        Self::with(backend, &without, own, memory, plan)
    }

    fn with(
        backend: Arc<WgpuBackend>,
        program: &Arc<Program>,
        config: RunnerConfig,
        memory: Memory,
        plan: Plan,
    ) -> Result<Self> {
        let gpu = &backend.gpu;
        let logits = &memory.activations[program.logits.0 as usize];
        let sampler = Sampler::new(&backend, program.vocab_size, config.context, &logits.buffer, &memory.tokens)?;
        let hidden = program.last_hidden().map_or(0, |id| memory.activations[id.0 as usize].buffer.size());
        let rows = readback_bytes(u64::from(logits.stride) * 4, logits.buffer.size());
        let readback = Readback::new(gpu, rows.max(hidden))?;
        Ok(Self {
            program: program.clone(),
            config,
            memory,
            sampler,
            readback,
            step: shaders::Step { n_tokens: 0, position: 0, logits_start: 0, logits_rows: 0 },
            latest: None,
            previous: None,
            pace: Pace::new(gpu)?,
            next: (plan.ops.len(), 0),
            plan,
            queued: true,
            hidden_only: false,
            in_pass: false,
            choice: Choice::None,
            row: Vec::new(),
            candidates: Vec::new(),
            token_slots: [Readback::new(gpu, 16)?, Readback::new(gpu, 16)?],
            ahead: VecDeque::new(),
            next_slot: 0,
            ahead_in_pass: false,
            choosing: None,
            lead: Vec::new(),
            led: None,
            tail: None,
            lent: Lent::new(),
            backend,
        })
    }

    /// Reads `rows` of `buffer`, `width` elements of each, into `out`.
    fn read_rows(&mut self, buffer: BufferId, rows: std::ops::Range<u32>, out: &mut Vec<f32>) -> Result<()> {
        let source = &self.memory.activations[buffer.0 as usize];
        let width = self.program.buffers[buffer.0 as usize].width as usize;
        let stride = source.stride as usize;
        let at_once = (self.readback.capacity() / (stride as u64 * 4)).max(1) as u32;
        out.clear();
        for first in rows.clone().step_by(at_once as usize) {
            let count = at_once.min(rows.end - first);
            let source = (&source.buffer, u64::from(first) * stride as u64 * 4);
            self.readback.read(&self.backend.gpu, source, u64::from(count) * stride as u64 * 4, |bytes| {
                for row in bytes.chunks(stride * 4) {
                    out.extend(row[..width * 4].as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)));
                }
            })?;
        }
        Ok(())
    }

    fn last_row(&self) -> Result<u32> {
        let none = || Error::new(ErrorKind::InvalidInput, "the last step computed no logits");
        self.step.logits_rows.checked_sub(1).filter(|_| self.queued && !self.hidden_only).ok_or_else(none)
    }

    /// Whether a planned operation takes part in the step.
    fn takes_part(&self, op: &PlannedOp) -> bool {
        !(self.hidden_only && op.rows() == RowMode::Compacted)
    }

    /// Encodes and submits dispatches from `next` on, up to `most` seconds of them (but one at least) and up to the
    /// length of a submission, because systems reset devices that work on one for seconds, and others want to use the
    /// device too.
    fn submit(&mut self, most: f64, dispatches: u32, bounded: bool) {
        let (gpu, step) = (&self.backend.gpu, self.step);
        let class = pace::class(step.n_tokens);
        let slot = self.pace.begin(class, bounded);
        let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("step") });
        let (mut flops, mut count) = (0, 0);
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                label: None,
                timestamp_writes: self.pace.writes(slot),
            });
            'encoding: while let Some(op) = self.plan.ops.get(self.next.0) {
                let all = if self.takes_part(op) { op.dispatches(&step) } else { &[] };
                while let Some(dispatch) = all.get(self.next.1) {
                    let launch = dispatch.launch(&step);
                    if launch.is_nothing() {
                        self.next.1 += 1;
                        continue;
                    }
                    let over = self.pace.estimate(class, flops + launch.cost.flops, count + 1) > most;
                    if count > 0 && (over || count >= dispatches || flops >= gpu.submission_flops) {
                        break 'encoding;
                    }
                    let [x, y, z] = launch.grid;
                    pass.set_pipeline(&dispatch.pipeline.compute);
                    pass.set_bind_group(0, &dispatch.bind_group, &[]);
                    pass.dispatch_workgroups(x, y, z);
                    flops += launch.cost.flops;
                    count += 1;
                    self.next.1 += 1;
                }
                self.next = (self.next.0 + 1, 0);
            }
        }
        if count > 0 {
            self.pace.resolve(&mut encoder, slot);
            let led = !self.lead.is_empty();
            let tail = self.tail.take_if(|_| self.next.0 == self.plan.ops.len());
            let ticket = gpu.submit(self.lead.drain(..).chain([encoder.finish()]).chain(tail));
            self.pace.submitted(&ticket, class, flops, count, slot);
            if led {
                self.led = Some(ticket.clone());
            }
            self.latest = Some(ticket);
        }
    }

    /// Submits what leads the next submission by itself, if there is anything.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn submit_lead(&mut self) -> Result<()> {
        if !self.lead.is_empty() {
            self.led = Some(self.backend.gpu.submit(self.lead.drain(..)));
        }
        self.backend.gpu.check()
    }

    /// The ticket of the end of a step that is queued as a whole, what comes behind it included.
    pub(super) fn finish_step(&mut self) -> Ticket {
        let gpu = &self.backend.gpu;
        if let Some(tail) = self.tail.take() {
            self.latest = Some(gpu.submit(Some(tail)));
        }
        self.latest.get_or_insert_with(|| gpu.submit(None)).clone()
    }

    /// Queues what the budget allows of the step, with what leads it, which goes by itself where there is a budget.
    ///
    /// # Errors
    /// As [`Runner::advance`].
    pub(super) fn queue(&mut self, budget: &Budget) -> Result<Progress> {
        let bounded = budget.deadline.is_some() || budget.device.is_some();
        if bounded {
            self.submit_lead()?;
        }
        let mut begun = false;
        while self.next.0 < self.plan.ops.len() {
            if begun && budget.is_over() {
                return Ok(Progress::Working);
            }
            let Some(most) = self.room(budget)? else { return Ok(Progress::Waiting) };
            let dispatches = match budget.deadline {
                Some(_) => DISPATCHES_TIMED,
                None if self.backend.gpu.looked_idle() => DISPATCHES_FIRST,
                None => DISPATCHES,
            };
            self.submit(most, dispatches, bounded);
            begun = true;
        }
        self.submit_lead()?;
        self.queued = true;
        Ok(Progress::Done)
    }

    /// Forgets choices under way.
    fn forget(&mut self) {
        self.readback.cancel();
        self.choice = Choice::None;
        (self.choosing, self.ahead_in_pass) = (None, false);
        self.lead.clear();
        (self.led, self.tail) = (None, None);
        self.token_slots.iter().for_each(Readback::cancel);
        self.ahead.clear();
    }

    /// Begins the step.
    pub(super) fn start(&mut self, step: shaders::Step) {
        self.step = step;
        self.backend.gpu.queue.write_buffer(&self.memory.step, 0, shaders::uniform_bytes(&step));
        self.previous = self.latest.take();
        self.next = (0, 0);
        self.queued = false;
        (self.hidden_only, self.in_pass) = (false, false);
    }

    /// Seconds of work that may be queued now; `None` if nothing may.
    pub(super) fn room(&mut self, budget: &Budget) -> Result<Option<f64>> {
        let finished = self.backend.gpu.finished()?;
        self.pace.settle(finished);
        Ok(match budget.device {
            Some(device) => {
                let queued = self.pace.queued();
                match device.checked_sub(queued) {
                    Some(left) if !left.is_zero() => Some(left.as_secs_f64()),
                    _ if queued.is_zero() => Some(0.0),
                    _ => None,
                }
            }
            // At most two steps of a prompt are queued, so that one that is abandoned ends soon.
            None if self.ahead.is_empty()
                && self.previous.as_ref().is_some_and(|previous| previous.number() > finished) =>
            {
                None
            }
            None => Some(f64::INFINITY),
        })
    }

    /// Whether the kernels can choose a token for the step at `position` ahead of the host.
    fn goes_ahead(&self, request: &SampleRequest<'_>, position: u32) -> bool {
        self.sampler.handles(request) && self.ahead.len() < MAX_AHEAD && position < self.config.context
    }

    /// Encodes the choice of a token from the last logits, which goes in front of the tokens, where a step looks for it,
    /// and on its way to the host.
    fn encode_ahead(&mut self, request: &SampleRequest<'_>) -> Result<wgpu::CommandEncoder> {
        let first = self.last_row()? * self.memory.activations[self.program.logits.0 as usize].stride;
        if sampling::is_plain(request) {
            return Ok(self.encode_best(first));
        }
        let (logits, _) = self.logits();
        let mut encoder = self.sampler.encode(&self.backend.gpu, request, (logits, u64::from(first) * 4));
        encoder.copy_buffer_to_buffer(self.sampler.result(), 0, &self.memory.tokens, 0, TOKEN_BYTES);
        self.bring_ahead(&mut encoder);
        Ok(encoder)
    }

    /// The same for the token with the best score of the row from element `first` on.
    fn encode_best(&mut self, first: u32) -> wgpu::CommandEncoder {
        let mut encoder = self.sampler.encode_plain(&self.backend.gpu, first);
        self.bring_ahead(&mut encoder);
        encoder
    }

    fn bring_ahead(&mut self, encoder: &mut wgpu::CommandEncoder) {
        self.token_slots[self.next_slot].bring(encoder, &[(&self.memory.tokens, 0, TOKEN_BYTES)]);
        self.ahead.push_back(Ahead::Slot(self.next_slot));
        self.next_slot = (self.next_slot + 1) % MAX_AHEAD;
    }

    /// Takes note that the commands of the last choice ahead are submitted.
    pub(super) fn went_ahead(&mut self, ticket: &Ticket) {
        if let Some(Ahead::Slot(slot)) = self.ahead.back() {
            self.token_slots[*slot].expect(ticket, TOKEN_BYTES);
        }
    }

    /// The token on its way, if it is there.
    fn look_ahead(&self, ahead: &Ahead) -> Result<Option<u32>> {
        let gpu = &self.backend.gpu;
        match ahead {
            Ahead::Slot(slot) => self.sampler.poll(gpu, &self.token_slots[*slot]),
            Ahead::Pass(tokens, row) => tokens.poll(gpu, *row),
        }
    }

    fn wait_ahead(&self, ahead: &Ahead) -> Result<()> {
        let gpu = &self.backend.gpu;
        match ahead {
            Ahead::Slot(slot) => self.token_slots[*slot].wait(gpu),
            Ahead::Pass(tokens, _) => tokens.wait(gpu),
        }
    }

    /// Makes ready for a pass over the token at `position`, which the host knows.
    ///
    /// # Errors
    /// As [`Self::overwrite`].
    pub(super) fn join_pass(&mut self, position: u32) -> Result<()> {
        self.overwrite(position)?;
        self.abandon();
        Ok(())
    }

    /// Has a pass choose the token, as its row `row`, for its step at `position`: by itself where the best score decides,
    /// and then the token comes back with `back`, else by commands of [`Self::take_choosing`] that leave it in that row of
    /// `tokens`. False, with nothing done, as [`Runner::begin_ahead`] says.
    ///
    /// # Errors
    /// As [`Runner::begin_ahead`].
    pub(super) fn choose_in_pass(
        &mut self,
        request: &SampleRequest<'_>,
        position: u32,
        row: usize,
        tokens: &wgpu::Buffer,
        back: &Arc<PassTokens>,
    ) -> Result<bool> {
        let last = self.last_row()?;
        if !self.goes_ahead(request, position) {
            return Ok(false);
        }
        self.choosing = Some(if last == 0 && sampling::is_plain(request) {
            self.ahead.push_back(Ahead::Pass(Arc::clone(back), row));
            Choosing::Pass
        } else {
            let mut encoder = self.encode_ahead(request)?;
            encoder.copy_buffer_to_buffer(&self.memory.tokens, 0, tokens, row as u64 * TOKEN_BYTES, TOKEN_BYTES);
            Choosing::Commands(encoder)
        });
        self.ahead_in_pass = true;
        Ok(true)
    }

    /// What is left to do for [`Self::choose_in_pass`]; [`Self::went_ahead`] has to follow once it is submitted.
    pub(super) fn take_choosing(&mut self) -> Option<Choosing> {
        self.choosing.take()
    }

    /// A pass over the token at `position` is submitted, the last of it with this ticket, and leaves its logits here.
    pub(super) fn end_pass(&mut self, position: u32, ticket: &Ticket) {
        self.step = shaders::Step { n_tokens: 1, position, logits_start: 0, logits_rows: 1 };
        self.next = (self.plan.ops.len(), 0);
        self.queued = true;
        (self.hidden_only, self.in_pass, self.ahead_in_pass) = (false, true, false);
        (self.previous, self.latest) = (None, Some(ticket.clone()));
    }

    /// The logits, and bytes from one row to the next.
    pub(super) fn logits(&self) -> (&wgpu::Buffer, u64) {
        let logits = &self.memory.activations[self.program.logits.0 as usize];
        (&logits.buffer, u64::from(logits.stride) * 4)
    }

    /// Device time of the operations of the step that was begun.
    ///
    /// # Errors
    /// As [`profile::run`].
    pub(super) fn profile_plan(&self) -> Result<Vec<OpTime>> {
        profile::run(&self.backend.gpu, &self.plan, &self.step)
    }

    /// Has the next step queued whatever became of the one before.
    pub(super) fn forget_previous(&mut self) {
        self.previous = None;
    }

    /// Positions of which a split of few tokens never has a part only.
    fn grain(&self) -> u32 {
        shaders::attention::split_len(1, self.config.context)
    }

    /// Positions that a fork with `n` of them shares, and the copy of them if there is one already.
    fn to_share(&self, n: u32, sharing: Sharing) -> (u32, Option<Arc<Prefix>>) {
        // Over one cache, matrix units and subgroups sum in other orders, and so do windows, which begin anywhere.
        let windows = || self.program.ops.iter().any(|op| matches!(op, Op::Attention { window: Some(_), .. }));
        let one_cache = self.backend.coop || self.backend.reduce == shaders::Reduce::Subgroup;
        match sharing {
            Sharing::Never => return (0, None),
            Sharing::Exact if one_cache && !self.config.share_forks || windows() => return (0, None),
            Sharing::Exact | Sharing::Always => {}
        }
        self.lent.to_share(self.memory.prefix.as_ref(), n, self.grain())
    }

    /// Forgets the copy that forks share if a step at `position` makes it another one's.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] where this session shares the position itself.
    fn overwrite(&mut self, position: u32) -> Result<()> {
        self.lent.overwrite(self.memory.prefix.as_ref(), position)
    }
}

impl Drop for WgpuRunner {
    fn drop(&mut self) {
        self.memory.destroy_caches();
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
        self.backend.gpu.check()?;
        self.backend.gpu.queue.write_buffer(buffer, offset, bytemuck::cast_slice(rows));
        Ok(())
    }

    fn begin(&mut self, step: &Step<'_>) -> Result<()> {
        let _watch = self.backend.gpu.watch();
        self.backend.check()?;
        step.check(&self.program, &self.config)?;
        self.overwrite(step.position)?;
        self.forget();
        let logits = step.logits.range(step.tokens.len());
        self.backend.gpu.queue.write_buffer(&self.memory.tokens, 0, bytemuck::cast_slice(step.tokens));
        self.start(shaders::Step {
            n_tokens: step.tokens.len() as u32,
            position: step.position,
            logits_start: logits.start as u32,
            logits_rows: logits.len() as u32,
        });
        self.hidden_only = step.logits == LogitsRows::Hidden;
        Ok(())
    }

    fn advance(&mut self, budget: &Budget) -> Result<Progress> {
        let _watch = self.backend.gpu.watch();
        self.backend.check()?;
        let commands = |choosing: &mut Choosing| matches!(choosing, Choosing::Commands(_));
        if let Some(Choosing::Commands(encoder)) = self.choosing.take_if(commands) {
            self.lead.push(encoder.finish());
        }
        // A submission costs the device some microseconds, so a choice goes with its step. The token comes with the step's
        // end then, which delays nobody where another one was chosen before it and is still on its way.
        if self.ahead.len() < MAX_AHEAD {
            self.submit_lead()?;
        }
        let progress = self.queue(budget);
        if let Some(ticket) = self.led.take() {
            self.went_ahead(&ticket);
        }
        progress
    }

    fn abandon(&mut self) {
        self.next = (self.plan.ops.len(), 0);
        self.forget();
    }

    fn wait(&mut self) -> Result<()> {
        let gpu = &self.backend.gpu;
        let _watch = gpu.watch();
        // The last one may not have begun.
        if let Some(ahead) = self.ahead.front().filter(|_| self.ahead.len() > usize::from(self.choosing.is_some())) {
            return self.wait_ahead(ahead);
        }
        match &self.choice {
            Choice::None => {}
            Choice::Ahead(ahead) => return self.wait_ahead(ahead),
            _ => return self.readback.wait(gpu),
        }
        // The previous step if it is still there, so that the device has the latest one to go on with.
        let finished = gpu.finished()?;
        match self.previous.take_if(|ticket| ticket.number() > finished).or_else(|| self.latest.take()) {
            Some(ticket) => gpu.wait(&ticket),
            None => Ok(()),
        }
    }

    fn chunk(&self, position: u32, wanted: usize, device: Duration) -> usize {
        let mut n = wanted.min(self.config.max_tokens as usize).max(1) as u32;
        while n > 1 {
            let step = shaders::Step { n_tokens: n, position, logits_start: n - 1, logits_rows: 1 };
            let dispatches = self.plan.ops.iter().flat_map(|op| op.dispatches(&step));
            let largest = dispatches.map(|dispatch| dispatch.launch(&step).cost.flops).max().unwrap_or(0);
            if self.pace.estimate(pace::class(n), largest, 1) <= device.as_secs_f64() {
                break;
            }
            n = n.div_ceil(2);
        }
        n as usize
    }

    fn queued(&mut self) -> Result<Duration> {
        self.pace.settle(self.backend.gpu.finished()?);
        Ok(self.pace.queued())
    }

    fn read_logits(&mut self, out: &mut Vec<f32>) -> Result<()> {
        self.backend.gpu.check()?;
        let rows = if self.queued && !self.hidden_only { self.step.logits_rows } else { 0 };
        self.read_rows(self.program.logits, 0..rows, out)
    }

    fn begin_hidden(&mut self) -> Result<()> {
        let gpu = &self.backend.gpu;
        let _watch = gpu.watch();
        gpu.check()?;
        self.choice = Choice::None;
        if self.in_pass {
            return Err(Error::new(ErrorKind::InvalidInput, "a pass of several sessions leaves no hidden states"));
        }
        let hidden = &self.memory.activations[self.program.last_hidden()?.0 as usize];
        let rows = if self.queued { self.step.logits_rows } else { 0 };
        let bytes = u64::from(rows) * u64::from(hidden.stride) * 4;
        if bytes == 0 || bytes > self.readback.capacity() {
            return Err(Error::new(ErrorKind::InvalidInput, format!("the last step has {rows} rows of hidden states")));
        }
        let encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("hidden") });
        self.readback.begin(gpu, encoder, &[(&hidden.buffer, 0, bytes)])?;
        self.choice = Choice::Hidden;
        Ok(())
    }

    fn poll_hidden(&mut self, out: &mut Vec<f32>) -> Result<bool> {
        let gpu = &self.backend.gpu;
        let _watch = gpu.watch();
        self.pace.settle(gpu.finished()?);
        if !matches!(self.choice, Choice::Hidden) {
            return Err(Error::new(ErrorKind::InvalidInput, "no hidden states were asked for"));
        }
        let buffer = self.program.last_hidden()?.0 as usize;
        let stride = self.memory.activations[buffer].stride as usize * 4;
        let width = self.program.buffers[buffer].width as usize * 4;
        let there = self.readback.poll(gpu, |bytes| {
            for row in bytes.chunks(stride) {
                out.extend(row[..width].as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)));
            }
        });
        if !matches!(there, Ok(false)) {
            self.choice = Choice::None;
        }
        there
    }

    fn begin_sample(&mut self, request: &SampleRequest<'_>) -> Result<()> {
        let gpu = &self.backend.gpu;
        gpu.check()?;
        let row = self.last_row()?;
        let (logits, row_bytes) = self.logits();
        let offset = u64::from(row) * row_bytes;
        if self.sampler.handles(request) {
            self.sampler.begin(gpu, request, (logits, offset), &self.readback)?;
            self.choice = Choice::Device;
            return Ok(());
        }
        let encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("logits") });
        self.readback.begin(gpu, encoder, &[(logits, offset, row_bytes)])?;
        self.choice = Choice::Host(Box::new(request.kept()));
        Ok(())
    }

    fn poll_sample(&mut self) -> Result<Option<u32>> {
        let gpu = &self.backend.gpu;
        let finished = gpu.finished()?;
        self.pace.settle(finished);
        let token = match &self.choice {
            Choice::None | Choice::Hidden => {
                return Err(Error::new(ErrorKind::InvalidInput, "no choice is under way"));
            }
            Choice::Device => self.sampler.poll(gpu, &self.readback),
            Choice::Ahead(ahead) => self.look_ahead(ahead),
            Choice::Host(choice) => {
                let vocab = self.program.vocab_size as usize;
                let row = &mut self.row;
                let there = self.readback.poll(gpu, |bytes| {
                    row.clear();
                    row.extend(bytes[..vocab * 4].as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)));
                });
                there.map(|there| there.then(|| pick_in(row, &choice.as_request(), &mut self.candidates)))
            }
        };
        if !matches!(token, Ok(None)) {
            self.choice = Choice::None;
        }
        token
    }

    fn begin_ahead(&mut self, request: &SampleRequest<'_>, position: u32) -> Result<bool> {
        let gpu = &self.backend.gpu;
        let _watch = gpu.watch();
        self.backend.check()?;
        let _ = self.last_row()?;
        if !self.goes_ahead(request, position) {
            return Ok(false);
        }
        self.choosing = Some(Choosing::Commands(self.encode_ahead(request)?));
        self.start(shaders::Step { n_tokens: 1, position, logits_start: 0, logits_rows: 1 });
        Ok(true)
    }

    fn poll_ahead(&mut self) -> Result<Option<u32>> {
        let gpu = &self.backend.gpu;
        let _watch = gpu.watch();
        let Some(ahead) = self.ahead.front() else {
            return Err(Error::new(ErrorKind::InvalidInput, "no token was chosen ahead"));
        };
        self.pace.settle(gpu.finished()?);
        if self.ahead.len() == 1 && self.choosing.is_some() {
            return Ok(None);
        }
        let token = self.look_ahead(ahead)?;
        if token.is_some() {
            self.ahead.pop_front();
        }
        Ok(token)
    }

    fn retract_ahead(&mut self) -> Result<()> {
        let gpu = self.backend.gpu.clone();
        let _watch = gpu.watch();
        if !std::mem::take(&mut self.ahead_in_pass) {
            return Err(Error::new(ErrorKind::InvalidInput, "no token was chosen ahead in a pass"));
        }
        let commands = match self.take_choosing() {
            Some(Choosing::Commands(encoder)) => Some(encoder),
            Some(Choosing::Pass) => {
                self.ahead.pop_back();
                Some(self.encode_best(0))
            }
            None => None,
        };
        if let Some(encoder) = commands {
            let ticket = gpu.submit(Some(encoder.finish()));
            gpu.check()?;
            self.went_ahead(&ticket);
        }
        if let Some(ahead) = self.ahead.pop_back() {
            self.choice = Choice::Ahead(ahead);
        }
        Ok(())
    }

    fn profile(&mut self, step: &Step<'_>) -> Result<Vec<OpTime>> {
        self.begin(step)?;
        self.next = (self.plan.ops.len(), 0);
        let times = self.profile_plan()?;
        self.queued = true;
        Ok(times)
    }

    fn save_kv(&mut self, n: u32, out: &mut [u8]) -> Result<()> {
        check_kv(&self.program, &self.config, self.memory.kv_type, n, out.len())?;
        self.save_positions(n, out)
    }

    fn load_kv(&mut self, n: u32, bytes: &[u8]) -> Result<()> {
        check_kv(&self.program, &self.config, self.memory.kv_type, n, bytes.len())?;
        self.overwrite(0)?;
        self.abandon();
        self.load_positions(n, bytes)
    }

    fn fork(&mut self, n: u32, sharing: Sharing) -> Result<Box<dyn Runner>> {
        let prefix = match self.to_share(n, sharing) {
            (_, Some(prefix)) => Some(prefix),
            (0, None) => None,
            (len, None) => Some(Arc::new(self.copy_prefix(len)?)),
        };
        let shared = prefix.as_ref().map_or(0, |prefix| prefix.len);
        if let Some(prefix) = &prefix {
            self.lent.lend(prefix);
        }
        let fork = Self::behind(Arc::clone(&self.backend), &self.program, &self.config, prefix)?;
        let gpu = &self.backend.gpu;
        let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("fork") });
        self.copy_positions(shared..n, &fork, &mut encoder)?;
        for table in 0..self.program.rope_tables {
            let (from, to) = (self.memory.rope(table)?, fork.memory.rope(table)?);
            encoder.copy_buffer_to_buffer(from, 0, to, 0, from.size());
        }
        gpu.submit(Some(encoder.finish()));
        gpu.check()?;
        Ok(Box::new(fork))
    }

    fn fork_bytes(&self, n: u32, sharing: Sharing) -> u64 {
        let (len, there) = self.to_share(n, sharing);
        let copied = if there.is_some() { 0 } else { Prefix::bytes(&self.program, self.memory.kv_type, len) };
        let own = memory::bytes_behind(&self.program, &self.config, len);
        self.bytes() - self.memory.bytes + own + copied
    }

    fn shared(&self) -> Option<Shared> {
        let prefix = self.memory.prefix.as_ref()?;
        Some(Shared { id: Arc::as_ptr(prefix) as usize, positions: prefix.len, bytes: prefix.bytes })
    }

    fn rebind(&mut self, backend: Arc<dyn Backend>) -> Result<bool> {
        let backend: Arc<dyn Any + Send + Sync> = backend;
        let Some(backend) = backend.downcast::<WgpuBackend>().ok().filter(|b| Arc::ptr_eq(&b.gpu, &self.backend.gpu))
        else {
            return Ok(false);
        };
        let _watch = backend.gpu.watch();
        self.abandon();
        self.plan = Plan::new(&backend, &self.program, &self.memory, self.config.max_tokens)?;
        self.next = (self.plan.ops.len(), 0);
        self.backend = backend;
        Ok(true)
    }

    fn kv_type(&self) -> KvType {
        self.memory.kv_type
    }

    fn bytes(&self) -> u64 {
        self.memory.bytes + self.plan.bytes + self.sampler.bytes() + self.readback.capacity()
    }
}
