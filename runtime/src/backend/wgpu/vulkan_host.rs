//! A Vulkan device that a host made without wgpu, as wgpu's device.
//!
//! wgpu asks a physical device what it offers and takes for granted that the logical device was made with all of it. A
//! host's device was made with what the host needs, so wgpu is shown that instead: its calls go through `instance_proc`
//! and `device_proc`, which answer the few questions that matter from the host's description and pass everything else
//! on, as a Vulkan layer would. The same place takes the host's lock around everything that works on the queue.

use std::ffi::{CStr, c_char, c_void};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use ash::vk::{self, Handle};
use wgpu::hal;

use super::device::{self, lock};
use super::{SharedGpu, WgpuOptions};
use crate::error::{Error, ErrorKind, Result};

/// `PFN_vkGetInstanceProcAddr`.
pub type GetInstanceProc = unsafe extern "system" fn(*mut c_void, *const c_char) -> Option<unsafe extern "system" fn()>;

/// What a device was made with, of what the kernels can make use of; a device works without any of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VulkanFeatures {
    /// `shaderFloat16`, `storageBuffer16BitAccess` and `uniformAndStorageBuffer16BitAccess`: arithmetic in half precision.
    pub f16: bool,
    /// `subgroupSizeControl`: subgroup operations.
    pub subgroups: bool,
    /// `timelineSemaphore`: one semaphore instead of a fence a submission.
    pub timeline_semaphores: bool,
    /// `cooperativeMatrix`, `vulkanMemoryModel` and `vulkanMemoryModelDeviceScope`: matrix units for prompts.
    pub cooperative_matrices: bool,
}

/// Takes and gives back the queue.
pub trait QueueLock: Send + Sync {
    /// Blocks until nobody else works on the queue.
    fn lock(&self);

    /// Lets others work on it.
    fn unlock(&self);
}

/// A device of a host, and what is known of it only by who made it.
pub struct VulkanDevice {
    /// `vkGetInstanceProcAddr` of the loader that the instance came from.
    pub get_instance_proc: GetInstanceProc,
    /// `VkInstance`.
    pub instance: *mut c_void,
    /// `VkPhysicalDevice`.
    pub physical_device: *mut c_void,
    /// `VkDevice`.
    pub device: *mut c_void,
    /// `VkApplicationInfo::apiVersion` that the instance was made with, at least that of Vulkan 1.1.
    pub api_version: u32,
    /// Family of a queue with graphics and compute that the device was made with.
    pub queue_family: u32,
    /// Its number in the family.
    pub queue_index: u32,
    /// What the device was made with.
    pub features: VulkanFeatures,
    /// Held during every call on the queue. Without it the host keeps off the queue while a call of the library runs.
    pub queue_lock: Option<Box<dyn QueueLock>>,
    /// Called once nothing of the library uses the device any more, on the thread that let go of it last.
    pub released: Option<Box<dyn FnOnce() + Send + Sync>>,
}

impl fmt::Debug for VulkanDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VulkanDevice").field("device", &self.device).finish_non_exhaustive()
    }
}

/// A function that was looked up by its name, in the type of that name.
macro_rules! typed {
    ($function:expr, $type:ty) => {
        // SAFETY: a pointer to a function of this type.
        unsafe { std::mem::transmute::<unsafe extern "system" fn(), $type>($function) }
    };
}

/// Any function as one of no particular type.
macro_rules! void {
    ($function:expr, $type:ty) => {
        // SAFETY: a pointer to a function; whoever looked it up by its name knows its type.
        Some(unsafe { std::mem::transmute::<$type, unsafe extern "system" fn()>($function) })
    };
}

