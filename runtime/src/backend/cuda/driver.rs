//! The driver behind safe types: device, memory, streams, events, kernels and graphs, with typed errors.
//!
//! The driver is loaded when it is first asked for; nothing here runs without it. Handles belong to the device's primary
//! context, which every call makes current and puts back, so that a host's own use of CUDA is not disturbed. Public for
//! the tests and benchmarks of the kernels alone.

use std::ffi::{c_int, c_uint};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys;
use cudarc::driver::sys::{CUdevice_attribute, CUresult};

use crate::error::{Error, ErrorKind, Result};

mod library;
mod stream;

pub use library::{CudaChoice, DeviceSummary, devices};
use library::{Driver, OVERLAPPING_GRAPHS, attribute, check};
pub use stream::{Event, Graph, Launch, OtherRows, Rows, Stream};

/// What the kernels have to know of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Compute capability.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of shared memory of a block.
    pub shared: u32,
    /// Whether a kernel may begin before the one in front has ended, in graphs too.
    pub overlap: bool,
}

/// An open device.
pub struct Gpu {
    device: sys::CUdevice,
    context: sys::CUcontext,
    module: sys::CUmodule,
    /// What it is.
    pub summary: DeviceSummary,
    /// What it has.
    pub limits: Limits,
    /// Priority of our streams: behind everything else.
    priority: c_int,
    lost: AtomicBool,
    /// Bytes of device memory in use.
    allocated: AtomicU64,
    functions: Mutex<std::collections::HashMap<&'static str, Function>>,
}

// SAFETY: handles of the driver may be used from any thread; everything else is synchronised.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

/// Makes a context current while it lives.
struct Current;

impl Drop for Current {
    fn drop(&mut self) {
        let mut context = std::ptr::null_mut();
        // SAFETY: takes back what `Gpu::enter` pushed on this thread. Nothing can be done about a failure.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut context) };
    }
}

/// A compiled kernel; lives as long as its [`Gpu`].
#[derive(Clone, Copy)]
pub struct Function(sys::CUfunction);

