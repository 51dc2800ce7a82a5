//! The device: which adapters exist, opening one, and turning everything it reports into typed errors.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use wgpu::{Backends, DeviceType, Features, Limits};

use super::WgpuOptions;
use crate::error::{Error, ErrorKind, Result};

/// Storage buffers that one dispatch binds at most.
const STORAGE_BUFFERS: u32 = 8;
/// Workgroup memory that a kernel uses at most, in bytes.
const WORKGROUP_BYTES: u32 = 16 << 10;
/// Invocations of a workgroup at most.
const INVOCATIONS: u32 = 256;
/// A device that finishes no submission for this long has failed.
const WATCHDOG: Duration = Duration::from_secs(30);
/// How long one poll blocks; the watchdog and the lost flag are looked at between polls.
const POLL: Duration = Duration::from_millis(500);
/// Bytes handed to the driver before waiting for it; bounds the memory of its staging copies.
pub(super) const SLICE: usize = 16 << 20;
/// Share of the memory budget, in percent, above which the driver is not asked for more.
const BUDGET_PERCENT: u8 = 97;

/// What an adapter is and offers, for people and for choosing one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterSummary {
    /// Number by which [`WgpuOptions::device`] can name it.
    pub index: usize,
    /// Name the driver gives it.
    pub name: String,
    /// Graphics interface in use: `vulkan`, `metal` or `dx12`.
    pub api: &'static str,
    /// `discrete`, `integrated`, `virtual`, `cpu` or `other`.
    pub kind: &'static str,
    /// Driver and its version.
    pub driver: String,
    /// Whether shaders can compute in half precision.
    pub f16: bool,
    /// Smallest and largest subgroup, if subgroup operations are offered.
    pub subgroup: Option<(u32, u32)>,
    /// Largest buffer, in bytes.
    pub max_buffer_bytes: u64,
    /// Largest part of a buffer that a kernel sees, in bytes; larger weights are split.
    pub max_binding_bytes: u64,
    /// Workgroup memory, in bytes.
    pub workgroup_bytes: u32,
    /// Why the adapter can not be used, if so.
    pub unusable: Option<String>,
}

/// All adapters, the preferred one first; empty if there is no driver.
pub fn adapters() -> Vec<AdapterSummary> {
    enumerate().iter().enumerate().map(|(index, adapter)| summary(index, adapter)).collect()
}

fn summary(index: usize, adapter: &wgpu::Adapter) -> AdapterSummary {
    let info = adapter.get_info();
    let limits = adapter.limits();
    let features = adapter.features();
    AdapterSummary {
        index,
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
        api: info.backend.to_str(),
        kind: match info.device_type {
            DeviceType::DiscreteGpu => "discrete",
            DeviceType::IntegratedGpu => "integrated",
            DeviceType::VirtualGpu => "virtual",
            DeviceType::Cpu => "cpu",
            DeviceType::Other => "other",
        },
        f16: features.contains(Features::SHADER_F16),
        subgroup: features.contains(Features::SUBGROUP).then_some((info.subgroup_min_size, info.subgroup_max_size)),
        max_buffer_bytes: limits.max_buffer_size,
        max_binding_bytes: limits.max_storage_buffer_binding_size,
        workgroup_bytes: limits.max_compute_workgroup_storage_size,
        unusable: unusable(adapter),
        name: info.name,
    }
}

/// Whether the adapter multiplies 16x16x16 matrices in half precision with sums in f32, in subgroups of 32.
fn has_matrix_units(adapter: &wgpu::Adapter) -> bool {
    use awqua_shaders::gemm_w4_coop;
    let info = adapter.get_info();
    let limits = adapter.limits();
    let needed = Features::EXPERIMENTAL_COOPERATIVE_MATRIX | Features::SHADER_F16;
    adapter.features().contains(needed)
        && (info.subgroup_min_size, info.subgroup_max_size) == (32, 32)
        && limits.max_compute_workgroup_storage_size >= gemm_w4_coop::MEMORY
        && adapter.cooperative_matrix_properties().iter().any(|p| {
            (p.m_size, p.n_size, p.k_size) == (16, 16, 16)
                && p.ab_type == wgpu::CooperativeScalarType::F16
                && p.cr_type == wgpu::CooperativeScalarType::F32
        })
}

