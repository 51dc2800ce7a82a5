//! An open device, and everything it reports as typed errors.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use wgpu::{Features, Limits};

use super::adapters::{AdapterSummary, has_matrix_units, summary};
use super::{SharedGpu, WgpuOptions};
use crate::error::{Error, ErrorKind, Result};

/// A device that finishes no submission for this long has failed.
const WATCHDOG: Duration = Duration::from_secs(30);
/// How long one poll blocks. No shorter: a wait that times out while another thread submits makes wgpu 30 panic, as it then
/// finds the queue empty and an end that it looked up before.
const POLL: Duration = WATCHDOG;
/// Bytes handed to the driver before waiting for it; bounds the memory of its staging copies.
pub(super) const SLICE: usize = 16 << 20;

/// An open device, its queue, and what went wrong on it so far.
pub(super) struct Gpu {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    pub(super) summary: AdapterSummary,
    pub(super) limits: Limits,
    pub(super) features: Features,
    /// Estimated multiplications and additions after which a submission ends.
    pub(super) submission_flops: u64,
    /// Whether the device is the host's: its handlers stay, and it is never destroyed.
    shared: bool,
    faults: Arc<Faults>,
    submitted: Mutex<u64>,
    finished: Arc<AtomicU64>,
    /// How many submissions were finished when it was last looked at, and when that number was first seen.
    seen: Mutex<(u64, Instant)>,
}

/// A submission that can be waited for.
#[derive(Clone)]
pub(super) struct Ticket {
    number: u64,
    index: wgpu::SubmissionIndex,
}

impl Ticket {
    /// How many submissions have to be finished for this one to be.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// What the device knows it by.
    pub(super) fn index(&self) -> &wgpu::SubmissionIndex {
        &self.index
    }
}

#[derive(Default)]
struct Faults {
    lost: OnceLock<String>,
    first: Mutex<Option<(ErrorKind, String)>>,
}

impl Gpu {
    /// Opens the adapter.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if the driver refuses.
    pub(super) fn open(adapter: &wgpu::Adapter, summary: AdapterSummary, options: &WgpuOptions) -> Result<Self> {
        let mut limits = adapter.limits();
        if let Some(bytes) = options.limit_binding {
            limits.max_storage_buffer_binding_size = limits.max_storage_buffer_binding_size.min(bytes.max(256));
        }
        let features = wanted_features(adapter, options);
        let request = adapter.request_device(&descriptor(features, limits.clone()));
        let (device, queue) = pollster::block_on(request)
            .map_err(|e| Error::new(ErrorKind::Device, format!("`{}` can not be opened: {e}", summary.name)))?;
        Ok(Self::new(device, queue, summary, (features, limits), options, false).handling())
    }

    /// Hears of errors and of the loss of the device.
    fn handling(self) -> Self {
        let on_error = self.faults.clone();
        self.device.on_uncaptured_error(Arc::new(move |error| on_error.report(&error)));
        let on_loss = self.faults.clone();
        self.device.set_device_lost_callback(move |reason, message| {
            let _ = on_loss.lost.set(format!("{reason:?}: {message}"));
        });
        self
    }

    /// Uses the host's device, which nobody else knows through wgpu.
    ///
    /// # Errors
    /// As [`Self::share`].
    pub(super) fn adopt(adopted: &SharedGpu, options: &WgpuOptions) -> Result<Self> {
        Ok(Self { shared: false, ..Self::share(adopted, options)? }.handling())
    }

    /// Uses the host's device.
    ///
    /// # Errors
    /// [`ErrorKind::NoDevice`] if it was made with less than the kernels need.
    pub(super) fn share(shared: &SharedGpu, options: &WgpuOptions) -> Result<Self> {
        let summary = summary(0, &shared.adapter);
        let (features, mut limits) = (shared.device.features(), shared.device.limits());
        if let Some(reason) = super::adapters::lacks(&limits) {
            let message = format!("the shared device `{}` can not be used: {reason}", summary.name);
            return Err(Error::new(ErrorKind::NoDevice, message));
        }
        if let Some(bytes) = options.limit_binding {
            limits.max_storage_buffer_binding_size = limits.max_storage_buffer_binding_size.min(bytes.max(256));
        }
        let features = features & wanted_features(&shared.adapter, options);
        Ok(Self::new(shared.device.clone(), shared.queue.clone(), summary, (features, limits), options, true))
    }

    fn new(
        device: wgpu::Device,
        queue: wgpu::Queue,
        summary: AdapterSummary,
        (features, limits): (Features, Limits),
        options: &WgpuOptions,
        shared: bool,
    ) -> Self {
        let submission_flops = match summary.kind {
            "discrete" => 200_000_000_000,
            "cpu" => 2_000_000_000,
            _ => 20_000_000_000,
        };
        Self {
            device,
            queue,
            summary,
            limits,
            features,
            submission_flops: options.submission_flops.unwrap_or(submission_flops),
            shared,
            faults: Arc::default(),
            submitted: Mutex::new(0),
            finished: Arc::new(AtomicU64::new(0)),
            seen: Mutex::new((0, Instant::now())),
        }
    }

