//! The engine: where models run, and what the process has to run them on.

use std::ffi::{c_char, c_void};
use std::mem::offset_of;
use std::sync::Arc;

use runtime::engine::Trim;
use runtime::{BackendChoice, DeviceChoice, EngineOptions};

use crate::boundary::guard;
use crate::handle::{self, Handle, Object};
use crate::jobs::{awqua_parallel_for_fn, jobs};
use crate::layout::{self, Out, Sized32, layout};
use crate::model::check_flags;
use crate::status::awqua_status::{self, *};
use crate::status::{Failure, Outcome};
use crate::text::{self, awqua_str};
use crate::vulkan::{self, awqua_vulkan};

/// Where a model runs.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(dead_code, reason = "values the caller uses")]
pub enum awqua_backend {
    /// A GPU if there is a usable one, else the CPU. A software GPU is not chosen on its own.
    AWQUA_BACKEND_AUTO = 0,
    /// The CPU.
    AWQUA_BACKEND_CPU = 1,
    /// A GPU through Vulkan, Metal or Direct3D 12, software ones included; no fall-back.
    AWQUA_BACKEND_GPU = 2,
    /// An NVIDIA GPU through CUDA, with AWQUA_ERR_NO_DEVICE where there is none or the library was built without it.
    /// AWQUA_BACKEND_AUTO prefers it where it is there and can compute the model.
    AWQUA_BACKEND_CUDA = 3,
}

/// On a GPU, never use half-precision arithmetic or subgroup operations, whatever the adapter offers; on the CPU, never
/// use wide instructions, so that every processor of one family computes the same bits.
pub const AWQUA_ENGINE_PORTABLE_KERNELS: u32 = 1;
/// Recover from the loss of a device in the next tick, without awqua_engine_recover.
pub const AWQUA_ENGINE_AUTO_RECOVER: u32 = 2;

/// On CUDA, queue work with the device's highest priority. Without it the lowest is taken, so that the host's own CUDA
/// work goes first; the work of graphics interfaces is not ordered by it. Ignored elsewhere.
pub const AWQUA_ENGINE_HIGH_PRIORITY: u32 = 4;

/// What an engine is made from; all zero behind `struct_size` is the default.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct awqua_engine_desc {
    /// sizeof(awqua_engine_desc).
    pub struct_size: u32,
    /// AWQUA_ENGINE_* flags.
    pub flags: u32,
    /// An awqua_backend.
    pub backend: u32,
    /// CPU threads a session computes with, the caller's included: 0 and 1 make no thread, n makes n - 1 that belong
    /// to the session, sleep between its ticks and end with it. With `parallel_for` it is how many threads of the host
    /// take part, and none is made. Ignored on a GPU.
    pub threads: u32,
    /// Part of the adapter's name in any letter case, or its index in awqua_device_get; empty takes the best one.
    pub device: awqua_str,
    /// Most bytes of host memory for weights, caches and activations of all models and sessions; 0 is no cap. What does
    /// not fit is refused with AWQUA_ERR_OUT_OF_MEMORY and the needed number.
    pub host_budget_bytes: u64,
    /// The same of device memory.
    pub device_budget_bytes: u64,
    /// What awqua_engine_get_pipeline_cache gave at an earlier start, or NULL; shortens the first load. Copied. Trusted
    /// to come from there: damage is noticed, forgery is not.
    pub pipeline_cache: *const c_void,
    /// Bytes at `pipeline_cache`.
    pub pipeline_cache_len: u64,
    /// Takes the adapter with this UUID (VkPhysicalDeviceIDProperties), unless it is all zero.
    pub device_uuid: [u8; 16],
    /// Takes the adapter with this LUID (of DXGI or Vulkan), unless it is all zero.
    pub device_luid: [u8; 8],
    /// The host's own threads for the CPU, or NULL.
    pub parallel_for: awqua_parallel_for_fn,
    /// Handed to `parallel_for`.
    pub parallel_for_user: *mut c_void,
    /// The host's own Vulkan device, or NULL; no other device is chosen then. Read during the call only.
    pub vulkan: *const awqua_vulkan,
}