/// Why the kernels can not run there, if so.
fn unusable(adapter: &wgpu::Adapter) -> Option<String> {
    let limits = adapter.limits();
    let capabilities = adapter.get_downlevel_capabilities();
    if !capabilities.flags.contains(wgpu::DownlevelFlags::COMPUTE_SHADERS) {
        return Some("it offers no compute shaders".to_owned());
    }
    let needs = [
        ("storage buffers", limits.max_storage_buffers_per_shader_stage, STORAGE_BUFFERS),
        ("bytes of workgroup memory", limits.max_compute_workgroup_storage_size, WORKGROUP_BYTES),
        ("invocations a workgroup", limits.max_compute_invocations_per_workgroup, INVOCATIONS),
    ];
    needs
        .iter()
        .find(|(_, has, needed)| has < needed)
        .map(|(what, has, needed)| format!("it offers {has} {what}, {needed} are needed"))
}

/// The instance of the process, made on first use; `None` where no graphics interface is compiled in. It is shared and
/// never dropped: a driver may give out only some dozens of them in the life of a process (NVIDIA 580 on Linux finds no
/// adapter after about forty), and unloading one at exit is where drivers crash.
fn instance() -> Option<&'static wgpu::Instance> {
    static INSTANCE: OnceLock<wgpu::Instance> = OnceLock::new();
    // Creating an instance without any compiled-in graphics interface panics.
    if wgpu::Instance::enabled_backend_features().is_empty() {
        return None;
    }
    Some(INSTANCE.get_or_init(|| {
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
        descriptor.backends = Backends::PRIMARY;
        // The debug layers cost time and print; our own errors come through scopes and the handler.
        descriptor.flags = wgpu::InstanceFlags::VALIDATION_INDIRECT_CALL;
        descriptor.memory_budget_thresholds.for_resource_creation = Some(BUDGET_PERCENT);
        wgpu::Instance::new(descriptor)
    }))
}

fn enumerate() -> Vec<wgpu::Adapter> {
    let Some(instance) = instance() else { return Vec::new() };
    let mut adapters = pollster::block_on(instance.enumerate_adapters(Backends::PRIMARY));
    adapters.sort_by_key(|adapter| {
        let info = adapter.get_info();
        let kind = match info.device_type {
            DeviceType::DiscreteGpu => 0,
            DeviceType::IntegratedGpu => 1,
            DeviceType::VirtualGpu => 2,
            DeviceType::Other => 3,
            DeviceType::Cpu => 4,
        };
        // The same GPU appears once per interface on Windows; Vulkan has the more complete shader features.
        (kind, info.backend == wgpu::Backend::Dx12)
    });
    adapters
}

/// An open device, its queue, and what went wrong on it so far.
pub(super) struct Gpu {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    pub(super) summary: AdapterSummary,
    pub(super) limits: Limits,
    pub(super) features: Features,
    /// Estimated multiplications and additions after which a submission ends.
    pub(super) submission_flops: u64,
    faults: Arc<Faults>,
    submitted: Mutex<u64>,
    finished: Arc<AtomicU64>,
}

/// A submission that can be waited for.
pub(super) struct Ticket {
    number: u64,
    index: wgpu::SubmissionIndex,
}

impl Ticket {
    /// How many submissions have to be finished for this one to be.
    pub(super) fn number(&self) -> u64 {
        self.number
    }
}

#[derive(Default)]
struct Faults {
    lost: OnceLock<String>,
    first: Mutex<Option<(ErrorKind, String)>>,
}

