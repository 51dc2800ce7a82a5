//! Weights on a device: bringing them there in pieces, taking them away, bringing them back.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};
use std::time::{Duration, Instant};

use super::weights::{Upload, UploadPlan};
use crate::backend::{Backend, Budget, Program, RunnerConfig, cpu};
use crate::checkpoint::Checkpoint;
use crate::engine::{Bytes, Engine, Lease};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::WeightShape;

/// Bytes handed over between two looks at the clock.
const SLICE: u64 = 512 << 10;
/// The same where threads share what is handed over.
const SHARED_SLICE: u64 = 16 << 20;
/// Bytes that may be on their way to the device: more than any bus needs to be busy.
const ON_THE_WAY: u64 = 32 << 20;

/// How much of loading one call may do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoadBudget {
    /// Time of the calling thread, looked at between pieces; `None` is no limit.
    pub host: Option<Duration>,
    /// Bytes of weights to hand over; `None` is no limit.
    pub bytes: Option<u64>,
    /// GPU kernels to compile; `None` is no limit.
    pub kernels: Option<u32>,
    /// Whether pieces may be so large that threads for their time share them. Without it no call makes a thread.
    pub on_threads: bool,
}

impl LoadBudget {
    /// The end of the time, counted from now.
    pub(super) fn deadline(&self) -> Budget {
        Budget { deadline: self.host.and_then(|host| Instant::now().checked_add(host)), device: None }
    }
}

/// What loading is busy with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadStage {
    /// Configuration, headers, tokenizer.
    Files,
    /// Driver and trials of the kernels.
    Device,
    /// Weights on their way to the device.
    Weights,
    /// Kernels being compiled.
    Kernels,
    /// Nothing: the model is ready.
    Ready,
}

/// How far loading is; `done / total` is the share of the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// What it is busy with.
    pub stage: LoadStage,
    /// Bytes of weights handed over.
    pub done: u64,
    /// Bytes of all weights; 0 before they are known.
    pub total: u64,
}

/// What weights are brought from and for.
pub(super) struct Cargo {
    pub(super) engine: Arc<Engine>,
    pub(super) checkpoint: Checkpoint,
    pub(super) plan: UploadPlan,
    pub(super) program: Arc<Program>,
    /// Of a session that asks for nothing, whose kernels are compiled along.
    pub(super) config: RunnerConfig,
}

/// Weights on their way.
pub(super) enum Bring {
    Device,
    Weights { backend: Box<dyn Backend>, lease: Lease, upload: Upload, done: u64, on_the_way: u64 },
    Kernels { backend: Arc<dyn Backend>, lease: Lease },
}

impl Bring {
    /// Does pieces within the budget; the backend once everything is there. `None` also where the device has to be
    /// waited for.
    fn advance(&mut self, cargo: &Cargo, budget: &LoadBudget) -> Result<Option<(Arc<dyn Backend>, Lease)>> {
        let time = budget.deadline();
        let slice = if budget.on_threads { SHARED_SLICE } else { SLICE };
        let (mut bytes, mut kernels) = (0, 0);
        loop {
            match self {
                Self::Device => {
                    let Some(device) = cargo.engine.device(&time)? else { return Ok(None) };
                    let backend = device.backend();
                    let shapes: Vec<_> = cargo.plan.shapes().copied().collect();
                    backend.check(&cargo.program, &shapes)?;
                    let need = memory(cargo, &shapes, &*backend);
                    let lease = cargo.engine.ledger().lease("the model", need)?;
                    *self = Self::Weights { backend, lease, upload: Upload::default(), done: 0, on_the_way: 0 };
                }
                Self::Weights { backend, upload, done, on_the_way, .. } if !upload.is_complete(&cargo.plan) => {
                    if *on_the_way >= ON_THE_WAY {
                        if !backend.upload_is_settled()? {
                            return Ok(None);
                        }
                        *on_the_way = 0;
                    }
                    let left = budget.bytes.map_or(u64::MAX, |most| most.saturating_sub(bytes));
                    if left == 0 && bytes > 0 {
                        return Ok(None);
                    }
                    let brought = upload.advance(&cargo.plan, &cargo.checkpoint, &mut **backend, left.min(slice))?;
                    *done += brought;
                    *on_the_way += brought;
                    bytes += brought.max(1);
                }
                Self::Weights { backend, .. } => {
                    if !backend.upload_is_settled()? {
                        return Ok(None);
                    }
                    let Self::Weights { mut backend, lease, .. } = std::mem::replace(self, Self::Device) else {
                        return Ok(None);
                    };
                    backend.end_of_weights();
                    *self = Self::Kernels { backend: backend.into(), lease };
                }
                Self::Kernels { backend, .. } => {
                    // What a host prepares are no kernels: a part counts as a slice of weights.
                    let is_host = backend.is_host();
                    let (done, most, at_once) = if is_host {
                        (&mut bytes, budget.bytes, budget.on_threads)
                    } else {
                        let most = budget.kernels.map(u64::from);
                        (&mut kernels, most, budget.host.is_none() && most.is_none())
                    };
                    if most.is_some_and(|most| *done >= most.max(1)) {
                        return Ok(None);
                    }
                    *done += if is_host { SLICE } else { 1 };
                    if backend.prepare(&cargo.program, &cargo.config, if at_once { u32::MAX } else { 1 })? == 0 {
                        let Self::Kernels { backend, lease } = std::mem::replace(self, Self::Device) else {
                            return Ok(None);
                        };
                        return Ok(Some((backend, lease)));
                    }
                }
            }
            if time.is_over() {
                return Ok(None);
            }
        }
    }

