//! Any GPU through wgpu: Vulkan, Metal or Direct3D 12.
//!
//! `adapters` says what there is, `device` is an open one and turns its failures into errors, `selftest` decides which
//! kernel variants can be trusted, `tune` measures which workgroups are fastest and `tuning` is what came of it,
//! `pipelines` compiles kernels, `weights` lays matrices out, `loader` brings them there, `memory` is what a session
//! holds there, `pace` estimates how long work takes, `plan` turns a program into bind groups and uniform blocks once,
//! `run` encodes and submits one step of it, `group` one of several sessions, `sampling` picks tokens without reading
//! logits back, and `choices` those of several sessions at once.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use awqua_shaders::{Elem, Reduce, Size, Variant, gemv_w4_rows_coop};

use super::{
    Backend, BackendInfo, Budget, DEFAULT_CHUNK, Device, Group, KvType, Opening, Program, Runner, RunnerConfig,
    WeightId,
};
use crate::error::{Error, ErrorKind, Result};
use crate::quant::awq::StoredGemm;
use crate::tensor::{Weight, WeightShape};

mod adapters;
mod choices;
mod device;
mod group;
mod loader;
mod memory;
mod pace;
mod pipelines;
mod plan;
mod products;
mod profile;
mod readback;
mod run;
mod sampling;
mod selftest;
mod tune;
mod tuning;
#[cfg(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd"))]
mod vulkan;
#[cfg(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd"))]
pub mod vulkan_host;
mod weights;

pub use adapters::{AdapterSummary, DeviceIds, adapters};
pub use products::products;
pub use tune::{Candidate, MatrixShape, Tuned, shapes_of, tune, usual_shapes};

use device::Gpu;
use loader::Loader;
use pipelines::Pipelines;
use plan::passes::{self, PassKernels};
use selftest::SelfTest;
use tuning::Tuning;
use weights::{GpuW4, GpuWeight};

/// Which device is meant.
#[derive(Debug, Clone, Default)]
pub enum DeviceChoice {
    /// The preferred one: dedicated before integrated, software last.
    #[default]
    Best,
    /// The first whose name has this part, in any letter case; or the one with this number in [`adapters`].
    Named(String),
    /// The one with this `deviceUUID`.
    Uuid([u8; 16]),
    /// The one with this `deviceLUID`.
    Luid([u8; 8]),
    /// The host's own.
    Shared(SharedGpu),
    /// The host's own, which it does not use through wgpu itself: its error and device-lost handlers become ours.
    Adopted(SharedGpu),
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hex = |f: &mut fmt::Formatter<'_>, id: &[u8]| id.iter().try_for_each(|byte| write!(f, "{byte:02x}"));
        match self {
            Self::Best => f.write_str("the preferred one"),
            Self::Named(name) => write!(f, "`{name}`"),
            Self::Uuid(id) => f.write_str("UUID ").and_then(|()| hex(f, id)),
            Self::Luid(id) => f.write_str("LUID ").and_then(|()| hex(f, id)),
            Self::Shared(_) | Self::Adopted(_) => f.write_str("the shared one"),
        }
    }
}

/// A device that the host made and goes on using, with the adapter it is of.
///
/// Make it with the features of [`features_for_sharing`] and the adapter's own limits, or at least the limits that are
/// refused by name otherwise. Its error and device-lost handlers stay the host's; our own errors are caught in scopes.
/// Work is submitted to `queue` in pieces, only inside calls that the host makes.
#[derive(Debug, Clone)]
pub struct SharedGpu {
    /// The adapter.
    pub adapter: wgpu::Adapter,
    /// The device.
    pub device: wgpu::Device,
    /// Its queue.
    pub queue: wgpu::Queue,
}

/// Features of `adapter` that make the kernels faster; a shared device works without any of them. The cooperative
/// matrix feature is experimental in wgpu and has to be enabled as such.
pub fn features_for_sharing(adapter: &wgpu::Adapter) -> wgpu::Features {
    device::wanted_features(adapter, &WgpuOptions::default())
}