impl Gpu {
    /// Opens the adapter that `options` name, or the preferred usable one.
    ///
    /// # Errors
    /// [`ErrorKind::NoDevice`] if none fits, [`ErrorKind::Device`] if the driver refuses.
    pub(super) fn open(options: &WgpuOptions) -> Result<Self> {
        let adapters = enumerate();
        let summaries: Vec<_> = adapters.iter().enumerate().map(|(i, a)| summary(i, a)).collect();
        let index = select(&summaries, options.device.as_deref())?;
        let adapter = &adapters[index];

        let mut limits = adapter.limits();
        if let Some(bytes) = options.limit_binding {
            limits.max_storage_buffer_binding_size = limits.max_storage_buffer_binding_size.min(bytes.max(256));
        }
        let wanted = Features::SHADER_F16
            | Features::SUBGROUP
            | Features::TIMESTAMP_QUERY
            | Features::TIMESTAMP_QUERY_INSIDE_PASSES;
        let mut features = adapter.features() & wanted;
        if has_matrix_units(adapter) && !options.force_f32 && !options.force_no_subgroup {
            features |= Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
        }
        let request = adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("awqua"),
            required_features: features,
            required_limits: limits.clone(),
            experimental_features: match features.contains(Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
                // SAFETY: the one experimental feature asked for is used by one kernel, whose trials run before its
                // first use; wgpu documents it as incomplete, not as unsound where a driver reports it.
                true => unsafe { wgpu::ExperimentalFeatures::enabled() },
                false => wgpu::ExperimentalFeatures::disabled(),
            },
            memory_hints: wgpu::MemoryHints::Performance,
            trace: wgpu::Trace::Off,
        });
        let (device, queue) = pollster::block_on(request).map_err(|e| {
            Error::new(ErrorKind::Device, format!("`{}` can not be opened: {e}", summaries[index].name))
        })?;

        let faults = Arc::new(Faults::default());
        let on_error = faults.clone();
        device.on_uncaptured_error(Arc::new(move |error| on_error.report(&error)));
        let on_loss = faults.clone();
        device.set_device_lost_callback(move |reason, message| {
            let _ = on_loss.lost.set(format!("{reason:?}: {message}"));
        });
        let submission_flops = match summaries[index].kind {
            "discrete" => 200_000_000_000,
            "cpu" => 2_000_000_000,
            _ => 20_000_000_000,
        };
        let summary = summaries.into_iter().nth(index).expect("select returns an index of the list");
        Ok(Self {
            device,
            queue,
            summary,
            limits,
            features,
            submission_flops: options.submission_flops.unwrap_or(submission_flops),
            faults,
            submitted: Mutex::new(0),
            finished: Arc::new(AtomicU64::new(0)),
        })
    }

    /// Fails with what the device reported since the last check; a lost device fails every check.
    pub(super) fn check(&self) -> Result<()> {
        if let Some(reason) = self.faults.lost.get() {
            return Err(Error::new(ErrorKind::DeviceLost, format!("`{}` was lost: {reason}", self.summary.name)));
        }
        match lock(&self.faults.first).take() {
            Some((kind, message)) => Err(Error::new(kind, format!("`{}`: {message}", self.summary.name))),
            None => Ok(()),
        }
    }

    /// Runs `create` and fails if the device reported an error meanwhile; `what` and `bytes` go into the message.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] or a device error.
    pub(super) fn scoped<T>(&self, what: &str, bytes: u64, create: impl FnOnce() -> T) -> Result<T> {
        self.check()?;
        let internal = self.device.push_error_scope(wgpu::ErrorFilter::Internal);
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let made = create();
        let memory = pollster::block_on(memory.pop());
        let other = pollster::block_on(validation.pop()).or(pollster::block_on(internal.pop()));
        if memory.is_some() {
            return Err(self.out_of_memory(what, bytes));
        }
        if let Some(error) = other {
            return Err(Error::new(ErrorKind::Device, format!("`{}`: {what}: {error}", self.summary.name)));
        }
        self.check()?;
        Ok(made)
    }

    /// A buffer of `bytes` rounded up to whole words, at least one.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] naming `what` and the bytes, also for sizes above the device's limits.
    pub(super) fn buffer(&self, what: &str, bytes: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        let size = buffer_size(bytes);
        let bound = usage.contains(wgpu::BufferUsages::STORAGE);
        if size > self.limits.max_buffer_size || (bound && size > self.limits.max_storage_buffer_binding_size) {
            let limit = self.limits.max_buffer_size.min(self.limits.max_storage_buffer_binding_size);
            let message = format!("{what} needs {bytes} bytes, `{}` allows {limit} in one buffer", self.summary.name);
            return Err(Error::new(ErrorKind::OutOfMemory, message));
        }
        let descriptor = wgpu::BufferDescriptor { label: Some(what), size, usage, mapped_at_creation: false };
        self.scoped(what, bytes, || self.device.create_buffer(&descriptor))
    }

    /// Writes `data`, whole words, to `buffer` from byte `offset` on. Waits for the device between slices, so that
    /// what is on its way stays bounded, but not for the last one.
    ///
    /// # Errors
    /// As [`Gpu::wait`].
    pub(super) fn write(&self, buffer: &wgpu::Buffer, offset: u64, data: &[u8]) -> Result<()> {
        let mut at = offset;
        let mut before = None;
        for slice in data.chunks(SLICE) {
            if let Some(ticket) = before.take() {
                self.wait(&ticket)?;
            }
            self.queue.write_buffer(buffer, at, slice);
            at += slice.len() as u64;
            // Writes wait in staging memory for the next submission.
            before = Some(self.submit(None));
        }
        self.check()
    }

    /// Whether everything submitted is finished.
    ///
    /// # Errors
    /// What the device reported meanwhile.
    pub(super) fn is_idle(&self) -> Result<bool> {
        let submitted = *lock(&self.submitted);
        Ok(self.finished()? >= submitted)
    }

    /// Waits until at least one more submission is finished, if one is not.
    ///
    /// # Errors
    /// As [`Gpu::wait`].
    pub(super) fn wait_for_any(&self) -> Result<()> {
        let seen = self.finished()?;
        let submitted = *lock(&self.submitted);
        self.wait_until(None, || seen >= submitted || self.finished.load(Ordering::Acquire) > seen)
    }

    /// Fails early if `bytes` of `what` can never fit; devices without memory of their own hand out more than there is.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`].
    pub(super) fn has_room(&self, what: &str, bytes: u64) -> Result<()> {
        let shared = matches!(self.summary.kind, "cpu" | "integrated");
        if shared && crate::backend::cpu::available_memory().is_some_and(|available| bytes > available) {
            return Err(self.out_of_memory(what, bytes));
        }
        Ok(())
    }

    fn out_of_memory(&self, what: &str, bytes: u64) -> Error {
        let message = format!("`{}` has no room for {what}, {bytes} bytes", self.summary.name);
        Error::new(ErrorKind::OutOfMemory, message)
    }

    /// Submits the commands and returns the ticket to wait for.
    pub(super) fn submit(&self, commands: Option<wgpu::CommandBuffer>) -> Ticket {
        // Held over both calls: the n-th callback has to stand for the n-th submission, whichever thread made it.
        let mut submitted = lock(&self.submitted);
        let index = self.queue.submit(commands);
        let finished = self.finished.clone();
        self.queue.on_submitted_work_done(move || {
            finished.fetch_add(1, Ordering::Release);
        });
        *submitted += 1;
        Ticket { number: *submitted, index }
    }

    /// Waits until the submission of `ticket` and everything before it is finished.
    ///
    /// # Errors
    /// [`ErrorKind::DeviceLost`], or [`ErrorKind::Device`] if nothing finishes for half a minute.
    pub(super) fn wait(&self, ticket: &Ticket) -> Result<()> {
        self.wait_until(Some(&ticket.index), || self.finished.load(Ordering::Acquire) >= ticket.number)
    }

    /// Looks, without waiting, at what the device finished, and returns how many submissions that are.
    ///
    /// # Errors
    /// What the device reported meanwhile.
    pub(super) fn finished(&self) -> Result<u64> {
        // See `poll` for why a panic is caught.
        match catch_unwind(AssertUnwindSafe(|| self.device.poll(wgpu::PollType::Poll))) {
            Ok(_) => {}
            Err(_) => {
                let _ = self.faults.lost.set("the driver failed while it was looked at".to_owned());
            }
        }
        self.check()?;
        Ok(self.finished.load(Ordering::Acquire))
    }

    /// Waits until `done`, which a callback of submission `index` (the latest one if `None`) makes true.
    pub(super) fn wait_until(&self, index: Option<&wgpu::SubmissionIndex>, done: impl Fn() -> bool) -> Result<()> {
        let mut seen = self.finished.load(Ordering::Acquire);
        let mut since = Instant::now();
        loop {
            self.check()?;
            if done() {
                return Ok(());
            }
            self.poll(index)?;
            let finished = self.finished.load(Ordering::Acquire);
            if finished != seen {
                (seen, since) = (finished, Instant::now());
            } else if since.elapsed() > WATCHDOG {
                let message = format!("`{}` finished nothing for {} s", self.summary.name, WATCHDOG.as_secs());
                return Err(Error::new(ErrorKind::Device, message));
            }
        }
    }

    /// Destroys the device; everything from here on fails with [`ErrorKind::DeviceLost`].
    pub(super) fn destroy(&self) {
        self.device.destroy();
        // The loss is reported once the work in flight has ended; the check in between then ends the wait.
        let _ = self.wait_until(None, || false);
    }

    /// Waits for the work in flight and fails with what it reported.
    pub(super) fn settle(&self) -> Result<()> {
        self.poll(None)?;
        self.check()
    }

    fn poll(&self, index: Option<&wgpu::SubmissionIndex>) -> Result<()> {
        let wait = wgpu::PollType::Wait { submission_index: index.cloned(), timeout: Some(POLL) };
        // A driver that reports the loss of the device while it waits makes `poll` panic instead of returning it.
        match catch_unwind(AssertUnwindSafe(|| self.device.poll(wait))) {
            Ok(Ok(_) | Err(wgpu::PollError::Timeout)) => Ok(()),
            // A lost device refuses submissions, so there is none to wait for; the loss itself is reported without.
            Ok(Err(wgpu::PollError::WrongSubmissionIndex(..))) if index.is_some() => self.poll(None),
            Ok(Err(error)) => Err(Error::new(ErrorKind::Device, format!("`{}`: {error}", self.summary.name))),
            Err(_) => {
                let _ = self.faults.lost.set("the driver failed while waiting for it".to_owned());
                self.check()
            }
        }
    }
}

