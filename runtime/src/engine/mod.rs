//! Where models run: the device, what may be used of it, and what happens when it is lost.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::backend::{self, Budget, Device, Jobs, Opening, Program, RunnerConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::WeightShape;

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "cuda_none.rs"]
mod cuda;
mod ledger;
#[cfg(feature = "wgpu")]
mod opening;
#[cfg(not(feature = "wgpu"))]
#[path = "opening_cpu.rs"]
mod opening;

pub use ledger::Bytes;
pub(crate) use ledger::{Lease, Ledger};
pub use opening::DeviceChoice;

/// Losses of a device within [`LOSS_WINDOW`] after which it is given up.
const MAX_LOSSES: usize = 3;
/// How long a loss counts.
const LOSS_WINDOW: Duration = Duration::from_secs(300);

/// Which backend models are loaded onto.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BackendChoice {
    /// A GPU if there is a usable one, else the CPU: with feature `cuda` an NVIDIA GPU through CUDA, unless a model is
    /// loaded that CUDA can not compute, from then on through wgpu. A software GPU is not chosen on its own.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU through wgpu, software ones included; an error if there is none.
    Wgpu,
    /// An NVIDIA GPU through CUDA; an error if there is none, or if this build lacks the feature `cuda`.
    Cuda,
}

/// What an engine is made from.
#[derive(Debug, Clone, Default)]
pub struct EngineOptions {
    /// Which backend.
    pub backend: BackendChoice,
    /// Which device of it.
    pub device: DeviceChoice,
    /// On a GPU: never use f16 arithmetic or subgroup operations, whatever the adapter offers. On the CPU: never use
    /// wide instructions, so that every processor of one family computes the same bits.
    pub portable_kernels: bool,
    /// Most bytes of host memory for weights, KV caches and activations of all models and sessions.
    pub host_budget: Option<u64>,
    /// The same of device memory.
    pub device_budget: Option<u64>,
    /// What [`Engine::pipeline_cache`] gave at an earlier start; shortens the first load. Trusted to come from there:
    /// damage is noticed, forgery is not.
    pub pipeline_cache: Option<Arc<Vec<u8>>>,
    /// What [`crate::backend::wgpu::tune`] found on this device, here or elsewhere; ignored where it does not fit, which
    /// [`crate::backend::BackendInfo::variant`] tells.
    pub tuning: Option<Arc<Vec<u8>>>,
    /// Recover from the loss of a device without being asked, in the next tick.
    pub auto_recover: bool,
    /// CPU threads of a session, the caller's included, if it does not say; `None` makes no threads.
    pub threads: Option<usize>,
    /// The host's own threads, used instead of threads of ours.
    pub jobs: Option<Jobs>,
    /// On CUDA: queue work with the device's highest priority instead of its lowest. With the lowest, blocks of other
    /// streams that wait are started first, so that a host's own CUDA work is not held up; work of graphics interfaces
    /// is not ordered by it. Elsewhere it has no meaning.
    pub high_priority: bool,
}

/// How much memory to give back; each level includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trim {
    /// Mapped pages of files: read again when needed.
    Pages,
    /// Caches of idle sessions: computed again when needed.
    Sessions,
    /// Weights of models whose sessions are idle: to be restored.
    Weights,
}

/// A place where models run. Models and sessions keep what they need of it.
pub struct Engine {
    options: EngineOptions,
    ledger: Arc<Ledger>,
    state: Mutex<State>,
    /// Number of requests to trim, and the level of the last one, in the lowest byte.
    trims: AtomicU64,
}

#[derive(Default)]
struct State {
    /// Which device instead of the one of the options.
    instead: Option<DeviceChoice>,
    device: Option<Arc<dyn Device>>,
    opening: Option<Box<dyn Opening>>,
    /// Recent losses.
    losses: Vec<Instant>,
    /// The GPU was given up, and why.
    given_up: Option<String>,
    /// CUDA was left although it is there: a model or its driver does not fit it.
    without_cuda: bool,
}