/// Takes the host's device for [`super::DeviceChoice::Adopted`].
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a missing handle, an old version or a queue that the device does not have,
/// [`ErrorKind::NoDevice`] if the device lacks what the kernels need. [`VulkanDevice::released`] is not called then.
///
/// # Safety
/// The handles must be what their names say and belong together, the device must have been made with the queue and with
/// what `features` and `api_version` say, and all of them must live until `released` is called.
pub unsafe fn adopt(host: VulkanDevice) -> Result<SharedGpu> {
    // One at a time: questions about a physical device are answered for the latest host.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = lock(&ONE);
    let invalid = |message: &str| Error::new(ErrorKind::InvalidInput, message);
    if [host.instance, host.physical_device, host.device].iter().any(|handle| handle.is_null()) {
        return Err(invalid("the Vulkan instance, physical device or device is NULL"));
    }
    if host.api_version < vk::API_VERSION_1_1 {
        return Err(invalid("the Vulkan instance has to be made for version 1.1 or later"));
    }
    let (api_version, family, index) = (host.api_version, host.queue_family, host.queue_index);
    // SAFETY: the caller's promise.
    let (guest, released) = unsafe { Guest::new(host) }?;
    let released = Arc::new(released);

    let entry = ash::StaticFn { get_instance_proc_addr: instance_proc };
    // SAFETY: the function passes all but some questions on to that of the loader, and the instance lives long enough.
    let (entry, instance) =
        unsafe { (ash::Entry::from_static_fn(entry.clone()), ash::Instance::load(&entry, guest.instance)) };
    // SAFETY: the device is of this instance.
    let device = unsafe { ash::Device::load(instance.fp_v1_0(), guest.device) };
    let failed = |what: &str, error: &dyn fmt::Display| {
        Error::new(ErrorKind::NoDevice, format!("the host's Vulkan device can not be used: {what}: {error}"))
    };
    // SAFETY: the instance was made for this version; of its extensions only one is used, whose functions are those of
    // version 1.1. It outlives the callback, and wgpu destroys nothing of the host's where there is one.
    let instance = unsafe {
        hal::vulkan::Instance::from_raw(
            entry,
            instance,
            api_version,
            0,
            None,
            vec![ash::khr::get_physical_device_properties2::NAME],
            wgpu::InstanceFlags::empty(),
            wgpu::MemoryBudgetThresholds::default(),
            false,
            Some(keep(&released)),
        )
    };
    let instance = instance.map_err(|error| failed("instance", &error))?;
    let exposed = instance.expose_adapter(guest.physical_device);
    let exposed = exposed.ok_or_else(|| failed("adapter", &"its first queue family has no graphics"))?;
    // SAFETY: the adapter is of this instance.
    let adapter = unsafe { wgpu::Instance::from_hal::<hal::api::Vulkan>(instance).create_adapter_from_hal(exposed) };
    let features = device::wanted_features(&adapter, &WgpuOptions::default());
    let descriptor = device::descriptor(features, adapter.limits());
    // SAFETY: the device was made with what the adapter was shown to offer, and the queue.
    let opened = unsafe {
        let adapter = adapter.as_hal::<hal::api::Vulkan>().ok_or_else(|| failed("adapter", &"not of Vulkan"))?;
        let extensions = adapter.required_device_extensions(features);
        let (limits, hints) = (&descriptor.required_limits, &descriptor.memory_hints);
        let callback = Some(keep(&released));
        adapter.device_from_raw(device, callback, &extensions, features, limits, hints, family, index)
    };
    let opened = opened.map_err(|error| failed("device", &error))?;
    // SAFETY: the device is of this adapter, and offers the features.
    let opened = unsafe { adapter.create_device_from_hal(opened, &descriptor) };
    let (device, queue) = opened.map_err(|error| failed("device", &error))?;
    released.armed.store(true, Ordering::Release);
    Ok(SharedGpu { adapter, device, queue })
}

/// A callback that wgpu drops with its object, and the host's with the last of them.
fn keep(released: &Arc<Released>) -> hal::DropCallback {
    let released = Arc::clone(released);
    Box::new(move || drop(released))
}

/// Tells the host once it is dropped, if the device was taken at all.
struct Released {
    guest: Arc<Guest>,
    tell: Option<Box<dyn FnOnce() + Send + Sync>>,
    armed: AtomicBool,
}

impl Drop for Released {
    fn drop(&mut self) {
        lock(&GUESTS).retain(|guest| !Arc::ptr_eq(guest, &self.guest));
        if let Some(tell) = self.tell.take().filter(|_| *self.armed.get_mut()) {
            tell();
        }
    }
}

/// Devices of hosts that are in use.
static GUESTS: Mutex<Vec<Arc<Guest>>> = Mutex::new(Vec::new());

/// The host that `is` fits, the latest first.
fn guest(is: impl Fn(&Guest) -> bool) -> Option<Arc<Guest>> {
    lock(&GUESTS).iter().rev().find(|guest| is(guest)).cloned()
}

