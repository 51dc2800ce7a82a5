//! Passes over several sessions: rows of different caches, the choice of every member in front, its logits behind.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use awqua_shaders as shaders;
use awqua_shaders::Cost;
use awqua_shaders::cuda::{HandOutArgs, Place, SampleArgs, SampleEachArgs};

use super::CudaBackend;
use super::driver::{Buffer, Function, Graph, Launch, Stream};
use super::memory::{FEW, Memory};
use super::pace::{self, Pace};
use super::plan::{Plan, Work};
use super::run::{CudaRunner, queue};
use super::sampling;
use crate::backend::group::{check_next, own};
use crate::backend::{Budget, Group, Members, Next, Program, Progress, Runner, RunnerConfig};
use crate::error::{Error, ErrorKind, Result};

const MOST: usize = FEW as usize;

/// What the kernels know of the members, by row.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
struct Table {
    choices: [SampleArgs; MOST],
    /// Where their logits go.
    logits: [u64; MOST],
}

/// A member of the pass that is gathered or under way.
#[derive(Clone, Copy, Default)]
struct Row {
    position: u32,
    is_chosen: bool,
}

/// What computes passes. Fields are dropped in order: what is queued before what it uses.
pub(super) struct CudaGroup {
    stream: Stream,
    /// Whole passes, by the number of rows.
    graphs: [Option<Graph>; MOST + 1],
    pace: Pace,
    memory: Memory,
    plan: Plan,
    /// On the device, and what is there.
    table: Buffer,
    known: Option<(Table, [Place; MOST])>,
    backend: Arc<CudaBackend>,
    program: Arc<Program>,
    most: usize,
    choose: [Function; 3],
    hand_out: Function,
    rows: [Row; MOST],
    tokens: [u32; MOST],
    next_table: Table,
    next_places: [Place; MOST],
    /// Members of the pass.
    n: usize,
    has_begun: bool,
    /// Kernels of the pass under way, but for the choices, and how many of them are queued.
    work: Vec<Work>,
    next: usize,
}

impl CudaGroup {
    /// Allocates and plans.
    ///
    /// # Errors
    /// As [`crate::backend::Backend::group`].
    pub(super) fn new(backend: Arc<CudaBackend>, program: &Arc<Program>, config: &RunnerConfig) -> Result<Self> {
        let gpu = &backend.gpu;
        gpu.check_lost()?;
        let most = config.max_tokens.min(FEW);
        let config = RunnerConfig { max_tokens: most, max_logits_rows: most, ..config.clone() };
        let stream = gpu.stream()?;
        // Caches and rotary tables are those of the members.
        let without = Program { layers: 0, rope_tables: 0, ..(**program).clone() };
        let mut memory = Memory::new(gpu, &stream, &without, &config, true, None)?;
        let plan = Plan::new(&backend, program, &mut memory, &stream)?;
        memory.activation(&stream, program, program.logits)?;
        let functions = ["sample_slices_each", "sample_narrow_each", "sample_draw_each"];
        let [slices, narrow, draw] = functions.map(|name| gpu.function(name));
        Ok(Self {
            graphs: [const { None }; MOST + 1],
            pace: Pace::new(gpu),
            memory,
            plan,
            table: gpu.buffer("the members of a pass", size_of::<Table>() as u64)?,
            known: None,
            program: program.clone(),
            most: most as usize,
            choose: [slices?, narrow?, draw?],
            hand_out: gpu.function("hand_out")?,
            rows: [Row::default(); MOST],
            tokens: [0; MOST],
            next_table: bytemuck::Zeroable::zeroed(),
            next_places: [Place::default(); MOST],
            n: 0,
            has_begun: false,
            work: Vec::new(),
            next: 0,
            stream,
            backend,
        })
    }

    fn accepts(&self, runner: &CudaRunner) -> bool {
        Arc::ptr_eq(&runner.backend, &self.backend) && runner.memory.kv_type == self.memory.kv_type
    }

    /// Has the stream wait for the members, and brings what the kernels have to know of them.
    fn begin(&mut self, members: &mut dyn Members) -> Result<()> {
        for row in 0..self.n {
            let member = members.runner(row).and_then(own::<CudaRunner>)?;
            if member.stream.take_queued() {
                self.stream.follow(&super::mark(&self.backend.gpu, &member.stream)?)?;
            }
        }
        let next = (self.next_table, self.next_places);
        if self.known.is_none_or(|(table, _)| table != next.0) {
            self.stream.upload(&self.table, 0, bytemuck::bytes_of(&next.0))?;
        }
        // Choices write their own tokens and positions.
        let given = self.rows[..self.n].iter().any(|row| !row.is_chosen);
        if given || self.known.is_none_or(|(_, places)| places != next.1) {
            let (places, tokens) = (self.memory.buffer(self.memory.place), self.memory.buffer(self.memory.tokens));
            self.stream.upload(places, 0, bytemuck::cast_slice(&next.1[..self.n]))?;
            self.stream.upload(tokens, 0, bytemuck::cast_slice(&self.tokens[..self.n]))?;
        }
        self.known = Some(next);
        self.collect()?;
        self.has_begun = true;
        Ok(())
    }

