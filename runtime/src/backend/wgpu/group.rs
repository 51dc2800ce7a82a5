//! Passes over several sessions: a row each through the products, rotation and attention in each member's own cache, the
//! choice of every member in front, its logits behind.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use awqua_shaders as shaders;
use wgpu::BufferUsages;

use super::WgpuBackend;
use super::choices::{Choices, PassTokens};
use super::device::Ticket;
use super::plan::passes;
use super::run::{Choosing, WgpuRunner};
use crate::backend::group::{check_next, own};
use crate::backend::{Budget, Group, Members, Next, OpTime, Program, Progress, Runner, RunnerConfig};
use crate::error::{Error, ErrorKind, Result};

/// Most members of a pass: with more of them, products wait for arithmetic instead of weights.
const MOST: u32 = 16;

/// A member of the pass that is gathered or under way.
#[derive(Clone, Copy)]
struct Row {
    position: u32,
    /// `None` if it is chosen on the device.
    token: Option<u32>,
}

/// What computes passes.
pub(super) struct WgpuGroup {
    /// A runner without caches.
    rows: WgpuRunner,
    backend: Arc<WgpuBackend>,
    program: Arc<Program>,
    config: RunnerConfig,
    /// (rows) of position, context, shared positions and nothing.
    places: wgpu::Buffer,
    /// The caches that the plan is bound to.
    bound: Vec<(wgpu::Buffer, usize)>,
    members: Vec<Row>,
    has_begun: bool,
    choices: Choices,
    /// The tokens that the pass itself chooses, on their way back, and their rows by bits.
    back: Arc<PassTokens>,
    chosen: u32,
    /// Fewest members of a pass.
    least: u32,
    /// Ends of the choices and passes that somebody may wait for.
    marks: VecDeque<Ticket>,
}

impl WgpuGroup {
    /// Allocates and plans, and compiles kernels that nobody needed before; `None` where passes can not be computed. The
    /// first group of a backend waits for trials of the kernels.
    ///
    /// # Errors
    /// As [`crate::backend::Backend::group`].
    pub(super) fn new(
        backend: Arc<WgpuBackend>,
        program: &Arc<Program>,
        config: &RunnerConfig,
    ) -> Result<Option<Self>> {
        let gpu = &backend.gpu;
        let _watch = gpu.watch();
        gpu.check()?;
        if !passes::handles(&gpu.limits, &program.attention) || config.max_tokens < backend.least_rows() {
            return Ok(None);
        }
        let (most, least) = (config.max_tokens.min(MOST), backend.least_rows());
        let config = RunnerConfig { max_tokens: most, max_logits_rows: most, ..config.clone() };
        // Kernels that bind as many buffers are not among those of the start-up test.
        if backend.pass_kernels().is_none() {
            gpu.check()?;
            return Ok(None);
        }
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST;
        let places = gpu.buffer("the places of members", u64::from(most) * 16, usage)?;
        let rows = WgpuRunner::for_passes(Arc::clone(&backend), program, &config, &places)?;
        let mut choices = Choices::new(&backend, program.vocab_size, most, &rows.memory.tokens)?;
        Ok(Some(Self {
            rows,
            back: choices.way_back(gpu)?,
            choices,
            chosen: 0,
            program: Arc::clone(program),
            config,
            places,
            bound: Vec::new(),
            members: Vec::new(),
            has_begun: false,
            least,
            marks: VecDeque::new(),
            backend,
        }))
    }

    fn accepts(&self, runner: &WgpuRunner) -> bool {
        Arc::ptr_eq(&runner.backend, &self.backend)
            && runner.kv_type() == self.rows.kv_type()
            && runner.config.context <= self.config.context
    }

    /// Has the choices made, brings what the kernels have to know of the members, and their logits to them behind the pass.
    fn begin(&mut self, members: &mut dyn Members) -> Result<()> {
        let gpu = &self.backend.gpu;
        let width = u64::from(self.program.attention.rotary_dim) * 4;
        let bytes = u64::from(self.program.vocab_size) * 4;
        let (mut lead, mut tail) = (encoder(gpu, "a pass"), encoder(gpu, "logits of a pass"));
        let (mut caches, mut places) = (Vec::new(), Vec::new());
        for (row, at) in self.members.iter().enumerate() {
            let member = members.runner(row).and_then(own::<WgpuRunner>)?;
            for table in (0..self.program.rope_tables).filter(|_| width > 0) {
                let (from, to) = (member.memory.rope(table)?, self.rows.memory.rope(table)?);
                lead.copy_buffer_to_buffer(from, u64::from(at.position) * width, to, row as u64 * width, width);
            }
            let ((from, stride), (to, _)) = (self.rows.logits(), member.logits());
            tail.copy_buffer_to_buffer(from, row as u64 * stride, to, 0, bytes);
            caches.extend(member.memory.identity());
            places.push([at.position, member.config.context, member.memory.shared(), 0]);
        }
        gpu.queue.write_buffer(&self.places, 0, bytemuck::cast_slice(&places));
        if caches != self.bound {
            self.bound.clear();
            self.bind(members)?;
            self.bound = caches;
        }
        // Nothing fails from here on, so that no choice is taken and lost.
        let gpu = &self.backend.gpu;
        let tokens = &self.rows.memory.tokens;
        let mut commands = Vec::new();
        self.chosen = 0;
        for (row, at) in self.members.iter().enumerate() {
            let member = members.runner(row).and_then(own::<WgpuRunner>)?;
            match (at.token, member.take_choosing()) {
                (Some(token), _) => gpu.queue.write_buffer(tokens, row as u64 * 4, &token.to_le_bytes()),
                (None, Some(Choosing::Pass)) => self.chosen |= 1 << row,
                (None, Some(Choosing::Commands(encoder))) => commands.push(encoder.finish()),
                (None, None) => {}
            }
        }
        if self.chosen != 0 {
            self.choices.encode(gpu, &mut lead, self.chosen, tokens, &self.back);
        }
        commands.push(lead.finish());
        let n = self.members.len() as u32;
        let position = self.members.iter().map(|row| row.position).max().unwrap_or(0);
        self.rows.start(shaders::Step { n_tokens: n, position, logits_start: 0, logits_rows: n });
        (self.rows.lead, self.rows.tail) = (commands, Some(tail.finish()));
        self.has_begun = true;
        Ok(())
    }