impl State {
    fn is_cuda(&self, options: &EngineOptions) -> bool {
        !self.without_cuda && cuda::is_chosen(options, self.instead.as_ref().unwrap_or(&options.device))
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Engine {
    /// An engine. No device is opened before the first model is loaded.
    pub fn new(mut options: EngineOptions) -> Arc<Self> {
        let ledger = Ledger::new(options.host_budget, options.device_budget);
        // A host's device is let go of when another one takes its place, so it is in one place only.
        let instead = options.device.is_shared().then(|| std::mem::take(&mut options.device));
        let state = Mutex::new(State { instead, ..State::default() });
        Arc::new(Self { options, ledger, state, trims: AtomicU64::new(0) })
    }

    /// What it was made from, but for a host's own device.
    pub fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// Memory that its models and sessions hold.
    pub fn used(&self) -> Bytes {
        self.ledger.used()
    }

    /// Compiled GPU kernels for [`EngineOptions::pipeline_cache`] of a later start, if a device is open and gives them
    /// out.
    pub fn pipeline_cache(&self) -> Option<Vec<u8>> {
        let device = self.lock().device.clone()?;
        device.pipeline_cache()
    }

    /// Whether the device is lost and [`Self::recover`] was not called yet.
    pub fn is_lost(&self) -> bool {
        self.lock().device.as_ref().is_some_and(|device| device.is_lost())
    }

    /// Takes note that the device is gone, for hosts that share theirs and hear of it first.
    pub fn note_loss(&self, reason: &str) {
        if let Some(device) = &self.lock().device {
            device.note_loss(reason);
        }
    }

    /// Loses the device on purpose, for tests of what follows. The CPU can not be lost.
    pub fn force_loss(&self) {
        let device = self.lock().device.clone();
        if let Some(device) = device {
            device.force_loss();
        }
    }

    /// Lets go of a lost device, so that models find another one the next time they are worked on: they upload their
    /// weights again, and sessions compute their tokens again. Nothing happens if no device is lost. After three losses
    /// within five minutes, or where no device can be opened any more, [`BackendChoice::Auto`] goes on with the CPU.
    ///
    /// # Errors
    /// [`ErrorKind::DeviceLost`] if the device was given up and the CPU is not allowed, or if a shared device is lost:
    /// only the host can make another one, see [`Self::recover_with`].
    pub fn recover(&self) -> Result<()> {
        let mut state = self.lock();
        if !state.device.as_ref().is_some_and(|device| device.is_lost()) {
            return Ok(());
        }
        if state.instead.as_ref().unwrap_or(&self.options.device).is_shared() {
            let message = "the shared device is lost; hand over another one";
            return Err(Error::new(ErrorKind::DeviceLost, message));
        }
        let now = Instant::now();
        state.losses.retain(|loss| now.duration_since(*loss) < LOSS_WINDOW);
        state.losses.push(now);
        if state.losses.len() > MAX_LOSSES {
            let reason = format!("it was lost {} times in a row", state.losses.len());
            self.give_up(&mut state, &reason)?;
        }
        state.device = None;
        state.opening = None;
        Ok(())
    }

    /// As [`Self::recover`], with another device; also before one is lost, as a new renderer is made.
    pub fn recover_with(&self, device: DeviceChoice) {
        let mut state = self.lock();
        if let Some(device) = state.device.take() {
            device.note_loss("replaced by another one");
        }
        state.opening = None;
        state.instead = Some(device);
    }

    /// Whether models are computed in host memory, as far as that is known before a device is open.
    pub(crate) fn is_host(&self) -> bool {
        let state = self.lock();
        match &state.device {
            Some(device) => device.backend().is_host(),
            None => {
                let choice = state.instead.as_ref().unwrap_or(&self.options.device);
                !state.is_cuda(&self.options) && opening::on_host(&self.options, choice)
            }
        }
    }

    /// Bytes that a weight takes on the device that will be opened.
    pub(crate) fn weight_bytes(&self, shape: &WeightShape) -> u64 {
        match self.is_cuda() {
            true => cuda::weight_bytes(shape),
            false => opening::weight_bytes(shape),
        }
    }

    /// Bytes that a session takes at most on the device that will be opened.
    pub(crate) fn runner_bytes(&self, program: &Program, config: &RunnerConfig) -> u64 {
        match self.is_cuda() {
            true => cuda::runner_bytes(program, config),
            false => opening::runner_bytes(program, config),
        }
    }

    /// Prompt tokens that a session computes at a time unless asked otherwise; of a device that is not open yet, at most.
    pub(crate) fn default_chunk(&self) -> u32 {
        let device = self.lock().device.clone();
        match device {
            Some(device) => device.default_chunk(),
            None if self.is_cuda() => cuda::DEFAULT_CHUNK,
            None if self.is_host() => backend::DEFAULT_CHUNK,
            None => opening::MOST_CHUNK,
        }
    }

    /// Whether CUDA is what models are loaded onto.
    fn is_cuda(&self) -> bool {
        self.lock().is_cuda(&self.options)
    }

    /// Goes on without CUDA where it can not compute `program` over `weights` and need not: models that are there stay,
    /// those that are loaded from now on go to another backend.
    pub(crate) fn choose_for(&self, program: &Program, weights: &[WeightShape]) {
        let mut state = self.lock();
        let may = self.options.backend == BackendChoice::Auto && state.is_cuda(&self.options);
        if may && state.given_up.is_none() && cuda::check(program, weights).is_err() {
            state.without_cuda = true;
            state.device = None;
            state.opening = None;
        }
    }

    /// Asks every session of this engine to give memory back. Any thread, any time; each session does so in its next
    /// tick, also when it is idle, and says so with [`crate::session::Event::MemoryPressure`].
    pub fn request_trim(&self, level: Trim) {
        let next = |trims: u64| Some((trims & !0xff).wrapping_add(0x100) | level as u64);
        let _ = self.trims.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
    }

    /// What [`Self::trim_since`] compares with.
    pub(crate) fn trims(&self) -> u64 {
        self.trims.load(Ordering::Acquire)
    }

    /// The last request to trim if it is not `seen`, which is updated.
    pub(crate) fn trim_since(&self, seen: &mut u64) -> Option<Trim> {
        let trims = self.trims.load(Ordering::Acquire);
        if std::mem::replace(seen, trims) == trims {
            return None;
        }
        Some(match trims & 0xff {
            0 => Trim::Pages,
            1 => Trim::Sessions,
            _ => Trim::Weights,
        })
    }

    pub(crate) fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// The device, opened in pieces; `None` while it is not ready.
    ///
    /// # Errors
    /// [`ErrorKind::DeviceLost`] until [`Self::recover`], or those of opening it.
    pub(crate) fn device(&self, budget: &Budget) -> Result<Option<Arc<dyn Device>>> {
        let mut state = self.lock();
        if let Some(device) = &state.device {
            return match device.is_lost() {
                false => Ok(Some(device.clone())),
                true => Err(Error::new(ErrorKind::DeviceLost, "the device was lost and not recovered yet")),
            };
        }
        if state.opening.is_none() {
            let choice = state.instead.as_ref().unwrap_or(&self.options.device);
            state.opening = Some(match state.given_up.is_some() {
                true => opening::processor(&self.options),
                false if state.is_cuda(&self.options) => cuda::begin(&self.options, choice)?,
                false => opening::begin(&self.options, choice)?,
            });
        }
        let Some(opening) = &mut state.opening else { return Ok(None) };
        match opening.advance(budget) {
            Ok(None) => Ok(None),
            Ok(Some(device)) => {
                state.opening = None;
                Ok(Some(state.device.insert(device).clone()))
            }
            Err(error) => {
                state.opening = None;
                // Where anything will do, a driver that fails is as good as none.
                if self.options.backend == BackendChoice::Auto && state.is_cuda(&self.options) {
                    state.without_cuda = true;
                    return Ok(None);
                }
                let asked = state.instead.as_ref().unwrap_or(&self.options.device).is_asked_for();
                if self.options.backend == BackendChoice::Auto && !asked {
                    self.give_up(&mut state, &error.to_string())?;
                    return Ok(None);
                }
                Err(error)
            }
        }
    }

    /// Blocks until [`Self::device`] has something to do.
    pub(crate) fn wait(&self) -> Result<()> {
        self.lock().opening.as_mut().map_or(Ok(()), |opening| opening.wait())
    }

    /// Why the GPU is not used although one was allowed.
    pub(crate) fn given_up(&self) -> Option<String> {
        self.lock().given_up.clone()
    }

    fn give_up(&self, state: &mut State, reason: &str) -> Result<()> {
        if self.options.backend != BackendChoice::Auto {
            let message = format!("the device is given up: {reason}");
            return Err(Error::new(ErrorKind::DeviceLost, message));
        }
        state.given_up = Some(reason.to_owned());
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A device that needs no opening.
struct Ready(Option<Arc<dyn Device>>);

impl Opening for Ready {
    fn advance(&mut self, _: &Budget) -> Result<Option<Arc<dyn Device>>> {
        Ok(self.0.take())
    }

    fn wait(&mut self) -> Result<()> {
        Ok(())
    }
}