impl Faults {
    fn report(&self, error: &wgpu::Error) {
        let (kind, message) = match error {
            wgpu::Error::OutOfMemory { .. } => (ErrorKind::OutOfMemory, "out of device memory".to_owned()),
            other => (ErrorKind::Device, other.to_string()),
        };
        lock(&self.first).get_or_insert((kind, message));
    }
}

fn select(adapters: &[AdapterSummary], wanted: Option<&str>) -> Result<usize> {
    let none = |message: String| Err(Error::new(ErrorKind::NoDevice, message));
    if adapters.is_empty() {
        return none("no GPU adapter found; is a Vulkan, Metal or Direct3D 12 driver installed?".to_owned());
    }
    let found = match wanted {
        None => adapters.iter().find(|a| a.unusable.is_none()).or(adapters.first()),
        Some(text) => match text.parse::<usize>() {
            Ok(index) => adapters.get(index),
            Err(_) => {
                let text = text.to_lowercase();
                adapters.iter().find(|a| a.name.to_lowercase().contains(&text))
            }
        },
    };
    let Some(found) = found else {
        let names: Vec<_> = adapters.iter().map(|a| format!("{}: `{}`", a.index, a.name)).collect();
        return none(format!("no adapter matches `{}`; found [{}]", wanted.unwrap_or_default(), names.join(", ")));
    };
    match &found.unusable {
        Some(reason) => none(format!("`{}` can not be used: {reason}", found.name)),
        None => Ok(found.index),
    }
}

/// Bytes of a buffer for `bytes`: whole words of every kernel, at least one.
pub(super) fn buffer_size(bytes: u64) -> u64 {
    bytes.max(16).checked_next_multiple_of(16).unwrap_or(u64::MAX)
}

/// The value behind a mutex whose other users can not leave it half-changed.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
