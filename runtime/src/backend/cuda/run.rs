//! One step of a program: its numbers go up, its kernels are queued in bounded pieces, or a whole token as a graph.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use awqua_shaders as shaders;
use awqua_shaders::RowMode;
use awqua_shaders::cuda::{Place, SampleArgs};

use super::CudaBackend;
use super::cache::{self, Prefix};
use super::driver::{Event, Graph, Launch, Pinned, Stream};
use super::memory::Memory;
use super::pace::{self, Pace};
use super::plan::{Plan, Work};
use super::sampling::Sampler;
use crate::backend::forks::Lent;
use crate::backend::{
    Backend, Budget, BufferId, KvType, LogitsRows, MAX_AHEAD, OpTime, Program, Progress, Runner, RunnerConfig, Shared,
    Sharing, Step, check_kv,
};
use crate::error::{Error, ErrorKind, Result};
use crate::session::sampler::{KeptRequest, SampleRequest, pick_in};

mod forks;

/// Looks at a result before the device is asked whether all is well.
const LOOKS: u32 = 512;

/// The session's side of the CUDA backend. Fields are dropped in order: what is queued before what it uses.
pub(super) struct CudaRunner {
    pub(super) stream: Stream,
    /// A choice and the step over the chosen token.
    graph: Option<Graph>,
    pace: Pace,
    pub(super) memory: Memory,
    /// A copy of the first positions that forks share, as long as they are what it holds.
    lent: Lent<Prefix>,
    plan: Plan,
    sampler: Sampler,
    pub(super) backend: Arc<CudaBackend>,
    program: Arc<Program>,
    pub(super) config: RunnerConfig,
    /// The numbers of the last step.
    step: shaders::Step,
    hidden_only: bool,
    /// Whether the last step was one of several sessions, which leaves logits here and nothing else.
    in_pass: bool,
    /// Whether the hidden rows of the last step lie in their buffer.
    hidden_made: bool,
    /// Kernels of the step under way, and how many of them are queued.
    work: Vec<Work>,
    next: usize,
    /// Last pieces of the last two steps.
    latest: u64,
    previous: u64,
    choice: Choice,
    /// Copy of a logits row for the sampler on the CPU.
    row: Option<Pinned>,
    scores: Vec<f32>,
    candidates: Vec<(f32, u32)>,
    /// Choices made ahead and what makes them, the oldest first.
    ahead: VecDeque<(u32, Ahead)>,
    /// Whether the kernels of the last choice ahead are not queued yet.
    choosing: bool,
}

/// What makes a choice ahead.
#[derive(Clone, Copy, PartialEq)]
enum Ahead {
    /// Nothing that is queued.
    Later,
    /// A piece of this runner.
    Piece(u64),
    /// The first piece of a pass, which is not queued.
    PassLater,
    /// A pass.
    Pass,
}

/// The choice under way.
enum Choice {
    None,
    /// By the kernels, under this number.
    Device(u32, Event),
    /// By the CPU, once the row has come.
    Host(Box<KeptRequest>, Event),
    /// None: hidden states are on their way instead.
    Hidden(Event),
}

impl CudaRunner {
    /// Allocates and plans.
    ///
    /// # Errors
    /// As [`crate::backend::Backend::runner`].
    pub(super) fn new(backend: Arc<CudaBackend>, program: &Arc<Program>, config: &RunnerConfig) -> Result<Self> {
        Self::behind(backend, program, config, None)
    }