/// What the functions below answer from, and what they pass on to.
struct Guest {
    instance: vk::Instance,
    physical_device: vk::PhysicalDevice,
    device: vk::Device,
    queue: vk::Queue,
    api_version: u32,
    features: VulkanFeatures,
    queue_lock: Option<Box<dyn QueueLock>>,
    get_instance_proc: vk::PFN_vkGetInstanceProcAddr,
    get_device_proc: vk::PFN_vkGetDeviceProcAddr,
    properties: vk::PFN_vkGetPhysicalDeviceProperties,
    properties2: vk::PFN_vkGetPhysicalDeviceProperties2,
    queue_submit: vk::PFN_vkQueueSubmit,
    queue_wait_idle: vk::PFN_vkQueueWaitIdle,
}

impl Guest {
    /// Looks the functions up and lists the host.
    ///
    /// # Safety
    /// As for [`adopt`].
    unsafe fn new(host: VulkanDevice) -> Result<(Arc<Self>, Released)> {
        let missing = |name: &CStr| {
            let message = format!("the Vulkan loader of the host has no {}", name.to_string_lossy());
            Error::new(ErrorKind::InvalidInput, message)
        };
        // SAFETY: the same function with handles in their types, which are pointers in a transparent structure.
        let get_instance_proc =
            unsafe { std::mem::transmute::<GetInstanceProc, vk::PFN_vkGetInstanceProcAddr>(host.get_instance_proc) };
        let instance = vk::Instance::from_raw(host.instance as u64);
        let device = vk::Device::from_raw(host.device as u64);
        let of_instance = |name: &'static CStr| {
            // SAFETY: the caller's promise.
            unsafe { get_instance_proc(instance, name.as_ptr()) }.ok_or_else(|| missing(name))
        };
        let get_device_proc = typed!(of_instance(c"vkGetDeviceProcAddr")?, vk::PFN_vkGetDeviceProcAddr);
        let of_device = |name: &'static CStr| {
            // SAFETY: the caller's promise.
            unsafe { get_device_proc(device, name.as_ptr()) }.ok_or_else(|| missing(name))
        };
        let get_queue = typed!(of_device(c"vkGetDeviceQueue")?, vk::PFN_vkGetDeviceQueue);
        let mut queue = vk::Queue::null();
        // SAFETY: the device was made with this queue.
        unsafe { get_queue(device, host.queue_family, host.queue_index, &mut queue) };
        if queue.is_null() {
            let message =
                format!("the Vulkan device has no queue {} of family {}", host.queue_index, host.queue_family);
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let guest = Arc::new(Self {
            instance,
            physical_device: vk::PhysicalDevice::from_raw(host.physical_device as u64),
            device,
            queue,
            api_version: host.api_version,
            features: host.features,
            queue_lock: host.queue_lock,
            get_instance_proc,
            get_device_proc,
            properties: typed!(of_instance(c"vkGetPhysicalDeviceProperties")?, vk::PFN_vkGetPhysicalDeviceProperties),
            properties2: typed!(
                of_instance(c"vkGetPhysicalDeviceProperties2")?,
                vk::PFN_vkGetPhysicalDeviceProperties2
            ),
            queue_submit: typed!(of_device(c"vkQueueSubmit")?, vk::PFN_vkQueueSubmit),
            queue_wait_idle: typed!(of_device(c"vkQueueWaitIdle")?, vk::PFN_vkQueueWaitIdle),
        });
        lock(&GUESTS).push(Arc::clone(&guest));
        let released = Released { guest: Arc::clone(&guest), tell: host.released, armed: AtomicBool::new(false) };
        Ok((guest, released))
    }

    /// Extensions that stand for what the device was made with.
    fn extensions(&self) -> impl Iterator<Item = &'static CStr> {
        let VulkanFeatures { f16, subgroups, timeline_semaphores, cooperative_matrices } = self.features;
        let names: [(bool, &'static [&'static CStr]); 4] = [
            (f16, &[ash::khr::_16bit_storage::NAME, ash::khr::shader_float16_int8::NAME]),
            (subgroups, &[ash::ext::subgroup_size_control::NAME]),
            (timeline_semaphores, &[ash::khr::timeline_semaphore::NAME]),
            (cooperative_matrices, &[ash::khr::cooperative_matrix::NAME, ash::khr::vulkan_memory_model::NAME]),
        ];
        names.into_iter().filter(|(made, _)| *made).flat_map(|(_, names)| names.iter().copied())
    }

    /// Works on the queue with the host's lock held.
    fn with_queue<T>(&self, work: impl FnOnce() -> T) -> T {
        if let Some(queue) = &self.queue_lock {
            queue.lock();
        }
        let result = work();
        if let Some(queue) = &self.queue_lock {
            queue.unlock();
        }
        result
    }
}