/// What to open and which kernel variants to allow.
#[derive(Debug, Clone, Default)]
pub struct WgpuOptions {
    /// Which device.
    pub device: DeviceChoice,
    /// Compute in single precision even where half precision is offered.
    pub force_f32: bool,
    /// Do without subgroup operations even where they are offered.
    pub force_no_subgroup: bool,
    /// Have short prompts go through packed matrices several rows at once on software adapters, too, which compute rather than
    /// wait for memory, and take seconds to try the kernel. GPUs do in any case.
    pub rows_on_software: bool,
    /// Bytes of a buffer that kernels may see at once, if less than the device allows; splits weights accordingly.
    pub limit_binding: Option<u64>,
    /// Multiplications and additions after which a submission ends, so that others get their turn on the device;
    /// `None` takes some tens of milliseconds' worth.
    pub submission_flops: Option<u64>,
    /// What [`Device::pipeline_cache`] gave at an earlier start.
    pub pipeline_cache: Option<Arc<Vec<u8>>>,
    /// What [`tune`] found at an earlier start; ignored where it is of another adapter, driver or set of kernels, or none
    /// of ours, which [`BackendInfo::variant`] tells.
    pub tuning: Option<Arc<Vec<u8>>>,
}

/// Opens the adapter that `options` name, or the preferred one, and checks its arithmetic.
///
/// # Errors
/// [`ErrorKind::NoDevice`] if no adapter fits, [`ErrorKind::Device`] if its driver fails or computes wrongly.
pub fn open(options: &WgpuOptions) -> Result<Box<dyn Backend>> {
    Ok(Box::new(WgpuBackend::open(options)?))
}

/// Bytes that a weight takes on a GPU.
pub(crate) fn weight_bytes(shape: &WeightShape) -> u64 {
    weights::bytes(shape)
}

/// Bytes of device memory that a session takes at most.
pub(crate) fn runner_bytes(program: &Program, config: &RunnerConfig) -> u64 {
    run::bytes(program, config)
}

fn open_gpu(options: &WgpuOptions) -> Result<Gpu> {
    match &options.device {
        DeviceChoice::Shared(shared) => Gpu::share(shared, options),
        DeviceChoice::Adopted(adopted) => Gpu::adopt(adopted, options),
        choice => {
            let adapters = adapters::enumerate();
            let mut summaries: Vec<_> = adapters.iter().enumerate().map(|(i, a)| adapters::summary(i, a)).collect();
            let index = adapters::select(&summaries, choice)?;
            Gpu::open(&adapters[index], summaries.swap_remove(index), options)
        }
    }
}

/// Begins to open what `options` mean.
pub fn begin_open(options: WgpuOptions) -> Box<dyn Opening> {
    Box::new(WgpuOpening { options, testing: None })
}

/// A device on its way: driver, then trials of the kernels.
struct WgpuOpening {
    options: WgpuOptions,
    testing: Option<(Arc<Gpu>, Arc<Pipelines>, SelfTest)>,
}

impl WgpuOpening {
    fn piece(&mut self) -> Result<Option<WgpuDevice>> {
        let Some((gpu, pipelines, test)) = &mut self.testing else {
            let gpu = open_gpu(&self.options)?;
            let saved = self.options.pipeline_cache.as_ref().map(|saved| saved.as_slice());
            let (pipelines, test) = (Pipelines::new(&gpu, saved), SelfTest::new(&gpu, &self.options));
            self.testing = Some((Arc::new(gpu), Arc::new(pipelines), test));
            return Ok(None);
        };
        let _watch = gpu.watch();
        let Some(mut choice) = test.advance(gpu, pipelines)? else { return Ok(None) };
        let tuning = match self.options.tuning.as_deref() {
            None => None,
            Some(saved) => {
                let most = gpu.limits.max_compute_invocations_per_workgroup;
                Tuning::parse(saved, &gpu.summary, most).unwrap_or_else(|reason| {
                    choice.reason += &format!("; the tuning is ignored: {reason}");
                    None
                })
            }
        };
        if tuning.is_some() {
            choice.reason += "; tuned";
        }
        let tuning = Arc::new(tuning.unwrap_or_default());
        Ok(Some(WgpuDevice { gpu: gpu.clone(), pipelines: pipelines.clone(), choice, tuning }))
    }
}