// SAFETY: repr(C), u32 first, no padding on 64-bit targets and none that is read elsewhere; integers, pointers, a text
// and a nullable function.
unsafe impl Sized32 for awqua_engine_desc {
    const NAME: &'static str = "awqua_engine_desc";
    const FIRST: usize = offset_of!(Self, host_budget_bytes);
    const INIT: Self = Self {
        struct_size: size_of::<Self>() as u32,
        flags: 0,
        backend: 0,
        threads: 0,
        device: awqua_str::EMPTY,
        host_budget_bytes: 0,
        device_budget_bytes: 0,
        pipeline_cache: std::ptr::null(),
        pipeline_cache_len: 0,
        device_uuid: [0; 16],
        device_luid: [0; 8],
        parallel_for: None,
        parallel_for_user: std::ptr::null_mut(),
        vulkan: std::ptr::null(),
    };
}

/// A place where models run: a device, budgets, and what they hold. Models keep what they need of it, so it may be freed
/// first.
pub struct awqua_engine {
    _opaque: [u8; 0],
}

pub struct Engine {
    pub inner: Arc<runtime::Engine>,
}

impl Object for Engine {
    const KIND: &'static str = "awqua_engine";
    const MAGIC: u32 = 0x4151_4e45;
    type Anytime = ();
}

impl awqua_engine {
    pub fn handle(engine: *const Self) -> *const Handle<Engine> {
        engine.cast()
    }
}

fn options(desc: &awqua_engine_desc) -> Outcome<EngineOptions> {
    let backend = match desc.backend {
        0 => BackendChoice::Auto,
        1 => BackendChoice::Cpu,
        2 => BackendChoice::Wgpu,
        3 => BackendChoice::Cuda,
        other => return Err(Failure::invalid(format!("`backend` is {other}, expected an awqua_backend"))),
    };
    let flags = AWQUA_ENGINE_PORTABLE_KERNELS | AWQUA_ENGINE_AUTO_RECOVER | AWQUA_ENGINE_HIGH_PRIORITY;
    check_flags(desc.flags, flags)?;
    if desc.threads > 1024 {
        return Err(Failure::invalid(format!("`threads` is {}, expected at most 1024", desc.threads)));
    }
    // SAFETY: the caller of the exported function promises readable text and memory.
    let (name, cache) = unsafe {
        let cache = text::slice(desc.pipeline_cache.cast::<u8>(), desc.pipeline_cache_len, "pipeline_cache")?;
        (desc.device.get_optional("device")?, cache)
    };
    let budget = |bytes: u64| Some(bytes).filter(|&bytes| bytes > 0);
    let threads = desc.threads.max(1) as usize;
    Ok(EngineOptions {
        backend,
        device: device(name, desc)?,
        portable_kernels: desc.flags & AWQUA_ENGINE_PORTABLE_KERNELS != 0,
        host_budget: budget(desc.host_budget_bytes),
        device_budget: budget(desc.device_budget_bytes),
        pipeline_cache: Some(cache).filter(|cache| !cache.is_empty()).map(|cache| Arc::new(cache.to_vec())),
        tuning: None,
        auto_recover: desc.flags & AWQUA_ENGINE_AUTO_RECOVER != 0,
        threads: Some(threads),
        jobs: jobs(desc.parallel_for, desc.parallel_for_user, threads),
        high_priority: desc.flags & AWQUA_ENGINE_HIGH_PRIORITY != 0,
    })
}

/// The adapter that is meant, which may be named in one way only.
fn device(name: Option<&str>, desc: &awqua_engine_desc) -> Outcome<DeviceChoice> {
    let (uuid, luid) = (desc.device_uuid != [0; 16], desc.device_luid != [0; 8]);
    match (name, uuid, luid, desc.vulkan.is_null()) {
        (None, false, false, true) => Ok(DeviceChoice::Best),
        (Some(name), false, false, true) => Ok(DeviceChoice::Named(name.to_owned())),
        (None, true, false, true) => Ok(DeviceChoice::Uuid(desc.device_uuid)),
        (None, false, true, true) => Ok(DeviceChoice::Luid(desc.device_luid)),
        (None, false, false, false) if desc.backend == awqua_backend::AWQUA_BACKEND_CPU as u32 => {
            Err(Failure::invalid("`vulkan` is of no use to AWQUA_BACKEND_CPU"))
        }
        // SAFETY: the caller of the exported function promises it.
        (None, false, false, false) => unsafe { vulkan::choice(desc.vulkan) },
        _ => Err(Failure::invalid("`device`, `device_uuid`, `device_luid` and `vulkan` exclude each other")),
    }
}

/// Fills a description with its defaults, as far as its `struct_size` goes, which has to be set before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_engine_desc_init(desc: *mut awqua_engine_desc) -> awqua_status {
    // SAFETY: the caller's promise.
    guard("awqua_engine_desc_init", || unsafe { layout::init(desc) })
}

