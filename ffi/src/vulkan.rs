//! A Vulkan device that the host made and shares.

use std::ffi::{c_char, c_void};

use runtime::DeviceChoice;

use crate::layout::{Sized32, layout};
use crate::status::Outcome;

#[cfg(not(all(feature = "wgpu", any(windows, target_os = "linux", target_os = "android", target_os = "freebsd"))))]
#[path = "vulkan_none.rs"]
mod device;
#[cfg(all(feature = "wgpu", any(windows, target_os = "linux", target_os = "android", target_os = "freebsd")))]
#[path = "vulkan_device.rs"]
mod device;

/// Any function, as PFN_vkVoidFunction.
pub type awqua_vulkan_function = Option<unsafe extern "C" fn()>;

/// PFN_vkGetInstanceProcAddr, with the handle as a pointer.
pub type awqua_vulkan_get_proc_fn =
    Option<unsafe extern "C" fn(instance: *mut c_void, name: *const c_char) -> awqua_vulkan_function>;

/// A function of the host that takes only `user`.
pub type awqua_vulkan_notify_fn = Option<unsafe extern "C" fn(user: *mut c_void)>;

/// The device was made with shaderFloat16, storageBuffer16BitAccess and uniformAndStorageBuffer16BitAccess: arithmetic
/// in half precision.
#[allow(dead_code, reason = "values the caller uses")]
pub const AWQUA_VULKAN_F16: u32 = 1;
/// The device was made with subgroupSizeControl: subgroup operations.
#[allow(dead_code, reason = "values the caller uses")]
pub const AWQUA_VULKAN_SUBGROUPS: u32 = 2;
/// The device was made with timelineSemaphore: cheaper submissions.
#[allow(dead_code, reason = "values the caller uses")]
pub const AWQUA_VULKAN_TIMELINE_SEMAPHORES: u32 = 4;
/// The device was made with VK_KHR_cooperative_matrix and cooperativeMatrix, vulkanMemoryModel and
/// vulkanMemoryModelDeviceScope: matrix units for prompts.
#[allow(dead_code, reason = "values the caller uses")]
pub const AWQUA_VULKAN_COOPERATIVE_MATRICES: u32 = 8;

/// A Vulkan device of the host, for `vulkan` of awqua_engine_desc. Any device of Vulkan 1.1 or later will do; what the
/// flags name makes the kernels faster, from an extension or as a part of Vulkan itself.
///
/// Ownership. Instance, device and queue stay the host's: the library makes its own buffers, pipelines and command
/// pools on the device and destroys nothing else. Instance and device must live until `released` is called, which
/// happens once nothing of the library uses them any more: when the engine that they were given to, its models and their
/// sessions are freed, or have gone over to another device. Then they may be destroyed, in `released` itself or later.
///
/// The queue. Vulkan lets one thread at a time work on a queue. Without `lock_queue` and `unlock_queue` the library
/// works on it only inside of calls on models and sessions of the engine, and on the engine itself, so a host whose
/// ticks and submissions come from one thread has nothing to do; one that submits from other threads gives the two
/// functions, which the library calls around every call on the queue, or gives a second queue of the device that only the
/// library uses. Two queues also let the GPU work on both at once, where one takes turns; submissions of the library are
/// as short as the ticks' budgets. The host's own vkDeviceWaitIdle counts as work on all queues.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct awqua_vulkan {
    /// sizeof(awqua_vulkan).
    pub struct_size: u32,
    /// AWQUA_VULKAN_* flags: what the device was made with. What was not enabled must not be named.
    pub flags: u32,
    /// VkApplicationInfo::apiVersion of the instance, at least VK_API_VERSION_1_1.
    pub api_version: u32,
    /// Family of the queue, which has graphics and compute.
    pub queue_family: u32,
    /// Number of the queue in its family.
    pub queue_index: u32,
    /// 0.
    pub reserved: u32,
    /// vkGetInstanceProcAddr, cast.
    pub get_instance_proc_addr: awqua_vulkan_get_proc_fn,
    /// VkInstance.
    pub instance: *mut c_void,
    /// VkPhysicalDevice.
    pub physical_device: *mut c_void,
    /// VkDevice.
    pub device: *mut c_void,
    /// Blocks until the calling thread has the queue for itself, or NULL; both or neither. Never called twice without
    /// `unlock_queue` between. Must not call the library.
    pub lock_queue: awqua_vulkan_notify_fn,
    /// Ends that.
    pub unlock_queue: awqua_vulkan_notify_fn,
    /// Tells that the library has let go of the device, once and from inside the last call that frees what used it, or
    /// NULL. Not called if the call that handed the device over fails. Must not call the library.
    pub released: awqua_vulkan_notify_fn,
    /// Handed to the functions.
    pub user: *mut c_void,
}

// SAFETY: repr(C), u32 first, no padding on 64-bit targets and none that is read elsewhere; integers, pointers and
// nullable functions.
unsafe impl Sized32 for awqua_vulkan {
    const NAME: &'static str = "awqua_vulkan";
    const FIRST: usize = size_of::<Self>();
    const INIT: Self = Self {
        struct_size: size_of::<Self>() as u32,
        flags: 0,
        api_version: 0,
        queue_family: 0,
        queue_index: 0,
        reserved: 0,
        get_instance_proc_addr: None,
        instance: std::ptr::null_mut(),
        physical_device: std::ptr::null_mut(),
        device: std::ptr::null_mut(),
        lock_queue: None,
        unlock_queue: None,
        released: None,
        user: std::ptr::null_mut(),
    };
}

layout!(awqua_vulkan, 88, {
    struct_size: 0, flags: 4, api_version: 8, queue_family: 12, queue_index: 16, reserved: 20,
    get_instance_proc_addr: 24, instance: 32, physical_device: 40, device: 48, lock_queue: 56, unlock_queue: 64,
    released: 72, user: 80,
});

/// The host's device as the runtime takes it.
///
/// # Safety
/// `pointer` must be NULL or readable for as many bytes as its `struct_size` says, and its content be what its
/// documentation asks for.
pub unsafe fn choice(pointer: *const awqua_vulkan) -> Outcome<DeviceChoice> {
    // SAFETY: the caller's promise.
    unsafe { device::choice(&crate::layout::read(pointer)?) }
}