    /// Blocks until [`Self::advance`] has something to do.
    fn wait(&self, cargo: &Cargo) -> Result<()> {
        match self {
            Self::Device => cargo.engine.wait(),
            Self::Weights { backend, on_the_way, upload, .. } => {
                let waiting = *on_the_way >= ON_THE_WAY || upload.is_complete(&cargo.plan);
                if waiting && !backend.upload_is_settled()? { backend.wait() } else { Ok(()) }
            }
            Self::Kernels { .. } => Ok(()),
        }
    }

    fn progress(&self, cargo: &Cargo) -> LoadProgress {
        let total = cargo.plan.bytes();
        match self {
            Self::Device => LoadProgress { stage: LoadStage::Device, done: 0, total },
            Self::Weights { done, .. } => LoadProgress { stage: LoadStage::Weights, done: *done, total },
            Self::Kernels { .. } => LoadProgress { stage: LoadStage::Kernels, done: total, total },
        }
    }
}

/// Memory that the weights take on `backend`. What is computed with where a file is mapped takes none.
fn memory(cargo: &Cargo, shapes: &[WeightShape], backend: &dyn Backend) -> Bytes {
    if !backend.is_host() {
        return Bytes { host: 0, device: shapes.iter().map(|shape| backend.weight_bytes(shape)).sum() };
    }
    let copied = cargo.plan.copied_bytes(&cargo.checkpoint, |shape| backend.weight_bytes(shape));
    Bytes { host: copied.saturating_add(cpu::rounded_bytes(&cargo.program, shapes)), device: 0 }
}

/// Where the weights are.
pub(super) enum Residence {
    /// On the device, ready to compute.
    Here(Arc<dyn Backend>, #[expect(dead_code, reason = "held until the weights go")] Lease),
    /// On their way.
    Coming(Bring),
    /// Taken away on request.
    Away,
}

impl Residence {
    /// Does pieces of bringing them; true once they are there.
    ///
    /// # Errors
    /// [`ErrorKind::Evicted`] if they were taken away, [`ErrorKind::DeviceLost`] until the engine recovers, or those of
    /// loading; after one the next call starts over.
    pub(super) fn advance(&mut self, cargo: &Cargo, budget: &LoadBudget) -> Result<bool> {
        self.look_for_loss(cargo)?;
        match self {
            Self::Here(..) => Ok(true),
            Self::Away => Err(evicted()),
            Self::Coming(bring) => match bring.advance(cargo, budget) {
                Ok(None) => Ok(false),
                Ok(Some((backend, lease))) => {
                    *self = Self::Here(backend, lease);
                    Ok(true)
                }
                Err(error) => {
                    *self = Self::Coming(Bring::Device);
                    Err(error)
                }
            },
        }
    }

    /// Starts over where the device was lost and the engine let go of it.
    fn look_for_loss(&mut self, cargo: &Cargo) -> Result<()> {
        let lost = match self {
            Self::Here(backend, _) | Self::Coming(Bring::Kernels { backend, .. }) => backend.is_lost(),
            Self::Coming(Bring::Weights { backend, .. }) => backend.is_lost(),
            _ => false,
        };
        if lost {
            if cargo.engine.is_lost() {
                return Err(Error::new(ErrorKind::DeviceLost, "the device was lost and not recovered yet"));
            }
            *self = Self::Coming(Bring::Device);
        }
        Ok(())
    }

    pub(super) fn wait(&self, cargo: &Cargo) -> Result<()> {
        match self {
            Self::Coming(bring) => bring.wait(cargo),
            _ => Ok(()),
        }
    }

    pub(super) fn progress(&self, cargo: &Cargo) -> LoadProgress {
        match self {
            Self::Coming(bring) => bring.progress(cargo),
            Self::Here(..) => {
                LoadProgress { stage: LoadStage::Ready, done: cargo.plan.bytes(), total: cargo.plan.bytes() }
            }
            Self::Away => LoadProgress { stage: LoadStage::Files, done: 0, total: cargo.plan.bytes() },
        }
    }

    /// Takes the weights away; returns whether there were any.
    pub(super) fn evict(&mut self) -> bool {
        let before = std::mem::replace(self, Self::Away);
        if let Self::Here(backend, _) = &before {
            backend.evict();
        }
        !matches!(before, Self::Away)
    }

    /// Begins to bring evicted weights back.
    pub(super) fn restore(&mut self) {
        if matches!(self, Self::Away) {
            *self = Self::Coming(Bring::Device);
        }
    }
}

pub(super) fn evicted() -> Error {
    Error::new(ErrorKind::Evicted, "the weights were evicted; restore the model first")
}

/// A residence that several sessions look at. Looking never takes long; working on it does, so nobody waits for that.
pub(super) struct Shared(RwLock<Residence>);

impl Shared {
    pub(super) fn new(residence: Residence) -> Self {
        Self(RwLock::new(residence))
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Residence> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, Residence> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` while another thread works on it or looks at it.
    pub(super) fn try_write(&self) -> Option<RwLockWriteGuard<'_, Residence>> {
        match self.0.try_write() {
            Ok(residence) => Some(residence),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// `None` while another thread works on it.
    pub(super) fn try_read(&self) -> Option<RwLockReadGuard<'_, Residence>> {
        match self.0.try_read() {
            Ok(residence) => Some(residence),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}
