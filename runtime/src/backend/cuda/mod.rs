//! NVIDIA GPUs through CUDA: our own kernels, compiled ahead, and the driver alone.
//!
//! `driver` is the driver behind safe types, `selftest` decides which kernels can be trusted, `loader` brings weights to
//! the device, `weights` lays them out there, `memory` is what a session holds there and `cache` the part of it that
//! sessions can share, `plan` turns a program into kernel calls once, `run` queues one step of it, `group` one of several
//! sessions, `sampling` picks tokens and `pace` estimates how long work takes. A machine without a driver, or with an old
//! one, is one without such a device.

use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use super::{Backend, BackendInfo, Budget, Device, Group, KvType, Opening, Program, Runner, RunnerConfig, WeightId};
use crate::error::{Error, ErrorKind, Result};
use crate::quant::awq::StoredGemm;
use crate::tensor::{Weight, WeightShape};

mod cache;
#[doc(hidden)]
pub mod driver;
mod group;
mod loader;
mod memory;
mod pace;
mod plan;
mod run;
mod sampling;
mod selftest;
mod weights;

pub use driver::{CudaChoice, DeviceSummary, devices};

use driver::{Gpu, Stream};
use loader::{Loader, STAGING};
use weights::CudaWeight;

/// The kernels for many rows are at their best with thousands, and keep no wide rows in memory.
pub(crate) const DEFAULT_CHUNK: u32 = 2048;

/// What to open.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CudaOptions {
    /// Which device.
    pub device: CudaChoice,
    /// Queue every kernel by itself instead of a token as a graph.
    pub force_no_graphs: bool,
    /// Use only the kernels that every device has.
    pub force_portable: bool,
    /// Queue work with the device's highest priority instead of its lowest.
    pub high_priority: bool,
}

/// Opens the device that `options` name, and checks its arithmetic.
///
/// # Errors
/// [`ErrorKind::NoDevice`] if there is no driver, an old one or no device that fits, [`ErrorKind::Device`] if it fails
/// or computes wrongly.
pub fn open(options: &CudaOptions) -> Result<Box<dyn Backend>> {
    Ok(Box::new(CudaBackend::open(options)?))
}

/// Begins to open what `options` mean.
pub fn begin_open(options: CudaOptions) -> Box<dyn Opening> {
    Box::new(CudaOpening { options, gpu: None })
}

/// Bytes that a weight takes there.
pub(crate) fn weight_bytes(shape: &WeightShape) -> u64 {
    weights::bytes(shape)
}

/// As [`Backend::check`], which needs no device.
pub(crate) fn check(program: &Program, weights: &[WeightShape]) -> Result<()> {
    plan::check(program, weights)
}

/// Bytes of device memory that a session takes at most.
pub(crate) fn runner_bytes(program: &Program, config: &RunnerConfig) -> u64 {
    memory::runner_bytes(program, config)
}

/// A device on its way: driver, then trials of the kernels.
struct CudaOpening {
    options: CudaOptions,
    gpu: Option<Arc<Gpu>>,
}

impl CudaOpening {
    fn piece(&mut self) -> Result<Option<CudaDevice>> {
        match &self.gpu {
            None => {
                self.gpu = Some(Gpu::open(&self.options.device, self.options.high_priority)?);
                Ok(None)
            }
            Some(gpu) => {
                let choice = selftest::choose(gpu, &self.options)?;
                Ok(Some(CudaDevice { gpu: gpu.clone(), options: self.options.clone(), choice }))
            }
        }
    }
}

impl Opening for CudaOpening {
    fn advance(&mut self, budget: &Budget) -> Result<Option<Arc<dyn Device>>> {
        loop {
            if let Some(device) = self.piece()? {
                return Ok(Some(Arc::new(device)));
            }
            if budget.is_over() {
                return Ok(None);
            }
        }
    }

    fn wait(&mut self) -> Result<()> {
        Ok(())
    }
}

/// An open device with the kernels it is trusted with.
struct CudaDevice {
    gpu: Arc<Gpu>,
    options: CudaOptions,
    choice: selftest::Choice,
}

impl CudaDevice {
    fn backend(&self) -> CudaBackend {
        CudaBackend {
            gpu: self.gpu.clone(),
            options: self.options.clone(),
            choice: self.choice.clone(),
            weights: RwLock::new(Some(Vec::new())),
            loader: None,
            stack: None,
            weight_bytes: 0,
        }
    }
}