/// Makes an engine. No device is opened before the first model is loaded. `desc` may be NULL for the defaults.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_engine_create(
    desc: *const awqua_engine_desc,
    engine: *mut *mut awqua_engine,
) -> awqua_status {
    guard("awqua_engine_create", || {
        // SAFETY: the caller's promise.
        let (desc, out) = unsafe { (layout::read_or_init(desc)?, text::out(engine, "engine")?) };
        *out = Handle::into_c(Engine { inner: runtime::Engine::new(options(&desc)?) }, ());
        Ok(AWQUA_OK)
    })
}

/// Frees an engine; NULL is fine. Its models live on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_engine_free(engine: *mut awqua_engine) -> awqua_status {
    // SAFETY: the caller's promise.
    unsafe { handle::free("awqua_engine_free", engine.cast::<Handle<Engine>>()) }
}

/// Copies the text of the last failed call on `engine`, as awqua_last_error does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_engine_last_error(
    engine: *const awqua_engine,
    buffer: *mut c_char,
    capacity: u64,
    length: *mut u64,
) -> awqua_status {
    let handle = awqua_engine::handle(engine);
    // SAFETY: the caller's promise.
    unsafe { handle::last_error("awqua_engine_last_error", handle, buffer, capacity, length) }
}

/// The device was lost and not recovered yet.
pub const AWQUA_ENGINE_LOST: u32 = 1;

/// What an engine holds.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct awqua_engine_info {
    /// sizeof(awqua_engine_info).
    pub struct_size: u32,
    /// AWQUA_ENGINE_LOST, or 0.
    pub flags: u32,
    /// Bytes of host memory that its models and sessions hold for weights, caches and activations.
    pub host_bytes: u64,
    /// The same of device memory.
    pub device_bytes: u64,
}

// SAFETY: repr(C), u32 first, no padding; integers.
unsafe impl Sized32 for awqua_engine_info {
    const NAME: &'static str = "awqua_engine_info";
    const FIRST: usize = 24;
    const INIT: Self = Self { struct_size: size_of::<Self>() as u32, flags: 0, host_bytes: 0, device_bytes: 0 };
}

/// What the engine holds, over all its models and sessions.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_engine_get_info(
    engine: *const awqua_engine,
    info: *mut awqua_engine_info,
) -> awqua_status {
    // SAFETY: the caller's promise, for both.
    unsafe {
        handle::shared("awqua_engine_get_info", awqua_engine::handle(engine), |engine, ()| {
            let out = Out::new(info)?;
            let used = engine.inner.used();
            out.write(&awqua_engine_info {
                flags: if engine.inner.is_lost() { AWQUA_ENGINE_LOST } else { 0 },
                host_bytes: used.host,
                device_bytes: used.device,
                ..awqua_engine_info::INIT
            });
            Ok(AWQUA_OK)
        })
    }
}

/// Lets go of a lost device, after AWQUA_EVENT_DEVICE_LOST: models find another one the next time they or their sessions
/// are ticked, upload their weights again from their files, and sessions compute their tokens again and go on with their
/// answers. Does nothing if no device is lost. After three losses within five minutes AWQUA_BACKEND_AUTO goes on with the
/// CPU, and AWQUA_BACKEND_GPU fails with AWQUA_ERR_DEVICE_LOST.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_engine_recover(engine: *const awqua_engine) -> awqua_status {
    // SAFETY: the caller's promise.
    unsafe {
        handle::shared("awqua_engine_recover", awqua_engine::handle(engine), |engine, ()| {
            let was_lost = engine.inner.is_lost();
            engine.inner.recover()?;
            if was_lost {
                log::info!("the engine let go of its lost device");
            }
            Ok(AWQUA_OK)
        })
    }
}

/// Goes on with another Vulkan device of the host, whether the one in use is lost or not, as a renderer is made anew:
/// models and sessions go over to it in their next ticks as after awqua_engine_recover, and `released` of the former one
/// is called once the last of them has. AWQUA_BACKEND_CPU refuses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_engine_recover_vulkan(
    engine: *const awqua_engine,
    vulkan: *const awqua_vulkan,
) -> awqua_status {
    // SAFETY: the caller's promise, for both.
    unsafe {
        handle::shared("awqua_engine_recover_vulkan", awqua_engine::handle(engine), |engine, ()| {
            if engine.inner.options().backend == BackendChoice::Cpu {
                return Err(Failure::state("the engine works on the CPU"));
            }
            engine.inner.recover_with(vulkan::choice(vulkan)?);
            Ok(AWQUA_OK)
        })
    }
}