    /// As [`Self::new`], behind the positions of `prefix`.
    fn behind(
        backend: Arc<CudaBackend>,
        program: &Arc<Program>,
        config: &RunnerConfig,
        prefix: Option<Arc<Prefix>>,
    ) -> Result<Self> {
        let gpu = &backend.gpu;
        gpu.check_lost()?;
        if config.max_tokens > shaders::MAX_GROUPS || config.max_tokens == 0 || config.context == 0 {
            let message = format!("{} tokens a step of a context of {}", config.max_tokens, config.context);
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let config = RunnerConfig { max_logits_rows: config.max_logits_rows.max(1), ..config.clone() };
        if program.buffers.get(program.logits.0 as usize).is_none_or(|desc| desc.width != program.vocab_size) {
            return Err(Error::new(ErrorKind::InvalidInput, "the logits buffer is not as wide as the vocabulary"));
        }
        let stream = gpu.stream()?;
        let mut memory = Memory::new(gpu, &stream, program, &config, false, prefix)?;
        let plan = Plan::new(&backend, program, &mut memory, &stream)?;
        memory.activation(&stream, program, program.logits)?;
        let sampler = Sampler::new(gpu, &stream, program.vocab_size, config.context)?;
        Ok(Self {
            graph: None,
            pace: Pace::new(gpu),
            memory,
            lent: Lent::new(),
            plan,
            sampler,
            program: program.clone(),
            config,
            step: shaders::Step { n_tokens: 0, position: 0, logits_start: 0, logits_rows: 0 },
            hidden_only: false,
            in_pass: false,
            hidden_made: false,
            work: Vec::new(),
            next: 0,
            latest: 0,
            previous: 0,
            choice: Choice::None,
            row: None,
            scores: Vec::new(),
            candidates: Vec::new(),
            ahead: VecDeque::new(),
            choosing: false,
            stream,
            backend,
        })
    }

    fn is_queued(&self) -> bool {
        self.next == self.work.len() && !self.choosing
    }

    fn last_row(&self) -> Result<u32> {
        let none = || Error::new(ErrorKind::InvalidInput, "the last step computed no logits");
        self.step.logits_rows.checked_sub(1).filter(|_| self.is_queued() && !self.hidden_only).ok_or_else(none)
    }

    /// Address of row `row` of the logits, and its byte in their buffer.
    pub(super) fn logits_row(&self, row: u32) -> Result<(u64, u64)> {
        let stride = u64::from(self.program.vocab_size.next_multiple_of(4)) * 4;
        let offset = u64::from(row) * stride;
        let logits = self.memory.existing(self.program.logits);
        let logits = logits.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "the program has no logits"))?;
        Ok((logits.address() + offset, offset))
    }

    /// The kernels of the step `self.step`.
    fn collect(&mut self) {
        self.work.clear();
        for op in &self.plan.ops {
            if !(self.hidden_only && op.rows() == RowMode::Compacted) {
                op.work(&self.step, &mut self.work);
            }
        }
        self.next = 0;
        self.hidden_made = false;
    }

    /// Forgets choices under way.
    fn forget(&mut self) {
        self.choice = Choice::None;
        let waits_for_pass = self.ahead.back().is_some_and(|(_, by)| *by == Ahead::PassLater);
        if std::mem::take(&mut self.choosing) || waits_for_pass {
            self.sampler.take_back();
        }
        self.ahead.clear();
    }

    /// Queues the choice ahead and its step as one piece if they take at most `most` seconds; whether they did.
    fn submit_graph(&mut self, most: f64) -> Result<bool> {
        let Some(graph) = self.graph.as_ref().filter(|_| self.choosing) else { return Ok(false) };
        let seconds = self.work.iter().map(|work| pace::seconds(&work.cost)).sum();
        if self.pace.estimate(0, seconds) > most {
            return Ok(false);
        }
        let stream = &self.stream;
        let held = self.backend.hold()?;
        self.latest = self.pace.piece(stream, 0, seconds, || stream.launch_graph(graph))?;
        self.next = self.work.len();
        drop(held);
        self.chose();
        Ok(true)
    }

    /// The kernels of the last choice ahead are in piece [`Self::latest`].
    fn chose(&mut self) {
        self.choosing = false;
        if let Some((_, by)) = self.ahead.back_mut() {
            *by = Ahead::Piece(self.latest);
        }
    }

    /// Makes ready for a pass over a token that the host knows.
    pub(super) fn join_pass(&mut self) {
        self.abandon();
    }

    /// Asks for a choice by a pass over its token at `position`: what the kernels need, which put the token to `tokens`
    /// and its position to `place`. `None` as [`Runner::begin_ahead`] says.
    ///
    /// # Errors
    /// As [`Runner::begin_ahead`].
    pub(super) fn choose_in_pass(
        &mut self,
        request: &SampleRequest<'_>,
        position: u32,
        tokens: u64,
        place: u64,
    ) -> Result<Option<SampleArgs>> {
        if self.last_row()? > 0 || !self.sampler.handles(request) || self.ahead.len() == MAX_AHEAD {
            return Ok(None);
        }
        let turn = self.sampler.request(&self.stream, request, position)?;
        self.ahead.push_back((turn, Ahead::PassLater));
        Ok(Some(self.sampler.arguments(self.logits_row(0)?.0, tokens, place)))
    }

    /// The kernels of the choice that a pass makes are queued.
    pub(super) fn chose_in_pass(&mut self) {
        if let Some((_, by)) = self.ahead.back_mut() {
            *by = Ahead::Pass;
        }
    }

    /// A pass over the token at `position` is queued.
    pub(super) fn end_pass(&mut self, position: u32) {
        self.work.clear();
        self.next = 0;
        self.step = shaders::Step { n_tokens: 1, position, logits_start: 0, logits_rows: 1 };
        (self.hidden_only, self.in_pass) = (false, true);
    }

    /// Queues the choice ahead, if there is one, and kernels from `next` on, as [`Pace::cut`] says.
    fn submit(&mut self, most: f64, budget: &Budget) -> Result<()> {
        let class = pace::class(self.step.n_tokens);
        let (n, seconds) = self.pace.cut(&self.work[self.next..], class, most, budget);
        let end = self.next + n;
        let choice = match self.choosing {
            true => Some(self.sampler.launches(&self.memory, self.logits_row(0)?.0)),
            false => None,
        };
        let work = self.work[self.next..end].iter().map(|work| &work.launch);
        let stream = &self.stream;
        let held = self.backend.hold()?;
        self.latest = self.pace.piece(stream, class, seconds, || queue(stream, choice.iter().flatten().chain(work)))?;
        self.next = end;
        drop(held);
        if choice.is_some() {
            self.chose();
        }
        Ok(())
    }

    /// The token of choice `turn` made `by` something, if it is there: long before the step behind it ends.
    fn token_ahead(&mut self, turn: u32, by: Ahead) -> Result<Option<u32>> {
        let token = self.sampler.token(turn);
        if token.is_some() || !matches!(by, Ahead::Piece(piece) if self.pace.settle()? >= piece) {
            return Ok(token);
        }
        let late = self.sampler.token(turn);
        late.map(Some).ok_or_else(|| Error::new(ErrorKind::Device, "the token did not come back"))
    }

    /// Waits for the token of choice `turn`, whose piece is queued.
    fn wait_for_token(&mut self, turn: u32, piece: u64) -> Result<()> {
        loop {
            for _ in 0..LOOKS {
                if self.sampler.token(turn).is_some() {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            if self.token_ahead(turn, Ahead::Piece(piece))?.is_some() {
                return Ok(());
            }
            std::thread::yield_now();
        }
    }

    /// Appends `rows` rows of `buffer` to `out`.
    fn read_rows(&mut self, buffer: BufferId, rows: u32, out: &mut Vec<f32>) -> Result<()> {
        let width = self.program.buffers[buffer.0 as usize].width as usize;
        let stride = width.next_multiple_of(4);
        let source = self.memory.existing(buffer);
        let source = source.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "the rows were not computed"))?;
        let first = out.len();
        out.resize(first + rows as usize * stride, 0.0);
        let read = &mut out[first..];
        self.stream.download(source, 0, bytemuck::cast_slice_mut(read))?;
        if stride != width {
            for row in 1..rows as usize {
                read.copy_within(row * stride..row * stride + width, row * width);
            }
            out.truncate(first + rows as usize * width);
        }
        Ok(())
    }

    /// Records the graph of a choice and a step.
    fn record(&mut self) -> Result<()> {
        let (scores, _) = self.logits_row(0)?;
        let mut launches: Vec<Launch> = self.sampler.launches(&self.memory, scores).into();
        launches.extend(self.work.iter().map(|work| work.launch.clone()));
        let stream = &self.stream;
        self.graph = Some(stream.capture(|| queue(stream, &launches))?);
        Ok(())
    }
}