impl Device for CudaDevice {
    fn backend(&self) -> Box<dyn Backend> {
        Box::new(self.backend())
    }

    fn default_chunk(&self) -> u32 {
        DEFAULT_CHUNK
    }

    fn is_lost(&self) -> bool {
        self.gpu.is_lost()
    }

    fn note_loss(&self, _: &str) {
        self.gpu.lose();
    }

    fn force_loss(&self) {
        self.gpu.lose();
    }
}

/// The weights of one model on one device.
pub struct CudaBackend {
    gpu: Arc<Gpu>,
    options: CudaOptions,
    choice: selftest::Choice,
    /// `None` once they were evicted.
    weights: RwLock<Option<Vec<CudaWeight>>>,
    /// Made when the first weight comes.
    loader: Option<Loader>,
    /// The experts reserved last: the first one and the form of all.
    stack: Option<(WeightId, WeightShape)>,
    weight_bytes: u64,
}

/// The weights, which stay while this lives.
type Held<'a> = RwLockReadGuard<'a, Option<Vec<CudaWeight>>>;

impl CudaBackend {
    /// As [`open`].
    ///
    /// # Errors
    /// As [`open`].
    pub fn open(options: &CudaOptions) -> Result<Self> {
        let mut opening = CudaOpening { options: options.clone(), gpu: None };
        loop {
            if let Some(device) = opening.piece()? {
                return Ok(device.backend());
            }
        }
    }

    /// Makes every further call on the device fail, for tests.
    pub fn destroy(&self) {
        self.gpu.lose();
    }

    /// Keeps the weights where they are while the result lives; work on them may be queued.
    ///
    /// # Errors
    /// [`ErrorKind::Evicted`] if they are gone, [`ErrorKind::DeviceLost`].
    fn hold(&self) -> Result<Held<'_>> {
        self.gpu.check_lost()?;
        let weights = self.weights.read().unwrap_or_else(PoisonError::into_inner);
        match weights.is_some() {
            true => Ok(weights),
            false => Err(Error::new(ErrorKind::Evicted, "the weights were evicted")),
        }
    }

    /// Makes room for a weight, or for a stack of `experts` of them.
    fn push(&mut self, name: &str, shape: &WeightShape, experts: u32) -> Result<WeightId> {
        let loader = match &mut self.loader {
            Some(loader) => loader,
            none => none.insert(Loader::new(&self.gpu, STAGING)?),
        };
        let weight = CudaWeight::reserve_stack(&self.gpu, &loader.stream, name, shape, experts);
        let weight = weight.map_err(|e| e.in_tensor(name))?;
        (loader.filled, loader.end) = (0, shape.rows());
        self.weight_bytes += weight.bytes();
        let weights = self.weights.get_mut().unwrap_or_else(PoisonError::into_inner).get_or_insert_default();
        weights.push(weight);
        last_of(weights)
    }

    /// Whether the kernels for the matrix units of compute capability 9.0 are used.
    fn has_group_products(&self) -> bool {
        self.choice.group_products
    }
}

impl Backend for CudaBackend {
    fn info(&self) -> BackendInfo {
        BackendInfo {
            backend: "cuda",
            device: self.gpu.summary.name.clone(),
            variant: self.choice.reason.clone(),
            default_kv: KvType::F16,
            weight_bytes: self.weight_bytes,
        }
    }

    fn reserve(&mut self, name: &str, shape: &WeightShape) -> Result<WeightId> {
        drop(self.hold()?);
        self.push(name, shape, 1)
    }

    fn reserve_in_stack(&mut self, name: &str, shape: &WeightShape, index: usize, count: usize) -> Result<WeightId> {
        drop(self.hold()?);
        let refused = |message: &str| Err(Error::new(ErrorKind::Unsupported, message).in_tensor(name));
        let (Ok(count), false) = (u32::try_from(count), matches!(shape, WeightShape::Vector { .. })) else {
            return refused("experts of this form on this device");
        };
        if index == 0 {
            let first = self.push(name, shape, count)?;
            self.stack = Some((first, *shape));
            return Ok(first);
        }
        // The kernels know one form for all.
        let Some((first, _)) = self.stack.filter(|(_, first)| first == shape) else {
            return refused("experts of different forms on this device");
        };
        let weights = self.weights.get_mut().unwrap_or_else(PoisonError::into_inner).get_or_insert_default();
        let (Some(stack), Some(loader)) = (weights.get(first.0 as usize), &mut self.loader) else {
            return refused("experts without a first one");
        };
        loader.filled = index * stack.stack_rows();
        loader.end = loader.filled + shape.rows();
        weights.push(CudaWeight::Expert { first: first.0 });
        last_of(weights)
    }