impl Opening for WgpuOpening {
    fn advance(&mut self, budget: &Budget) -> Result<Option<Arc<dyn Device>>> {
        loop {
            if let Some(device) = self.piece()? {
                return Ok(Some(Arc::new(device)));
            }
            if budget.is_over() || self.testing.as_ref().is_some_and(|(.., test)| test.is_waiting()) {
                return Ok(None);
            }
        }
    }

    fn wait(&mut self) -> Result<()> {
        match &self.testing {
            Some((gpu, _, test)) if test.is_waiting() => gpu.wait_for_any(),
            _ => Ok(()),
        }
    }
}

/// [`Device::default_chunk`] of devices with many multiprocessors and memory of their own: 256 rows by 4,096 outputs keep
/// half of an H100 busy.
pub(crate) const DISCRETE_CHUNK: u32 = 1024;

/// Fewest rows at once without products on matrix units: two took 6.8 ms together on an H100, and 5.6 ms one behind the
/// other (7B shape, as members of a pass).
const LEAST: u32 = 3;
/// With them: three took 4.3 ms together, and one 2.6 ms.
const LEAST_ON_UNITS: u32 = 2;

/// An open GPU with the kernel variants it is trusted with.
struct WgpuDevice {
    gpu: Arc<Gpu>,
    pipelines: Arc<Pipelines>,
    choice: selftest::Choice,
    tuning: Arc<Tuning>,
}

impl WgpuDevice {
    fn backend(&self) -> WgpuBackend {
        WgpuBackend {
            gpu: self.gpu.clone(),
            pipelines: self.pipelines.clone(),
            elem: self.choice.elem,
            reduce: self.choice.reduce,
            size: self.choice.size,
            coop: self.choice.coop,
            rows: self.choice.rows,
            variant: self.choice.reason.clone(),
            tuning: self.tuning.clone(),
            weights: Vec::new(),
            evicted: AtomicBool::new(false),
            pass_kernels: OnceLock::new(),
            filled: 0,
            loader: None,
            stack: None,
            weight_bytes: 0,
        }
    }
}

impl Device for WgpuDevice {
    fn backend(&self) -> Box<dyn Backend> {
        Box::new(self.backend())
    }

    fn default_chunk(&self) -> u32 {
        if self.gpu.summary.kind == "discrete" { DISCRETE_CHUNK } else { DEFAULT_CHUNK }
    }

    fn is_lost(&self) -> bool {
        self.gpu.is_lost()
    }

    fn note_loss(&self, reason: &str) {
        self.gpu.lose(reason);
    }

    fn force_loss(&self) {
        self.gpu.destroy();
    }

    fn pipeline_cache(&self) -> Option<Vec<u8>> {
        self.pipelines.save()
    }
}

/// The weights of one model on one GPU.
pub struct WgpuBackend {
    gpu: Arc<Gpu>,
    pipelines: Arc<Pipelines>,
    elem: Elem,
    reduce: Reduce,
    size: Size,
    coop: bool,
    /// Whether several rows of any packed matrix go through it at once.
    rows: bool,
    variant: String,
    tuning: Arc<Tuning>,
    weights: Vec<GpuWeight>,
    evicted: AtomicBool,
    /// The kernels of passes over several sessions that passed their trials, once somebody needs them.
    pass_kernels: OnceLock<Option<PassKernels>>,
    /// Rows of the last weight that came so far.
    filled: usize,
    /// Made when the first weight comes.
    loader: Option<Loader>,
    /// The first expert of the stack under way, and the form of all.
    stack: Option<(WeightId, WeightShape)>,
    weight_bytes: u64,
}