    /// Binds the caches and logits of the members.
    fn bind(&mut self, members: &mut dyn Members) -> Result<()> {
        let (mut joined, mut logits) = (Vec::new(), Vec::new());
        for row in 0..self.members.len() {
            let member = members.runner(row).and_then(own::<WgpuRunner>)?;
            joined.push(member.memory.to_join());
            logits.push(member.logits().0.clone());
        }
        self.rows.plan.bind_members(&self.backend, &self.rows.memory, &joined)?;
        self.choices.bind(&self.backend, &logits)
    }

    /// Tells the members whose choices are submitted by now.
    fn note_choices(&mut self, members: &mut dyn Members) -> Result<()> {
        let Some(ticket) = self.rows.led.take() else { return Ok(()) };
        if self.chosen != 0 {
            self.back.expect(&ticket);
            self.chosen = 0;
        }
        for (row, at) in self.members.iter().enumerate() {
            if at.token.is_none() {
                members.runner(row).and_then(own::<WgpuRunner>)?.went_ahead(&ticket);
            }
        }
        self.marks.push_back(ticket);
        Ok(())
    }

    /// The pass is queued, and its logits are with every member.
    fn end(&mut self, members: &mut dyn Members) -> Result<()> {
        let ticket = self.rows.finish_step();
        self.backend.gpu.check()?;
        for (row, at) in self.members.iter().enumerate() {
            members.runner(row).and_then(own::<WgpuRunner>)?.end_pass(at.position, &ticket);
        }
        self.marks.push_back(ticket);
        self.members.clear();
        self.has_begun = false;
        Ok(())
    }
}

fn encoder(gpu: &super::device::Gpu, label: &str) -> wgpu::CommandEncoder {
    gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some(label) })
}

impl Group for WgpuGroup {
    fn most(&self) -> usize {
        self.config.max_tokens as usize
    }

    fn least(&self) -> usize {
        self.least as usize
    }

    fn takes(&self, runner: &dyn Runner) -> bool {
        (runner as &dyn Any).downcast_ref().is_some_and(|runner| self.accepts(runner))
    }

    fn join(&mut self, runner: &mut dyn Runner, next: &Next<'_>, position: u32) -> Result<bool> {
        let invalid = |message: &str| Err(Error::new(ErrorKind::InvalidInput, message));
        let _watch = self.backend.gpu.watch();
        self.backend.check()?;
        let member = own::<WgpuRunner>(runner)?;
        if !self.accepts(member) {
            return invalid("the session has other capacities than the pass");
        }
        if self.has_begun || self.members.len() == self.most() {
            return invalid("the pass has begun or is full");
        }
        check_next(next, position, &self.program, &member.config)?;
        if self.members.is_empty() {
            // Members may still wait for the tokens of the pass before.
            self.back = self.choices.way_back(&self.backend.gpu)?;
        }
        let token = match *next {
            Next::Token(token) => {
                member.join_pass(position)?;
                Some(token)
            }
            Next::Chosen(request) => {
                let tokens = &self.rows.memory.tokens;
                if !member.choose_in_pass(request, position, self.members.len(), tokens, &self.back)? {
                    return Ok(false);
                }
                None
            }
        };
        self.members.push(Row { position, token });
        Ok(true)
    }

    fn advance(&mut self, members: &mut dyn Members, budget: &Budget) -> Result<Progress> {
        let gpu = self.backend.gpu.clone();
        let _watch = gpu.watch();
        self.backend.check()?;
        if self.members.is_empty() {
            return Ok(Progress::Done);
        }
        // How many passes may be queued is for the members' choices to say.
        self.rows.forget_previous();
        if !self.has_begun {
            if self.rows.room(budget)?.is_none() {
                return Ok(Progress::Waiting);
            }
            self.begin(members)?;
            self.rows.forget_previous();
        }
        let progress = self.rows.queue(budget);
        self.note_choices(members)?;
        let progress = progress?;
        if progress == Progress::Done {
            self.end(members)?;
        }
        Ok(progress)
    }

    fn profile(&mut self, members: &mut dyn Members) -> Result<Vec<OpTime>> {
        let gpu = self.backend.gpu.clone();
        let _watch = gpu.watch();
        self.backend.check()?;
        self.begin(members)?;
        self.rows.submit_lead()?;
        self.note_choices(members)?;
        self.rows.profile_plan()
    }

    fn abandon(&mut self) {
        self.rows.abandon();
        self.members.clear();
        self.has_begun = false;
    }

    fn wait(&mut self) -> Result<()> {
        let gpu = &self.backend.gpu;
        let _watch = gpu.watch();
        let finished = gpu.finished()?;
        while let Some(mark) = self.marks.pop_front() {
            if mark.number() > finished {
                return gpu.wait(&mark);
            }
        }
        self.rows.wait()
    }

    fn queued(&mut self) -> Result<Duration> {
        let finished = self.backend.gpu.finished()?;
        while self.marks.front().is_some_and(|mark| mark.number() <= finished) {
            self.marks.pop_front();
        }
        self.rows.queued()
    }

    fn bytes(&self) -> u64 {
        self.rows.bytes() + self.places.size() + self.choices.bytes()
    }
}