/// `vkGetInstanceProcAddr` as wgpu sees it.
unsafe extern "system" fn instance_proc(instance: vk::Instance, name: *const c_char) -> vk::PFN_vkVoidFunction {
    let guest = guest(|guest| instance.is_null() || guest.instance == instance)?;
    // SAFETY: callers hand over a C string.
    match unsafe { CStr::from_ptr(name) }.to_bytes() {
        b"vkGetDeviceProcAddr" => void!(device_proc, vk::PFN_vkGetDeviceProcAddr),
        b"vkEnumerateDeviceExtensionProperties" => void!(extensions, vk::PFN_vkEnumerateDeviceExtensionProperties),
        b"vkGetPhysicalDeviceProperties" => void!(properties, vk::PFN_vkGetPhysicalDeviceProperties),
        b"vkGetPhysicalDeviceFeatures" => void!(features, vk::PFN_vkGetPhysicalDeviceFeatures),
        b"vkGetPhysicalDeviceProperties2" | b"vkGetPhysicalDeviceProperties2KHR" => {
            void!(properties2, vk::PFN_vkGetPhysicalDeviceProperties2)
        }
        b"vkGetPhysicalDeviceFeatures2" | b"vkGetPhysicalDeviceFeatures2KHR" => {
            void!(features2, vk::PFN_vkGetPhysicalDeviceFeatures2)
        }
        // SAFETY: what was asked for, of the same loader.
        bytes => either_name(bytes, |name| unsafe { (guest.get_instance_proc)(instance, name.as_ptr()) }),
    }
}

/// `vkGetDeviceProcAddr` as wgpu sees it.
unsafe extern "system" fn device_proc(device: vk::Device, name: *const c_char) -> vk::PFN_vkVoidFunction {
    let guest = guest(|guest| guest.device == device)?;
    // SAFETY: callers hand over a C string.
    match unsafe { CStr::from_ptr(name) }.to_bytes() {
        b"vkQueueSubmit" => void!(queue_submit, vk::PFN_vkQueueSubmit),
        b"vkQueueWaitIdle" => void!(queue_wait_idle, vk::PFN_vkQueueWaitIdle),
        // SAFETY: what was asked for, of the same device.
        bytes => either_name(bytes, |name| unsafe { (guest.get_device_proc)(device, name.as_ptr()) }),
    }
}

/// The function of this name, or of its name since it became part of Vulkan itself: a host may have enabled either.
fn either_name(bytes: &[u8], find: impl Fn(&CStr) -> vk::PFN_vkVoidFunction) -> vk::PFN_vkVoidFunction {
    let find = |bytes: &[u8]| find(&std::ffi::CString::new(bytes).ok()?);
    find(bytes).or_else(|| find(bytes.strip_suffix(b"KHR").or_else(|| bytes.strip_suffix(b"EXT"))?))
}

unsafe extern "system" fn extensions(
    physical_device: vk::PhysicalDevice,
    _: *const c_char,
    count: *mut u32,
    out: *mut vk::ExtensionProperties,
) -> vk::Result {
    let Some(guest) = guest(|guest| guest.physical_device == physical_device) else {
        return vk::Result::ERROR_INITIALIZATION_FAILED;
    };
    let all: Vec<&CStr> = guest.extensions().collect();
    // SAFETY: callers hand over a number, and room for as many as it says unless they only ask for the number.
    unsafe {
        let room = if out.is_null() { 0 } else { *count as usize };
        for (i, name) in all.iter().take(room).enumerate() {
            let mut properties = vk::ExtensionProperties { spec_version: 1, ..Default::default() };
            for (to, byte) in properties.extension_name.iter_mut().zip(name.to_bytes()) {
                *to = *byte as c_char;
            }
            out.add(i).write(properties);
        }
        *count = if out.is_null() { all.len() } else { all.len().min(room) } as u32;
        if !out.is_null() && room < all.len() { vk::Result::INCOMPLETE } else { vk::Result::SUCCESS }
    }
}

unsafe extern "system" fn properties(physical_device: vk::PhysicalDevice, out: *mut vk::PhysicalDeviceProperties) {
    if let Some(guest) = guest(|guest| guest.physical_device == physical_device) {
        // SAFETY: the host's own function with the caller's arguments. A device has no more than its instance was made for.
        unsafe {
            (guest.properties)(physical_device, out);
            (*out).api_version = (*out).api_version.min(guest.api_version);
        }
    }
}