impl WgpuBackend {
    /// As [`open`].
    ///
    /// # Errors
    /// As [`open`].
    pub fn open(options: &WgpuOptions) -> Result<Self> {
        let mut opening = WgpuOpening { options: options.clone(), testing: None };
        loop {
            if let Some(device) = opening.piece()? {
                return Ok(device.backend());
            }
            opening.wait()?;
        }
    }

    /// Destroys the device and frees its memory at once; the sessions on it fail with [`ErrorKind::DeviceLost`].
    pub fn destroy(&self) {
        self.gpu.destroy();
    }

    /// Fails if the weights are gone.
    fn check(&self) -> Result<()> {
        match self.evicted.load(Ordering::Acquire) {
            false => self.gpu.check(),
            true => Err(Error::new(ErrorKind::Evicted, "the weights were evicted")),
        }
    }

    /// What there is for passes over several sessions; the first call waits for trials of the kernels.
    fn pass_kernels(&self) -> Option<PassKernels> {
        *self.pass_kernels.get_or_init(|| passes::kernels(self))
    }

    /// Whether few rows go through this matrix at once on matrix units.
    fn rows_on_units(&self, matrix: &GpuW4) -> bool {
        self.coop && gemv_w4_rows_coop::handles(matrix.group_size, matrix.k)
    }

    /// Whether steps of few rows have kernels that take several at once.
    fn takes_rows(&self) -> bool {
        self.coop || self.rows
    }

    /// The fewest rows that are faster at once than one by one.
    fn least_rows(&self) -> u32 {
        if self.coop { LEAST_ON_UNITS } else { LEAST }
    }

    /// The weight whose buffers the next `count` rows of weight `id` go to, and which of its rows is the first: experts
    /// lie in the first one's.
    fn place(&self, id: WeightId, count: usize) -> Result<(usize, usize)> {
        let last = self.weights.len().checked_sub(1);
        let (at, before, room) = match (self.weights.get(id.0 as usize), self.stack) {
            (Some(&GpuWeight::Expert { n, first }), Some((_, shape))) => {
                (first, (id.0 - first) as usize * weights::expert_rows(&shape), n as usize)
            }
            (_, Some((first, shape))) if first == id => (id.0, 0, shape.rows()),
            (weight, _) => (id.0, 0, weight.map_or(0, GpuWeight::rows)),
        };
        let at = at as usize;
        match last == Some(id.0 as usize) && at < self.weights.len() && self.filled + count <= room {
            true => Ok((at, before + self.filled)),
            false => Err(Error::new(ErrorKind::InvalidInput, format!("weight {} takes no {count} rows", id.0))),
        }
    }

    fn weight(&self, id: WeightId) -> Result<&GpuWeight> {
        self.weights
            .get(id.0 as usize)
            .ok_or_else(|| Error::new(ErrorKind::InvalidInput, format!("the backend holds no weight {}", id.0)))
    }
}

impl Backend for WgpuBackend {
    fn info(&self) -> BackendInfo {
        BackendInfo {
            backend: "wgpu",
            device: format!("{} ({})", self.gpu.summary.name, self.gpu.summary.api),
            variant: self.variant.clone(),
            default_kv: KvType::F16,
            weight_bytes: self.weight_bytes,
        }
    }

    fn reserve(&mut self, name: &str, shape: &WeightShape) -> Result<WeightId> {
        let id = u32::try_from(self.weights.len())
            .map_err(|_| Error::new(ErrorKind::Unsupported, "too many weights".to_owned()))?;
        self.weights.push(GpuWeight::reserve(&self.gpu, name, shape)?);
        self.filled = 0;
        self.weight_bytes += weights::bytes(shape);
        Ok(WeightId(id))
    }