// SAFETY: as for `Gpu`.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Gpu {
    /// Opens a device and loads the kernels; its streams have the highest priority, or else the lowest.
    ///
    /// # Errors
    /// [`ErrorKind::NoDevice`] if none fits, or a device error.
    pub fn open(choice: &CudaChoice, high_priority: bool) -> Result<Arc<Self>> {
        let driver = Driver::load()?;
        let devices = driver.devices()?;
        let none = |reason: String| Error::new(ErrorKind::NoDevice, reason);
        let summary = choice.select(&devices).ok_or_else(|| none(format!("no CUDA device is {choice}")))?;
        if let Some(reason) = &summary.unusable {
            return Err(none(format!("{}: {reason}", summary.name)));
        }
        let mut device = 0;
        let mut context = std::ptr::null_mut();
        // SAFETY: pointers are to local variables.
        unsafe {
            check(sys::cuDeviceGet(&mut device, summary.index as c_int), "opening a device")?;
            check(sys::cuDevicePrimaryCtxRetain(&mut context, device), "making a context")?;
        }
        use CUdevice_attribute::*;
        let shared = attribute(device, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
        let mut gpu = Self {
            device,
            context,
            module: std::ptr::null_mut(),
            limits: Limits {
                capability: summary.capability,
                multiprocessors: summary.multiprocessors,
                shared: 0,
                overlap: summary.capability.0 >= 9 && summary.driver >= OVERLAPPING_GRAPHS,
            },
            summary: summary.clone(),
            priority: 0,
            lost: AtomicBool::new(false),
            allocated: AtomicU64::new(0),
            functions: Mutex::default(),
        };
        gpu.limits.shared = shared?;
        gpu.load(high_priority)?;
        Ok(Arc::new(gpu))
    }

    /// Loads the kernels, and finds out the priority of streams.
    fn load(&mut self, high_priority: bool) -> Result<()> {
        let (major, minor) = self.limits.capability;
        let image = awqua_shaders::cuda::Image::of(major, minor)
            .ok_or_else(|| Error::new(ErrorKind::NoDevice, "there are no kernels for this device"))?;
        let bytes = image.bytes();
        let current = self.enter()?;
        let (mut least, mut greatest) = (0, 0);
        let mut module = std::ptr::null_mut();
        // SAFETY: pointers are to local variables; the image is a whole one, assembly ends with a zero.
        unsafe {
            check(sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest), "reading priorities")?;
            check(sys::cuModuleLoadData(&mut module, bytes.as_ptr().cast()), "loading the kernels")?;
        }
        drop(current);
        (self.priority, self.module) = (if high_priority { greatest } else { least }, module);
        Ok(())
    }

    fn enter(&self) -> Result<Current> {
        self.check_lost()?;
        // SAFETY: the context is retained as long as `self` lives.
        check(unsafe { sys::cuCtxPushCurrent_v2(self.context) }, "using the device")?;
        Ok(Current)
    }

    /// Fails once the device is lost.
    ///
    /// # Errors
    /// [`ErrorKind::DeviceLost`].
    pub fn check_lost(&self) -> Result<()> {
        match self.is_lost() {
            true => Err(Error::new(ErrorKind::DeviceLost, "the device was lost")),
            false => Ok(()),
        }
    }

    /// Whether the device is lost.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Makes every further call fail.
    pub fn lose(&self) {
        self.lost.store(true, Ordering::Release);
    }

    /// Passes on `result`, and remembers the loss of the device.
    fn noting(&self, result: Result<()>) -> Result<()> {
        if result.as_ref().is_err_and(|error| error.kind() == ErrorKind::DeviceLost) {
            self.lose();
        }
        result
    }

    /// The kernel of this name.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if the image has none, or a device error.
    pub fn function(&self, name: &'static str) -> Result<Function> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(name) {
            return Ok(*function);
        }
        let _current = self.enter()?;
        let symbol = std::ffi::CString::new(name).map_err(|_| Error::new(ErrorKind::Device, "a zero in a name"))?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded, the name ends with a zero.
        unsafe {
            let doing = format!("finding kernel `{name}`");
            check(sys::cuModuleGetFunction(&mut function, self.module, symbol.as_ptr()), &doing)?;
            // All that a block can have: what a launch uses is up to the launch.
            let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            check(sys::cuFuncSetAttribute(function, most, self.limits.shared as c_int), &doing)?;
            // The same split of shared memory and cache for all: a multiprocessor has to be empty to change it, and a
            // kernel could not begin beside the one in front.
            let share = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            check(sys::cuFuncSetAttribute(function, share, 100), &doing)?;
        }
        functions.insert(name, Function(function));
        Ok(Function(function))
    }

    /// Free bytes of device memory.
    ///
    /// # Errors
    /// A device error.
    pub fn free_memory(&self) -> Result<u64> {
        let _current = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: pointers are to local variables.
        check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, "reading free memory")?;
        Ok(free as u64)
    }

    /// `bytes` of device memory, not initialised.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] naming `what` and the bytes, or a device error.
    pub fn buffer(self: &Arc<Self>, what: &str, bytes: u64) -> Result<Buffer> {
        let _current = self.enter()?;
        let bytes = bytes.max(16);
        let mut address = 0;
        let doing = format!("{what} needs {bytes} bytes; allocating them");
        let size = usize::try_from(bytes).map_err(|_| Error::new(ErrorKind::OutOfMemory, doing.clone()))?;
        // SAFETY: the pointer is to a local variable.
        self.noting(check(unsafe { sys::cuMemAlloc_v2(&mut address, size) }, &doing))?;
        self.allocated.fetch_add(bytes, Ordering::Relaxed);
        Ok(Buffer { gpu: self.clone(), address, bytes })
    }

    /// `bytes` of host memory that the device reads and writes directly, zeros.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] or a device error.
    pub fn pinned(self: &Arc<Self>, bytes: usize) -> Result<Pinned> {
        let _current = self.enter()?;
        let mut host = std::ptr::null_mut();
        let mut address = 0;
        // SAFETY: pointers are to local variables; the memory is ours from the first call on.
        unsafe {
            let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
            check(sys::cuMemHostAlloc(&mut host, bytes, flags), &format!("{bytes} bytes of host memory"))?;
            let mut pinned = Pinned { gpu: self.clone(), host: host.cast(), address: 0, bytes };
            check(sys::cuMemHostGetDevicePointer_v2(&mut address, host, 0), "mapping host memory")?;
            std::ptr::write_bytes(pinned.host, 0, bytes);
            pinned.address = address;
            Ok(pinned)
        }
    }

    /// A stream whose work yields to other work on the device.
    ///
    /// # Errors
    /// A device error.
    pub fn stream(self: &Arc<Self>) -> Result<Stream> {
        let _current = self.enter()?;
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: the pointer is to a local variable.
        check(unsafe { sys::cuStreamCreateWithPriority(&mut stream, flags, self.priority) }, "making a stream")?;
        Ok(Stream { gpu: self.clone(), stream, queued: AtomicBool::new(false) })
    }

    /// An event that remembers its time.
    ///
    /// # Errors
    /// A device error.
    pub fn event(self: &Arc<Self>) -> Result<Event> {
        let _current = self.enter()?;
        let mut event = std::ptr::null_mut();
        // SAFETY: the pointer is to a local variable.
        check(unsafe { sys::cuEventCreate(&mut event, 0) }, "making an event")?;
        Ok(Event { gpu: self.clone(), event })
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: all that was made of them is gone; nothing can be done about failures.
        unsafe {
            if !self.module.is_null() && sys::cuCtxPushCurrent_v2(self.context) == CUresult::CUDA_SUCCESS {
                let _current = Current;
                let _ = sys::cuModuleUnload(self.module);
            }
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

/// Device memory.
pub struct Buffer {
    gpu: Arc<Gpu>,
    address: u64,
    bytes: u64,
}

impl Buffer {
    /// Address for kernels.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated by this context and not used any more: freeing waits for what the device has queued.
        unsafe {
            if sys::cuCtxPushCurrent_v2(self.gpu.context) == CUresult::CUDA_SUCCESS {
                let _current = Current;
                let _ = sys::cuMemFree_v2(self.address);
            }
        }
        self.gpu.allocated.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Host memory that the device sees.
pub struct Pinned {
    gpu: Arc<Gpu>,
    host: *mut u8,
    address: u64,
    bytes: usize,
}

// SAFETY: the memory belongs to the value.
unsafe impl Send for Pinned {}
// SAFETY: shared access only reads, through volatile words where the device may write.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Address for the device.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The bytes, for the host.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: allocated with this length, and borrowed exclusively. What the device writes meanwhile is only looked
        // at through `word`.
        unsafe { std::slice::from_raw_parts_mut(self.host, self.bytes) }
    }

    /// The bytes, for the host, after the device has written them.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: allocated with this length; callers wait for the device first.
        unsafe { std::slice::from_raw_parts(self.host, self.bytes) }
    }

    /// Word `index` of 64 bits as it is now; the device may be writing it.
    pub fn word(&self, index: usize) -> u64 {
        assert!((index + 1) * 8 <= self.bytes, "the word lies in the memory");
        // SAFETY: in bounds and aligned, as the driver aligns to pages.
        unsafe { std::ptr::read_volatile(self.host.cast::<u64>().add(index)) }
    }

    /// Writes words of 32 bits from word `index` on, so that a kernel launched later reads them.
    pub fn write_words(&self, index: usize, words: &[u32]) {
        assert!((index + words.len()) * 4 <= self.bytes, "the words lie in the memory");
        for (i, word) in words.iter().enumerate() {
            // SAFETY: in bounds and aligned; kernels read these words only between a launch and its end.
            unsafe { std::ptr::write_volatile(self.host.cast::<u32>().add(index + i), *word) };
        }
        std::sync::atomic::fence(Ordering::SeqCst);
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated by the driver and not used any more.
        unsafe {
            if sys::cuCtxPushCurrent_v2(self.gpu.context) == CUresult::CUDA_SUCCESS {
                let _current = Current;
                let _ = sys::cuMemFreeHost(self.host.cast());
            }
        }
    }
}