    /// The kernels of the pass.
    fn collect(&mut self) -> Result<()> {
        let n = self.n as u32;
        let position = self.rows[..self.n].iter().map(|row| row.position).max().unwrap_or(0);
        let step = shaders::Step { n_tokens: n, position, logits_start: 0, logits_rows: n };
        self.work.clear();
        self.plan.ops.iter().for_each(|op| op.work(&step, &mut self.work));
        let none = || Error::new(ErrorKind::InvalidInput, "the program has no logits");
        let logits = self.memory.existing(self.program.logits).ok_or_else(none)?;
        let width = self.program.vocab_size;
        let to = self.table.address() + std::mem::offset_of!(Table, logits) as u64;
        let arguments = HandOutArgs { from: logits.address(), to, width, stride: width.next_multiple_of(4) };
        let launch = Launch::new(self.hand_out, [width.div_ceil(256), n, 1], 256, 0, &arguments);
        let cost = Cost { bytes: u64::from(n) * u64::from(width) * 8, flops: 0 };
        self.work.push(Work { name: "hand_out", launch, cost });
        self.next = 0;
        Ok(())
    }

    fn choices(&self) -> [Launch; 3] {
        let arguments = SampleEachArgs { members: self.table.address() };
        sampling::launches(self.choose, self.program.vocab_size, self.n as u32, &arguments)
    }

    /// Queues kernels from `next` on, the choices first, as [`Pace::cut`] says.
    fn submit(&mut self, members: &mut dyn Members, most: f64, budget: &Budget) -> Result<()> {
        let class = pace::class(self.n as u32);
        let all = self.work.iter().map(|work| pace::seconds(&work.cost)).sum();
        let held = self.backend.hold()?;
        let is_first = self.next == 0;
        if is_first && self.pace.estimate(class, all) <= most && !self.backend.options.force_no_graphs {
            let graph = match self.graphs[self.n].take() {
                Some(graph) => graph,
                None => {
                    let choices = self.choices();
                    let launches = choices.iter().chain(self.work.iter().map(|work| &work.launch));
                    self.stream.capture(|| queue(&self.stream, launches))?
                }
            };
            let launched = self.pace.piece(&self.stream, class, all, || self.stream.launch_graph(&graph));
            self.graphs[self.n] = Some(graph);
            launched?;
            self.next = self.work.len();
        } else {
            let (n, piece) = self.pace.cut(&self.work[self.next..], class, most, budget);
            let end = self.next + n;
            let choices = if is_first { Some(self.choices()) } else { None };
            let work = self.work[self.next..end].iter().map(|work| &work.launch);
            let launches = choices.iter().flatten().chain(work);
            self.pace.piece(&self.stream, class, piece, || queue(&self.stream, launches))?;
            self.next = end;
        }
        drop(held);
        for row in 0..self.n {
            let member = members.runner(row).and_then(own::<CudaRunner>)?;
            if is_first && self.rows[row].is_chosen {
                member.chose_in_pass();
            }
            // What the member queues by itself, and the end of its memory, come behind.
            if let Some(end) = self.pace.latest_end() {
                member.stream.follow(end)?;
            }
        }
        Ok(())
    }
}

impl Group for CudaGroup {
    fn most(&self) -> usize {
        self.most
    }

    fn takes(&self, runner: &dyn Runner) -> bool {
        (runner as &dyn Any).downcast_ref().is_some_and(|runner| self.accepts(runner))
    }

    fn join(&mut self, runner: &mut dyn Runner, next: &Next<'_>, position: u32) -> Result<bool> {
        let invalid = |message: &str| Err(Error::new(ErrorKind::InvalidInput, message));
        drop(self.backend.hold()?);
        let member = own::<CudaRunner>(runner)?;
        if !self.accepts(member) {
            return invalid("the session has other capacities than the pass");
        }
        if self.has_begun || self.n == self.most {
            return invalid("the pass has begun or is full");
        }
        check_next(next, position, &self.program, &member.config)?;
        member.overwrite(position)?;
        let row = self.n;
        let logits = member.logits_row(0)?.0;
        let tokens = self.memory.address(self.memory.tokens) + row as u64 * 4;
        let places = self.memory.address(self.memory.place);
        let place = places + (row * size_of::<Place>() + std::mem::offset_of!(Place, position)) as u64;
        let choice = match *next {
            Next::Token(token) => {
                member.join_pass();
                self.tokens[row] = token;
                SampleArgs::default()
            }
            Next::Chosen(request) => match member.choose_in_pass(request, position, tokens, place)? {
                Some(choice) => choice,
                None => return Ok(false),
            },
        };
        let is_chosen = choice.scores != 0;
        self.next_table.choices[row] = choice;
        self.next_table.logits[row] = logits;
        self.next_places[row] = member.memory.place_at(if is_chosen { 0 } else { position });
        self.rows[row] = Row { position, is_chosen };
        self.n += 1;
        Ok(true)
    }

    fn advance(&mut self, members: &mut dyn Members, budget: &Budget) -> Result<Progress> {
        self.pace.settle()?;
        if self.n == 0 {
            return Ok(Progress::Done);
        }
        if !self.has_begun {
            self.begin(members)?;
        }
        let mut begun = false;
        while self.next < self.work.len() {
            if begun && budget.is_over() {
                return Ok(Progress::Working);
            }
            let Some(most) = self.pace.room(budget) else { return Ok(Progress::Waiting) };
            self.submit(members, most, budget)?;
            begun = true;
        }
        for row in 0..self.n {
            members.runner(row).and_then(own::<CudaRunner>)?.end_pass(self.rows[row].position);
        }
        (self.n, self.has_begun) = (0, false);
        Ok(Progress::Done)
    }

    fn abandon(&mut self) {
        (self.n, self.has_begun) = (0, false);
        // What is queued may have changed some of it.
        self.known = None;
    }

    fn wait(&mut self) -> Result<()> {
        self.pace.wait_for_any()
    }

    fn queued(&mut self) -> Result<Duration> {
        self.pace.settle()?;
        Ok(self.pace.queued())
    }

    fn bytes(&self) -> u64 {
        self.memory.bytes() + self.table.bytes()
    }
}