/// Loses the device on purpose, to test what a program does then. The CPU can not be lost.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_engine_debug_lose_device(engine: *const awqua_engine) -> awqua_status {
    // SAFETY: the caller's promise.
    unsafe {
        handle::shared("awqua_engine_debug_lose_device", awqua_engine::handle(engine), |engine, ()| {
            engine.inner.force_loss();
            Ok(AWQUA_OK)
        })
    }
}

/// How much memory to give back; each level includes those before it.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(dead_code, reason = "values the caller uses")]
pub enum awqua_trim {
    /// Mapped pages of files: read again when needed.
    AWQUA_TRIM_PAGES = 0,
    /// Caches of idle sessions: computed again when needed.
    AWQUA_TRIM_SESSIONS = 1,
    /// Weights of models whose sessions are idle: awqua_model_restore brings them back.
    AWQUA_TRIM_WEIGHTS = 2,
}

/// Asks all sessions of the engine to give memory back, as far as an awqua_trim says. Each does so in its next tick, also
/// an idle one, and makes an AWQUA_EVENT_MEMORY_PRESSURE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_engine_trim(engine: *const awqua_engine, level: u32) -> awqua_status {
    // SAFETY: the caller's promise.
    unsafe {
        handle::shared("awqua_engine_trim", awqua_engine::handle(engine), |engine, ()| {
            engine.inner.request_trim(match level {
                0 => Trim::Pages,
                1 => Trim::Sessions,
                2 => Trim::Weights,
                other => return Err(Failure::invalid(format!("`level` is {other}, expected an awqua_trim"))),
            });
            Ok(AWQUA_OK)
        })
    }
}

/// Compiled GPU kernels, for `pipeline_cache` of a later start on the same device and driver. `length` gets its bytes,
/// also when `capacity` is too small; 0 where there is nothing to keep: no device is open, or it does not give them out.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_engine_get_pipeline_cache(
    engine: *const awqua_engine,
    buffer: *mut c_void,
    capacity: u64,
    length: *mut u64,
) -> awqua_status {
    // SAFETY: the caller's promise, for all of them.
    unsafe {
        handle::shared("awqua_engine_get_pipeline_cache", awqua_engine::handle(engine), |engine, ()| {
            let cache = engine.inner.pipeline_cache().unwrap_or_default();
            text::put(&cache, buffer.cast::<u8>(), capacity, length).map(|()| AWQUA_OK)
        })
    }
}

/// The adapter can be used.
#[allow(dead_code, reason = "values the caller uses")]
pub const AWQUA_DEVICE_USABLE: u32 = 1;
/// Its shaders compute in half precision.
#[allow(dead_code, reason = "values the caller uses")]
pub const AWQUA_DEVICE_F16: u32 = 2;
/// Its shaders have subgroup operations.
#[allow(dead_code, reason = "values the caller uses")]
pub const AWQUA_DEVICE_SUBGROUPS: u32 = 4;

/// What kind of device an adapter is.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(dead_code, reason = "values the caller uses")]
pub enum awqua_device_kind {
    /// Unknown.
    AWQUA_DEVICE_OTHER = 0,
    /// A graphics card.
    AWQUA_DEVICE_DISCRETE = 1,
    /// Shares the memory of the processor.
    AWQUA_DEVICE_INTEGRATED = 2,
    /// A share of a card in a virtual machine.
    AWQUA_DEVICE_VIRTUAL = 3,
    /// Software on the processor.
    AWQUA_DEVICE_CPU = 4,
}

/// An adapter of the machine.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct awqua_device_info {
    /// sizeof(awqua_device_info).
    pub struct_size: u32,
    /// AWQUA_DEVICE_* flags.
    pub flags: u32,
    /// An awqua_device_kind.
    pub kind: u32,
    /// 0.
    pub reserved: u32,
    /// Largest buffer, in bytes.
    pub max_buffer_bytes: u64,
    /// Largest part of a buffer that a kernel sees, in bytes; larger weights are split.
    pub max_binding_bytes: u64,
    /// Name the driver gives it, NUL-terminated, cut if it is longer.
    pub name: [c_char; 128],
    /// Graphics interface in use: "vulkan", "metal" or "dx12".
    pub api: [c_char; 16],
    /// Driver and its version.
    pub driver: [c_char; 112],
    /// By which other interfaces name the same device, all zero if unknown.
    pub uuid: [u8; 16],
    /// The same on Windows until it restarts, all zero if unknown.
    pub luid: [u8; 8],
}