    /// Collects what goes wrong on a shared device until the result is dropped, so that the host's handler does not
    /// hear of our mistakes; nothing to do on a device of our own, whose handler is ours.
    pub(super) fn watch(&self) -> Option<Watch> {
        self.shared.then(|| Watch {
            faults: self.faults.clone(),
            scopes: [wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::Validation, wgpu::ErrorFilter::OutOfMemory]
                .map(|filter| Some(self.device.push_error_scope(filter))),
        })
    }

    /// Whether the device is gone.
    pub(super) fn is_lost(&self) -> bool {
        self.faults.lost.get().is_some()
    }

    /// Takes note that the device is gone, for whoever finds out first.
    pub(super) fn lose(&self, reason: &str) {
        let _ = self.faults.lost.set(reason.to_owned());
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
        self.finished()?;
        Ok(self.looked_idle())
    }

    /// Whether everything submitted was finished when somebody last looked.
    pub(super) fn looked_idle(&self) -> bool {
        let submitted = *lock(&self.submitted);
        self.finished.load(Ordering::Acquire) >= submitted
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
    pub(super) fn submit(&self, commands: impl IntoIterator<Item = wgpu::CommandBuffer>) -> Ticket {
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
        let finished = self.finished.load(Ordering::Acquire);
        let submitted = *lock(&self.submitted);
        let mut seen = lock(&self.seen);
        if finished != seen.0 || finished == submitted {
            *seen = (finished, Instant::now());
        } else if seen.1.elapsed() > WATCHDOG {
            return Err(self.stuck());
        }
        Ok(finished)
    }

    fn stuck(&self) -> Error {
        let message = format!("`{}` finished nothing for {} s", self.summary.name, WATCHDOG.as_secs());
        Error::new(ErrorKind::Device, message)
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
                return Err(self.stuck());
            }
        }
    }

    /// Destroys the device; everything from here on fails with [`ErrorKind::DeviceLost`]. A shared device stays, but
    /// counts as lost here.
    pub(super) fn destroy(&self) {
        if self.shared {
            return self.lose("on request");
        }
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

/// How a device with these features and limits is opened.
pub(super) fn descriptor(features: Features, limits: Limits) -> wgpu::DeviceDescriptor<'static> {
    wgpu::DeviceDescriptor {
        label: Some("awqua"),
        required_features: features,
        required_limits: limits,
        experimental_features: match features.contains(Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
            // SAFETY: the one experimental feature asked for is used by two kernels, whose trials run before their
            // first use; wgpu documents it as incomplete, not as unsound where a driver reports it.
            true => unsafe { wgpu::ExperimentalFeatures::enabled() },
            false => wgpu::ExperimentalFeatures::disabled(),
        },
        memory_hints: wgpu::MemoryHints::Performance,
        trace: wgpu::Trace::Off,
    }
}

/// What the kernels on matrix units need, besides half precision.
pub(super) const MATRIX_FEATURES: Features =
    Features::EXPERIMENTAL_COOPERATIVE_MATRIX.union(Features::SUBGROUP).union(Features::SUBGROUP_BARRIER);

/// The features that the kernels make use of, of those that the adapter has.
pub(super) fn wanted_features(adapter: &wgpu::Adapter, options: &WgpuOptions) -> Features {
    let wanted = Features::SHADER_F16
        | Features::SUBGROUP
        | Features::TIMESTAMP_QUERY
        | Features::TIMESTAMP_QUERY_INSIDE_PASSES
        | Features::PIPELINE_CACHE;
    let mut features = adapter.features() & wanted;
    let units = has_matrix_units(adapter) && adapter.features().contains(MATRIX_FEATURES);
    if units && !options.force_f32 && !options.force_no_subgroup {
        features |= MATRIX_FEATURES;
    }
    features
}

/// Errors collected on a shared device.
pub(super) struct Watch {
    faults: Arc<Faults>,
    /// In the order in which they were pushed.
    scopes: [Option<wgpu::ErrorScopeGuard>; 3],
}

impl Drop for Watch {
    fn drop(&mut self) {
        for scope in self.scopes.iter_mut().rev() {
            if let Some(error) = scope.take().and_then(|scope| pollster::block_on(scope.pop())) {
                self.faults.report(&error);
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

/// Bytes of a buffer for `bytes`: whole words of every kernel, at least one.
pub(super) fn buffer_size(bytes: u64) -> u64 {
    bytes.max(16).checked_next_multiple_of(16).unwrap_or(u64::MAX)
}

/// The value behind a mutex whose other users can not leave it half-changed.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
