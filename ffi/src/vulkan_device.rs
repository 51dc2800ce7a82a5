//! With Vulkan.

use std::ffi::c_void;

use runtime::DeviceChoice;
use runtime::backend::wgpu::vulkan_host::{GetInstanceProc, QueueLock, VulkanDevice, VulkanFeatures, adopt};

use super::*;
use crate::model::check_flags;
use crate::status::Failure;

/// A function of the host with its argument.
#[derive(Clone, Copy)]
struct Notify {
    function: unsafe extern "C" fn(*mut c_void),
    user: *mut c_void,
}

// SAFETY: the host promises functions that may be called from every thread that calls the library.
unsafe impl Send for Notify {}
// SAFETY: as above.
unsafe impl Sync for Notify {}

impl Notify {
    fn new(function: awqua_vulkan_notify_fn, user: *mut c_void) -> Option<Self> {
        Some(Self { function: function?, user })
    }

    fn call(self) {
        // SAFETY: the host's own function and argument.
        unsafe { (self.function)(self.user) }
    }
}

struct Lock {
    lock: Notify,
    unlock: Notify,
}

impl QueueLock for Lock {
    fn lock(&self) {
        self.lock.call();
    }

    fn unlock(&self) {
        self.unlock.call();
    }
}

/// Takes the device.
///
/// # Safety
/// Its content must be what its documentation asks for.
pub unsafe fn choice(host: &awqua_vulkan) -> Outcome<DeviceChoice> {
    let all = AWQUA_VULKAN_F16
        | AWQUA_VULKAN_SUBGROUPS
        | AWQUA_VULKAN_TIMELINE_SEMAPHORES
        | AWQUA_VULKAN_COOPERATIVE_MATRICES;
    check_flags(host.flags, all)?;
    let has = |flag: u32| host.flags & flag != 0;
    let get_proc = host.get_instance_proc_addr.ok_or_else(|| Failure::null("get_instance_proc_addr"))?;
    let (lock, unlock) = (Notify::new(host.lock_queue, host.user), Notify::new(host.unlock_queue, host.user));
    let queue_lock: Option<Box<dyn QueueLock>> = match (lock, unlock) {
        (Some(lock), Some(unlock)) => Some(Box::new(Lock { lock, unlock })),
        (None, None) => None,
        _ => return Err(Failure::invalid("`lock_queue` and `unlock_queue` come together")),
    };
    let released = Notify::new(host.released, host.user);
    let device = VulkanDevice {
        // SAFETY: the header asks for this very function; VKAPI_PTR is the convention of C but on 32-bit Windows, where
        // the cast in the host's source tells the compiler of that other one.
        get_instance_proc: unsafe {
            std::mem::transmute::<
                unsafe extern "C" fn(*mut c_void, *const c_char) -> awqua_vulkan_function,
                GetInstanceProc,
            >(get_proc)
        },
        instance: host.instance,
        physical_device: host.physical_device,
        device: host.device,
        api_version: host.api_version,
        queue_family: host.queue_family,
        queue_index: host.queue_index,
        features: VulkanFeatures {
            f16: has(AWQUA_VULKAN_F16),
            subgroups: has(AWQUA_VULKAN_SUBGROUPS),
            timeline_semaphores: has(AWQUA_VULKAN_TIMELINE_SEMAPHORES),
            cooperative_matrices: has(AWQUA_VULKAN_COOPERATIVE_MATRICES),
        },
        queue_lock,
        released: released.map(|released| -> Box<dyn FnOnce() + Send + Sync> { Box::new(move || released.call()) }),
    };
    // SAFETY: the caller's promise.
    Ok(DeviceChoice::Adopted(unsafe { adopt(device) }?))
}