// SAFETY: repr(C), u32 first, no padding; integers.
unsafe impl Sized32 for awqua_device_info {
    const NAME: &'static str = "awqua_device_info";
    const FIRST: usize = 288;
    const INIT: Self = Self {
        struct_size: size_of::<Self>() as u32,
        flags: 0,
        kind: 0,
        reserved: 0,
        max_buffer_bytes: 0,
        max_binding_bytes: 0,
        name: [0; 128],
        api: [0; 16],
        driver: [0; 112],
        uuid: [0; 16],
        luid: [0; 8],
    };
}

/// `value` as an array that ends with a NUL, cut at a character.
pub fn fixed<const N: usize>(value: &str) -> [c_char; N] {
    let mut array = [0; N];
    let cut = text::whole_chars(value, N - 1);
    for (to, &from) in array.iter_mut().zip(&value.as_bytes()[..cut]) {
        *to = from as c_char;
    }
    array
}

#[cfg(feature = "wgpu")]
fn devices() -> Vec<awqua_device_info> {
    let info = |adapter: runtime::backend::wgpu::AdapterSummary| {
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        let kind = match adapter.kind {
            "discrete" => awqua_device_kind::AWQUA_DEVICE_DISCRETE,
            "integrated" => awqua_device_kind::AWQUA_DEVICE_INTEGRATED,
            "virtual" => awqua_device_kind::AWQUA_DEVICE_VIRTUAL,
            "cpu" => awqua_device_kind::AWQUA_DEVICE_CPU,
            _ => awqua_device_kind::AWQUA_DEVICE_OTHER,
        };
        awqua_device_info {
            flags: flag(adapter.unusable.is_none(), AWQUA_DEVICE_USABLE)
                | flag(adapter.f16, AWQUA_DEVICE_F16)
                | flag(adapter.subgroup.is_some(), AWQUA_DEVICE_SUBGROUPS),
            kind: kind as u32,
            max_buffer_bytes: adapter.max_buffer_bytes,
            max_binding_bytes: adapter.max_binding_bytes,
            name: fixed(&adapter.name),
            api: fixed(adapter.api),
            driver: fixed(&adapter.driver),
            uuid: adapter.ids.uuid.unwrap_or_default(),
            luid: adapter.ids.luid.unwrap_or_default(),
            ..awqua_device_info::INIT
        }
    };
    runtime::backend::wgpu::adapters().into_iter().map(info).collect()
}

#[cfg(not(feature = "wgpu"))]
fn devices() -> Vec<awqua_device_info> {
    Vec::new()
}

/// Number of adapters, the preferred one first. 0 without a driver, which is no failure. Slow: asks every driver.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_device_count(count: *mut u32) -> awqua_status {
    guard("awqua_device_count", || {
        // SAFETY: the caller's promise.
        let out = unsafe { text::out(count, "count") }?;
        *out = devices().len() as u32;
        Ok(AWQUA_OK)
    })
}

/// Describes adapter number `index`. Slow: asks every driver.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_device_get(index: u32, info: *mut awqua_device_info) -> awqua_status {
    guard("awqua_device_get", || {
        // SAFETY: the caller's promise.
        let out = unsafe { Out::new(info) }?;
        let devices = devices();
        let info = devices
            .get(index as usize)
            .ok_or_else(|| Failure::invalid(format!("there is no device {index}, only {}", devices.len())))?;
        out.write(info);
        Ok(AWQUA_OK)
    })
}

layout!(awqua_engine_desc, 112, {
    struct_size: 0, flags: 4, backend: 8, threads: 12, device: 16, host_budget_bytes: 32, device_budget_bytes: 40,
    pipeline_cache: 48, pipeline_cache_len: 56, device_uuid: 64, device_luid: 80, parallel_for: 88,
    parallel_for_user: 96, vulkan: 104,
});
layout!(awqua_engine_info, 24, { struct_size: 0, flags: 4, host_bytes: 8, device_bytes: 16 });
layout!(awqua_device_info, 312, {
    struct_size: 0, flags: 4, kind: 8, reserved: 12, max_buffer_bytes: 16, max_binding_bytes: 24, name: 32, api: 160,
    driver: 176, uuid: 288, luid: 304,
});