    fn fill(&mut self, id: WeightId, rows: Weight) -> Result<()> {
        drop(self.hold()?);
        let count = rows.shape().rows();
        let weights = self.weights.get_mut().unwrap_or_else(PoisonError::into_inner).get_or_insert_default();
        match (holder(weights, id), &mut self.loader) {
            (Some(at), Some(loader)) if loader.filled + count <= loader.end => weights[at].fill(loader, &rows),
            _ => Err(Error::new(ErrorKind::InvalidInput, format!("weight {} takes no {count} rows", id.0))),
        }
    }

    fn takes_stored(&self, id: WeightId, stored: &StoredGemm) -> bool {
        let weights = self.weights.read().unwrap_or_else(PoisonError::into_inner);
        match (weights.as_ref(), &self.loader) {
            (Some(weights), Some(loader)) => {
                holder(weights, id).is_some_and(|at| weights[at].takes_stored(loader, stored))
            }
            _ => false,
        }
    }

    fn fill_stored(&mut self, id: WeightId, stored: &StoredGemm, inputs: Range<usize>) -> Result<()> {
        drop(self.hold()?);
        let weights = self.weights.get_mut().unwrap_or_else(PoisonError::into_inner).get_or_insert_default();
        match (holder(weights, id), &mut self.loader) {
            (Some(at), Some(loader)) if loader.filled + stored.n <= loader.end => {
                weights[at].fill_stored(loader, stored, inputs)
            }
            _ => Err(Error::new(ErrorKind::InvalidInput, format!("weight {} takes no {} rows", id.0, stored.n))),
        }
    }

    fn end_of_weights(&mut self) {
        self.loader = None;
    }

    fn weight_bytes(&self, shape: &WeightShape) -> u64 {
        weights::bytes(shape)
    }

    fn is_lost(&self) -> bool {
        self.gpu.is_lost()
    }

    fn check(&self, program: &Program, weights: &[WeightShape]) -> Result<()> {
        check(program, weights)
    }

    fn runner_bytes(&self, program: &Program, config: &RunnerConfig) -> u64 {
        memory::runner_bytes(program, config)
    }

    fn upload_is_settled(&self) -> Result<bool> {
        self.loader.as_ref().map_or(Ok(true), Loader::is_settled)
    }

    fn wait(&self) -> Result<()> {
        self.loader.as_ref().map_or(Ok(()), |loader| loader.stream.wait())
    }

    fn evict(&self) {
        // Freeing waits for what the device has queued.
        *self.weights.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn runner(self: Arc<Self>, program: &Arc<Program>, config: &RunnerConfig) -> Result<Box<dyn Runner>> {
        Ok(Box::new(run::CudaRunner::new(self, program, config)?))
    }

    fn group(self: Arc<Self>, program: &Arc<Program>, config: &RunnerConfig) -> Result<Option<Box<dyn Group>>> {
        Ok(Some(Box::new(group::CudaGroup::new(self, program, config)?)))
    }
}

/// The number of the newest of `weights`.
///
/// # Errors
/// [`ErrorKind::Unsupported`] beyond 32 bits.
fn last_of(weights: &[CudaWeight]) -> Result<WeightId> {
    u32::try_from(weights.len() - 1)
        .map(WeightId)
        .map_err(|_| Error::new(ErrorKind::Unsupported, "too many weights".to_owned()))
}

/// Index of what holds the rows of the newest of `weights`, if that is `id`.
fn holder(weights: &[CudaWeight], id: WeightId) -> Option<usize> {
    let at = id.0 as usize;
    match weights.last() {
        Some(CudaWeight::Expert { first }) if at + 1 == weights.len() => Some(*first as usize),
        Some(_) if at + 1 == weights.len() => Some(at),
        _ => None,
    }
}

/// The work queued on `stream` until now, for waiting.
fn mark(gpu: &Arc<Gpu>, stream: &Stream) -> Result<driver::Event> {
    let event = gpu.event()?;
    stream.record(&event)?;
    Ok(event)
}
