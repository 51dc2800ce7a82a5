//! The driver's library: whether it is there and complete, what devices it knows, and what its codes mean.

use std::ffi::{CStr, c_int, c_void};

use cudarc::driver::sys;
use cudarc::driver::sys::{CUdevice_attribute, CUresult};

use crate::error::{Error, ErrorKind, Result};

/// The oldest driver that can finish our assembly and has every function used here.
const OLDEST_DRIVER: i32 = 12_000;
/// From here on launches inside of graphs may overlap.
pub(super) const OVERLAPPING_GRAPHS: i32 = 12_030;

/// Every function used here: cudarc panics at the first use of one that a driver lacks.
const FUNCTIONS: &[&str] = &[
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceGetUuid_v2",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuCtxGetStreamPriorityRange",
    "cuMemGetInfo_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemHostGetDevicePointer_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpy2DAsync_v2",
    "cuMemsetD8Async",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamBeginCapture_v2",
    "cuStreamWaitEvent",
    "cuStreamEndCapture",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuEventElapsedTime",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuFuncSetAttribute",
    "cuLaunchKernelEx",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphExecDestroy",
    "cuGraphDestroy",
    "cuGetErrorString",
];

/// Which device is meant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum CudaChoice {
    /// The first one that can be used.
    #[default]
    Best,
    /// The first whose name has this part, in any letter case; or the one with this number in [`devices`].
    Named(String),
    /// The one with this UUID.
    Uuid([u8; 16]),
}

impl CudaChoice {
    /// The one of `devices` that is meant.
    pub fn select<'a>(&self, devices: &'a [DeviceSummary]) -> Option<&'a DeviceSummary> {
        match self {
            Self::Best => devices.iter().find(|d| d.unusable.is_none()).or(devices.first()),
            Self::Named(wanted) => devices.iter().find(|d| wanted.parse() == Ok(d.index)).or_else(|| {
                let wanted = wanted.to_lowercase();
                devices.iter().find(|d| d.name.to_lowercase().contains(&wanted))
            }),
            Self::Uuid(uuid) => devices.iter().find(|d| d.uuid == *uuid),
        }
    }
}

impl std::fmt::Display for CudaChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Best => f.write_str("the first one"),
            Self::Named(name) => write!(f, "`{name}`"),
            Self::Uuid(uuid) => {
                f.write_str("UUID ")?;
                uuid.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
    }
}

/// A device as the driver describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSummary {
    /// Number by which [`CudaChoice::Named`] can name it.
    pub index: usize,
    /// Name.
    pub name: String,
    /// UUID.
    pub uuid: [u8; 16],
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Version of CUDA that the driver speaks, such as 12040 for 12.4.
    pub driver: i32,
    /// Why it can not be used, if so.
    pub unusable: Option<String>,
}

/// The driver, present and complete.
#[derive(Clone, Copy)]
pub(super) struct Driver {
    version: i32,
}

impl Driver {
    /// Loads it.
    ///
    /// # Errors
    /// [`ErrorKind::NoDevice`] with the reason: no driver, an old one, a broken one.
    pub(super) fn load() -> Result<Self> {
        let none = |reason: String| Error::new(ErrorKind::NoDevice, reason);
        // SAFETY: loads the driver's library by its name, as every program that uses CUDA does.
        if !unsafe { sys::is_culib_present() } {
            return Err(none("the CUDA driver is not installed".into()));
        }
        // SAFETY: the library was just seen to be there, so that this does not panic.
        let library = unsafe { sys::culib() };
        for name in FUNCTIONS {
            // SAFETY: the symbol is looked up and not called.
            if unsafe { library.get::<*const c_void>(name.as_bytes()) }.is_err() {
                return Err(none(format!("the CUDA driver is too old: it has no `{name}`")));
            }
        }
        let mut version = 0;
        // SAFETY: the functions are there, and the pointer is to a local variable.
        let code = unsafe {
            match sys::cuInit(0) {
                CUresult::CUDA_SUCCESS => sys::cuDriverGetVersion(&mut version),
                code => code,
            }
        };
        if code != CUresult::CUDA_SUCCESS {
            return Err(none(format!("the CUDA driver does not start: {}", text(code))));
        }
        if version < OLDEST_DRIVER {
            let (major, minor) = (version / 1000, version % 1000 / 10);
            return Err(none(format!("the CUDA driver is too old: it speaks {major}.{minor}, not 12.0")));
        }
        Ok(Self { version })
    }