unsafe extern "system" fn properties2(
    physical_device: vk::PhysicalDevice,
    out: *mut vk::PhysicalDeviceProperties2<'_>,
) {
    if let Some(guest) = guest(|guest| guest.physical_device == physical_device) {
        // SAFETY: as above.
        unsafe {
            (guest.properties2)(physical_device, out);
            (*out).properties.api_version = (*out).properties.api_version.min(guest.api_version);
        }
    }
}

unsafe extern "system" fn features(_: vk::PhysicalDevice, out: *mut vk::PhysicalDeviceFeatures) {
    // SAFETY: callers hand over room for it.
    unsafe { out.write(vk::PhysicalDeviceFeatures::default()) };
}

unsafe extern "system" fn features2(physical_device: vk::PhysicalDevice, out: *mut vk::PhysicalDeviceFeatures2<'_>) {
    let Some(guest) = guest(|guest| guest.physical_device == physical_device) else { return };
    // SAFETY: callers hand over a chain of structures that begin as `BaseOutStructure` does and are of the type that this
    // says. What is left alone stays as wgpu made it: false.
    unsafe {
        (*out).features = vk::PhysicalDeviceFeatures::default();
        let mut next = (*out).p_next.cast::<vk::BaseOutStructure<'_>>();
        while !next.is_null() {
            enable(&guest.features, next);
            next = (*next).p_next;
        }
    }
}

/// Writes what the device was made with to one structure.
///
/// # Safety
/// The structure is of the type that it says.
unsafe fn enable(made: &VulkanFeatures, structure: *mut vk::BaseOutStructure<'_>) {
    let bits = |made: bool| u32::from(made);
    // SAFETY: the caller's promise.
    unsafe {
        match (*structure).s_type {
            vk::StructureType::PHYSICAL_DEVICE_SHADER_FLOAT16_INT8_FEATURES => {
                let to = structure.cast::<vk::PhysicalDeviceShaderFloat16Int8Features<'_>>();
                (*to).shader_float16 = bits(made.f16);
            }
            vk::StructureType::PHYSICAL_DEVICE_16BIT_STORAGE_FEATURES => {
                let to = structure.cast::<vk::PhysicalDevice16BitStorageFeatures<'_>>();
                (*to).storage_buffer16_bit_access = bits(made.f16);
                (*to).uniform_and_storage_buffer16_bit_access = bits(made.f16);
            }
            vk::StructureType::PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_FEATURES => {
                let to = structure.cast::<vk::PhysicalDeviceSubgroupSizeControlFeatures<'_>>();
                (*to).subgroup_size_control = bits(made.subgroups);
            }
            vk::StructureType::PHYSICAL_DEVICE_TIMELINE_SEMAPHORE_FEATURES => {
                let to = structure.cast::<vk::PhysicalDeviceTimelineSemaphoreFeatures<'_>>();
                (*to).timeline_semaphore = bits(made.timeline_semaphores);
            }
            vk::StructureType::PHYSICAL_DEVICE_COOPERATIVE_MATRIX_FEATURES_KHR => {
                let to = structure.cast::<vk::PhysicalDeviceCooperativeMatrixFeaturesKHR<'_>>();
                (*to).cooperative_matrix = bits(made.cooperative_matrices);
            }
            vk::StructureType::PHYSICAL_DEVICE_VULKAN_MEMORY_MODEL_FEATURES => {
                let to = structure.cast::<vk::PhysicalDeviceVulkanMemoryModelFeatures<'_>>();
                (*to).vulkan_memory_model = bits(made.cooperative_matrices);
                (*to).vulkan_memory_model_device_scope = bits(made.cooperative_matrices);
            }
            _ => {}
        }
    }
}

unsafe extern "system" fn queue_submit(
    queue: vk::Queue,
    count: u32,
    submits: *const vk::SubmitInfo<'_>,
    fence: vk::Fence,
) -> vk::Result {
    match guest(|guest| guest.queue == queue) {
        // SAFETY: the host's own function with the caller's arguments.
        Some(guest) => guest.with_queue(|| unsafe { (guest.queue_submit)(queue, count, submits, fence) }),
        None => vk::Result::ERROR_DEVICE_LOST,
    }
}

unsafe extern "system" fn queue_wait_idle(queue: vk::Queue) -> vk::Result {
    match guest(|guest| guest.queue == queue) {
        // SAFETY: as above.
        Some(guest) => guest.with_queue(|| unsafe { (guest.queue_wait_idle)(queue) }),
        None => vk::Result::ERROR_DEVICE_LOST,
    }
}
