//! The engine: where models run, and what the process has to run them on.

use std::ffi::c_char;
use std::sync::Arc;

use runtime::{BackendChoice, LoadOptions};

use crate::boundary::guard;
use crate::handle::{self, Handle, Object};
use crate::layout::{self, Out, Sized32, layout};
use crate::status::awqua_status::{self, *};
use crate::status::{Failure, Outcome};
use crate::text::{self, awqua_str};

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
}

/// Never use half-precision arithmetic or subgroup operations on the GPU, whatever the adapter offers.
pub const AWQUA_ENGINE_PORTABLE_KERNELS: u32 = 1;

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
    /// to the session, sleep between its ticks and end with it. Ignored on a GPU.
    pub threads: u32,
    /// Part of the adapter's name in any letter case, or its index in awqua_device_get; empty takes the best one.
    pub device: awqua_str,
}

// SAFETY: repr(C), u32 first, no padding; integers and a text.
unsafe impl Sized32 for awqua_engine_desc {
    const NAME: &'static str = "awqua_engine_desc";
    const FIRST: usize = size_of::<Self>();
    const INIT: Self =
        Self { struct_size: size_of::<Self>() as u32, flags: 0, backend: 0, threads: 0, device: awqua_str::EMPTY };
}

/// A place where models run. Owns nothing but choices: models keep what they need of it, so it may be freed first.
pub struct awqua_engine {
    _opaque: [u8; 0],
}

/// What models and sessions need to know of their engine.
pub struct EngineConfig {
    pub load: LoadOptions,
    pub threads: usize,
}

pub struct Engine {
    pub config: Arc<EngineConfig>,
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

fn config(desc: &awqua_engine_desc) -> Outcome<EngineConfig> {
    let backend = match desc.backend {
        0 => BackendChoice::Auto,
        1 => BackendChoice::Cpu,
        2 => BackendChoice::Wgpu,
        other => return Err(Failure::invalid(format!("`backend` is {other}, expected an awqua_backend"))),
    };
    if desc.flags & !AWQUA_ENGINE_PORTABLE_KERNELS != 0 {
        return Err(Failure::invalid(format!("`flags` has unknown bits: {:#x}", desc.flags)));
    }
    if desc.threads > 1024 {
        return Err(Failure::invalid(format!("`threads` is {}, expected at most 1024", desc.threads)));
    }
    // SAFETY: the caller of the exported function promises readable text.
    let device = unsafe { desc.device.get_optional("device") }?.map(str::to_owned);
    let portable_kernels = desc.flags & AWQUA_ENGINE_PORTABLE_KERNELS != 0;
    Ok(EngineConfig { load: LoadOptions { backend, device, portable_kernels }, threads: desc.threads.max(1) as usize })
}

/// Fills a description with its defaults.
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
        *out = Handle::into_c(Engine { config: Arc::new(config(&desc)?) }, ());
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

layout!(awqua_engine_desc, 32, { struct_size: 0, flags: 4, backend: 8, threads: 12, device: 16 });
layout!(awqua_device_info, 288, {
    struct_size: 0, flags: 4, kind: 8, reserved: 12, max_buffer_bytes: 16, max_binding_bytes: 24, name: 32, api: 160,
    driver: 176,
});