    pub(super) fn devices(self) -> Result<Vec<DeviceSummary>> {
        let mut count = 0;
        // SAFETY: the pointer is to a local variable.
        check(unsafe { sys::cuDeviceGetCount(&mut count) }, "counting devices")?;
        (0..count).map(|index| self.summary(index)).collect()
    }

    fn summary(self, index: c_int) -> Result<DeviceSummary> {
        let mut device = 0;
        let mut memory_bytes = 0;
        let mut name = [0; 128];
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: all pointers are to local variables of the sizes given.
        unsafe {
            check(sys::cuDeviceGet(&mut device, index), "opening a device")?;
            check(sys::cuDeviceTotalMem_v2(&mut memory_bytes, device), "reading a device's memory")?;
            check(sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, device), "reading a device's name")?;
            check(sys::cuDeviceGetUuid_v2(&mut uuid, device), "reading a device's UUID")?;
        }
        // SAFETY: the driver ended the name with a zero within the array, which begins as zeros.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        use CUdevice_attribute::*;
        let major = attribute(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let unusable = awqua_shaders::cuda::Image::of(major, minor)
            .is_none()
            .then(|| format!("compute capability {major}.{minor} is below 7.5"));
        Ok(DeviceSummary {
            index: index as usize,
            name,
            uuid: uuid.bytes.map(|byte| byte as u8),
            capability: (major, minor),
            memory_bytes: memory_bytes as u64,
            multiprocessors: attribute(device, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            driver: self.version,
            unusable,
        })
    }
}

/// Every device of this machine; empty where there is no driver that can be used.
pub fn devices() -> Vec<DeviceSummary> {
    Driver::load().and_then(Driver::devices).unwrap_or_default()
}

pub(super) fn attribute(device: sys::CUdevice, which: CUdevice_attribute) -> Result<u32> {
    let mut value = 0;
    // SAFETY: the pointer is to a local variable.
    check(unsafe { sys::cuDeviceGetAttribute(&mut value, which, device) }, "reading what a device can do")?;
    Ok(value.max(0) as u32)
}

fn text(code: CUresult) -> String {
    let mut text = std::ptr::null();
    // SAFETY: the driver hands out a text that lives as long as it does, or none.
    match unsafe { sys::cuGetErrorString(code, &mut text) } {
        // SAFETY: as above; it ends with a zero.
        CUresult::CUDA_SUCCESS => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
        _ => format!("error {}", code as u32),
    }
}

pub(super) fn check(code: CUresult, doing: &str) -> Result<()> {
    use CUresult::*;
    let kind = match code {
        CUDA_SUCCESS => return Ok(()),
        CUDA_ERROR_OUT_OF_MEMORY => ErrorKind::OutOfMemory,
        CUDA_ERROR_NO_DEVICE | CUDA_ERROR_INVALID_DEVICE => ErrorKind::NoDevice,
        // The context is unusable from here on.
        CUDA_ERROR_ILLEGAL_ADDRESS
        | CUDA_ERROR_LAUNCH_FAILED
        | CUDA_ERROR_LAUNCH_TIMEOUT
        | CUDA_ERROR_ILLEGAL_INSTRUCTION
        | CUDA_ERROR_MISALIGNED_ADDRESS
        | CUDA_ERROR_INVALID_ADDRESS_SPACE
        | CUDA_ERROR_INVALID_PC
        | CUDA_ERROR_HARDWARE_STACK_ERROR
        | CUDA_ERROR_ECC_UNCORRECTABLE
        | CUDA_ERROR_ASSERT
        | CUDA_ERROR_CONTEXT_IS_DESTROYED
        | CUDA_ERROR_DEINITIALIZED => ErrorKind::DeviceLost,
        _ => ErrorKind::Device,
    };
    Err(Error::new(kind, format!("{doing} failed: {}", text(code))))
}