    fn reserve_in_stack(&mut self, name: &str, shape: &WeightShape, index: usize, count: usize) -> Result<WeightId> {
        if matches!(shape, WeightShape::Vector { .. }) {
            return Err(Error::new(ErrorKind::Unsupported, "experts of this form on this device").in_tensor(name));
        }
        let id = u32::try_from(self.weights.len())
            .map_err(|_| Error::new(ErrorKind::Unsupported, "too many weights".to_owned()))?;
        if index == 0 {
            let stack = GpuWeight::reserve_experts(&self.gpu, name, shape, count)?;
            self.weights.push(stack);
            self.stack = Some((WeightId(id), *shape));
        } else {
            // The kernels know one form for all.
            let Some((first, _)) = self.stack.filter(|(_, first)| first == shape) else {
                let message = "experts of different forms on this device";
                return Err(Error::new(ErrorKind::Unsupported, message).in_tensor(name));
            };
            let n = u32::try_from(shape.rows()).unwrap_or(u32::MAX);
            self.weights.push(GpuWeight::Expert { n, first: first.0 });
        }
        self.filled = 0;
        self.weight_bytes += weights::bytes(shape);
        Ok(WeightId(id))
    }

    fn fill(&mut self, id: WeightId, rows: Weight) -> Result<()> {
        let count = rows.shape().rows();
        let (at, first) = self.place(id, count)?;
        let loader = match &mut self.loader {
            Some(loader) => loader,
            none => none.insert(Loader::new(&self.gpu, &self.pipelines)?),
        };
        self.weights[at].fill(&self.gpu, loader, first, &rows)?;
        self.filled += count;
        Ok(())
    }

    fn takes_stored(&self, id: WeightId, stored: &StoredGemm) -> bool {
        match (&self.loader, self.place(id, stored.n)) {
            (Some(loader), Ok((at, first))) => match &self.weights[at] {
                GpuWeight::W4(to) => loader.takes(to, stored, first),
                _ => false,
            },
            _ => false,
        }
    }

    fn fill_stored(&mut self, id: WeightId, stored: &StoredGemm, inputs: Range<usize>) -> Result<()> {
        let (at, first) = self.place(id, stored.n)?;
        match (&mut self.loader, &self.weights[at]) {
            (Some(loader), GpuWeight::W4(to)) if loader.takes(to, stored, first) => {
                let last = inputs.end == stored.k;
                loader.fill(&self.gpu, to, first, stored, inputs)?;
                if last {
                    self.filled += stored.n;
                }
                Ok(())
            }
            _ => Err(Error::new(ErrorKind::InvalidInput, format!("weight {} does not take stored rows", id.0))),
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

    fn runner_bytes(&self, program: &Program, config: &RunnerConfig) -> u64 {
        runner_bytes(program, config)
    }

    fn prepare(&self, program: &Program, config: &RunnerConfig, most: u32) -> Result<u32> {
        let _watch = self.gpu.watch();
        let mut kernels = plan::Plan::kernels(self, program, config)?;
        kernels.extend(sampling::KERNELS.map(|kernel| (kernel, Variant::default())));
        kernels.retain(|&(kernel, variant)| !self.pipelines.has(kernel, variant));
        for &(kernel, variant) in kernels.iter().take(most as usize) {
            self.pipelines.get(&self.gpu, kernel, variant)?;
        }
        Ok((kernels.len() as u32).saturating_sub(most))
    }

    fn upload_is_settled(&self) -> Result<bool> {
        self.gpu.is_idle()
    }

    fn wait(&self) -> Result<()> {
        self.gpu.wait_for_any()
    }

    fn evict(&self) {
        self.evicted.store(true, Ordering::Release);
        self.weights.iter().for_each(GpuWeight::destroy);
    }

    fn runner(self: Arc<Self>, program: &Arc<Program>, config: &RunnerConfig) -> Result<Box<dyn Runner>> {
        Ok(Box::new(run::WgpuRunner::new(self, program, config)?))
    }

    fn group(self: Arc<Self>, program: &Arc<Program>, config: &RunnerConfig) -> Result<Option<Box<dyn Group>>> {
        Ok(group::WgpuGroup::new(self, program, config)?.map(|group| Box::new(group) as Box<dyn Group>))
    }
}