/// Queues kernel calls of the plan or the sampler.
pub(super) fn queue<'a>(stream: &Stream, launches: impl IntoIterator<Item = &'a Launch>) -> Result<()> {
    // SAFETY: plan and sampler make the arguments from the session's buffers and the backend's weights, in whose sizes
    // the launches stay; the stream of a session ends before they are freed.
    launches.into_iter().try_for_each(|launch| unsafe { stream.launch(launch) })
}

impl Runner for CudaRunner {
    fn write_rope(&mut self, table: u32, first: u32, rows: &[f32]) -> Result<()> {
        if table >= self.program.rope_tables {
            return Err(Error::new(ErrorKind::InvalidInput, format!("the program has no rotary table {table}")));
        }
        let width = self.program.attention.rotary_dim as usize;
        let count = rows.len().checked_div(width).unwrap_or(0);
        if count * width != rows.len() || first as usize + count > self.config.context as usize {
            let message = format!("{} numbers from position {first} do not fit the rotary table", rows.len());
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let first = u64::from(table) * u64::from(self.config.context) + u64::from(first);
        let (buffer, offset) = (self.memory.buffer(self.memory.ropes), first * width as u64 * 4);
        self.stream.upload(buffer, offset, bytemuck::cast_slice(rows))
    }

    fn begin(&mut self, step: &Step<'_>) -> Result<()> {
        drop(self.backend.hold()?);
        step.check(&self.program, &self.config)?;
        self.overwrite(step.position)?;
        self.forget();
        let logits = step.logits.range(step.tokens.len());
        self.step = shaders::Step {
            n_tokens: step.tokens.len() as u32,
            position: step.position,
            logits_start: logits.start as u32,
            logits_rows: logits.len() as u32,
        };
        self.hidden_only = step.logits == LogitsRows::Hidden;
        self.in_pass = false;
        let position = std::mem::offset_of!(Place, position) as u64;
        self.stream.upload(self.memory.buffer(self.memory.place), position, bytemuck::bytes_of(&step.position))?;
        self.stream.upload(self.memory.buffer(self.memory.tokens), 0, bytemuck::cast_slice(step.tokens))?;
        self.previous = self.latest;
        self.collect();
        Ok(())
    }

    fn advance(&mut self, budget: &Budget) -> Result<Progress> {
        let finished = self.pace.settle()?;
        let mut begun = false;
        while !self.is_queued() {
            if begun && budget.is_over() {
                return Ok(Progress::Working);
            }
            // At most two steps of a prompt are queued, so that one that is abandoned ends soon.
            if budget.device.is_none() && self.ahead.is_empty() && self.previous > finished {
                return Ok(Progress::Waiting);
            }
            let Some(most) = self.pace.room(budget) else { return Ok(Progress::Waiting) };
            if !self.submit_graph(most)? {
                self.submit(most, budget)?;
            }
            begun = true;
        }
        drop(self.backend.hold()?);
        Ok(Progress::Done)
    }

    fn abandon(&mut self) {
        self.work.clear();
        self.next = 0;
        self.step.logits_rows = 0;
        self.forget();
    }

    fn wait(&mut self) -> Result<()> {
        match self.ahead.front() {
            Some(&(turn, Ahead::Piece(piece))) => return self.wait_for_token(turn, piece),
            // The stream follows the pass.
            Some((_, Ahead::Pass)) => return self.stream.wait(),
            _ => {}
        }
        match &self.choice {
            Choice::Device(_, there) | Choice::Host(_, there) | Choice::Hidden(there) => there.wait(),
            Choice::None if self.previous > self.pace.settle()? => self.pace.wait_for(self.previous),
            Choice::None => self.pace.wait_for_any(),
        }
    }

    fn chunk(&self, position: u32, wanted: usize, device: Duration) -> usize {
        let mut n = wanted.min(self.config.max_tokens as usize).max(1) as u32;
        let mut work = Vec::new();
        while n > 1 {
            let step = shaders::Step { n_tokens: n, position, logits_start: n - 1, logits_rows: 1 };
            work.clear();
            self.plan.ops.iter().for_each(|op| op.work(&step, &mut work));
            let largest = work.iter().map(|work| pace::seconds(&work.cost)).fold(0.0, f64::max);
            if self.pace.estimate(pace::class(n), largest) <= device.as_secs_f64() {
                break;
            }
            n = n.div_ceil(2);
        }
        n as usize
    }

    fn queued(&mut self) -> Result<Duration> {
        self.pace.settle()?;
        Ok(self.pace.queued())
    }

    fn read_logits(&mut self, out: &mut Vec<f32>) -> Result<()> {
        self.backend.gpu.check_lost()?;
        let rows = if self.is_queued() && !self.hidden_only { self.step.logits_rows } else { 0 };
        out.clear();
        self.read_rows(self.program.logits, rows, out)
    }

    fn begin_hidden(&mut self) -> Result<()> {
        self.backend.gpu.check_lost()?;
        self.choice = Choice::None;
        if !self.is_queued() || self.in_pass || self.step.logits_rows == 0 {
            return Err(Error::new(ErrorKind::InvalidInput, "the last step has no rows of hidden states"));
        }
        if let Some(op) = &self.plan.hidden
            && !self.hidden_made
        {
            let mut work = Vec::new();
            op.work(&self.step, &mut work);
            let _held = self.backend.hold()?;
            queue(&self.stream, work.iter().map(|work| &work.launch))?;
            self.hidden_made = true;
        }
        self.choice = Choice::Hidden(super::mark(&self.backend.gpu, &self.stream)?);
        Ok(())
    }

    fn poll_hidden(&mut self, out: &mut Vec<f32>) -> Result<bool> {
        self.pace.settle()?;
        let Choice::Hidden(there) = &self.choice else {
            return Err(Error::new(ErrorKind::InvalidInput, "no hidden states were asked for"));
        };
        if !there.is_reached()? {
            return Ok(false);
        }
        self.choice = Choice::None;
        self.read_rows(self.program.last_hidden()?, self.step.logits_rows, out)?;
        Ok(true)
    }

    fn begin_sample(&mut self, request: &SampleRequest<'_>) -> Result<()> {
        self.backend.gpu.check_lost()?;
        let (scores, offset) = self.logits_row(self.last_row()?)?;
        if self.sampler.handles(request) {
            let turn = self.sampler.request(&self.stream, request, self.step.position)?;
            queue(&self.stream, &self.sampler.launches(&self.memory, scores))?;
            self.choice = Choice::Device(turn, super::mark(&self.backend.gpu, &self.stream)?);
            return Ok(());
        }
        let bytes = self.program.vocab_size as usize * 4;
        if self.row.is_none() {
            self.row = Some(self.backend.gpu.pinned(bytes)?);
        }
        let Some(row) = &self.row else { return Err(Error::new(ErrorKind::Device, "no memory for scores")) };
        let logits = self.memory.existing(self.program.logits);
        let logits = logits.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "the program has no logits"))?;
        self.stream.download_pinned(logits, offset, row, bytes)?;
        self.choice = Choice::Host(Box::new(request.kept()), super::mark(&self.backend.gpu, &self.stream)?);
        Ok(())
    }

    fn poll_sample(&mut self) -> Result<Option<u32>> {
        self.pace.settle()?;
        let token = match &self.choice {
            Choice::None | Choice::Hidden(_) => {
                return Err(Error::new(ErrorKind::InvalidInput, "no choice is under way"));
            }
            Choice::Device(turn, there) => match there.is_reached()? {
                false => None,
                true => self.sampler.token(*turn),
            },
            Choice::Host(choice, there) => match (there.is_reached()?, &self.row) {
                (true, Some(row)) => {
                    self.scores.clear();
                    self.scores.extend(row.bytes().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)));
                    Some(pick_in(&mut self.scores, &choice.as_request(), &mut self.candidates))
                }
                _ => None,
            },
        };
        if token.is_some() {
            self.choice = Choice::None;
        }
        Ok(token)
    }

    fn begin_ahead(&mut self, request: &SampleRequest<'_>, position: u32) -> Result<bool> {
        drop(self.backend.hold()?);
        // The graph takes the scores from the first row.
        let row = self.last_row()?;
        if row > 0 || !self.sampler.handles(request) || self.ahead.len() == MAX_AHEAD || position >= self.config.context
        {
            return Ok(false);
        }
        let turn = self.sampler.request(&self.stream, request, position)?;
        self.choosing = true;
        self.ahead.push_back((turn, Ahead::Later));
        self.step = shaders::Step { n_tokens: 1, position, logits_start: 0, logits_rows: 1 };
        (self.hidden_only, self.in_pass) = (false, false);
        self.previous = self.latest;
        self.collect();
        if self.graph.is_none() && !self.backend.options.force_no_graphs {
            self.record()?;
        }
        Ok(true)
    }

    fn poll_ahead(&mut self) -> Result<Option<u32>> {
        let none = || Error::new(ErrorKind::InvalidInput, "no token was chosen ahead");
        let &(turn, by) = self.ahead.front().ok_or_else(none)?;
        let token = self.token_ahead(turn, by)?;
        if token.is_some() {
            self.ahead.pop_front();
        }
        Ok(token)
    }

    fn retract_ahead(&mut self) -> Result<()> {
        let (turn, by) = match self.ahead.back() {
            Some(&(turn, by @ (Ahead::Pass | Ahead::PassLater))) => (turn, by),
            _ => return Err(Error::new(ErrorKind::InvalidInput, "no token was chosen ahead in a pass")),
        };
        if by == Ahead::PassLater {
            queue(&self.stream, &self.sampler.launches(&self.memory, self.logits_row(0)?.0))?;
        }
        self.ahead.pop_back();
        self.choice = Choice::Device(turn, super::mark(&self.backend.gpu, &self.stream)?);
        Ok(())
    }

    fn profile(&mut self, step: &Step<'_>) -> Result<Vec<OpTime>> {
        self.begin(step)?;
        self.next = self.work.len();
        let gpu = &self.backend.gpu;
        let _held = self.backend.hold()?;
        let mut events = vec![super::mark(gpu, &self.stream)?];
        for work in &self.work {
            // One by one, so that each has its own time.
            queue(&self.stream, [&Launch { overlaps: false, ..work.launch.clone() }])?;
            events.push(super::mark(gpu, &self.stream)?);
        }
        self.stream.wait()?;
        let times = self.work.iter().zip(events.windows(2)).map(|(work, ends)| {
            let [x, y, z] = work.launch.grid;
            let name = format!("{} {x}x{y}x{z}", work.name);
            let seconds = ends[0].seconds_to(&ends[1])?;
            Ok(OpTime { name, seconds, bytes: work.cost.bytes, flops: work.cost.flops })
        });
        times.collect()
    }

    fn save_kv(&mut self, n: u32, out: &mut [u8]) -> Result<()> {
        check_kv(&self.program, &self.config, self.memory.kv_type, n, out.len())?;
        self.memory.parts().try_for_each(|part| self.form().save(&self.stream, &part, n, out))
    }

    fn load_kv(&mut self, n: u32, bytes: &[u8]) -> Result<()> {
        check_kv(&self.program, &self.config, self.memory.kv_type, n, bytes.len())?;
        self.overwrite(0)?;
        self.abandon();
        self.form().load(&self.stream, &self.memory.own(), n, bytes)
    }

    fn fork(&mut self, n: u32, sharing: Sharing) -> Result<Box<dyn Runner>> {
        Ok(Box::new(self.forked(n, sharing)?))
    }

    fn fork_bytes(&self, n: u32, sharing: Sharing) -> u64 {
        let (len, there) = self.to_share(n, sharing);
        let copied = if there.is_some() { 0 } else { cache::bytes(&self.program, self.memory.kv_type, len) };
        self.memory.bytes_behind(&self.program, len) + self.sampler.bytes() + copied
    }

    fn shared(&self) -> Option<Shared> {
        let prefix = self.memory.prefix.as_ref()?;
        Some(Shared { id: Arc::as_ptr(prefix) as usize, positions: prefix.len, bytes: prefix.bytes() })
    }

    fn rebind(&mut self, backend: Arc<dyn Backend>) -> Result<bool> {
        let backend: Arc<dyn Any + Send + Sync> = backend;
        let same = |b: &Arc<CudaBackend>| Arc::ptr_eq(&b.gpu, &self.backend.gpu);
        let Some(backend) = backend.downcast::<CudaBackend>().ok().filter(same) else { return Ok(false) };
        self.abandon();
        self.graph = None;
        self.plan = Plan::new(&backend, &self.program, &mut self.memory, &self.stream)?;
        self.backend = backend;
        Ok(true)
    }

    fn kv_type(&self) -> KvType {
        self.memory.kv_type
    }

    fn bytes(&self) -> u64 {
        self.memory.bytes() + self.sampler.bytes()
    }
}
