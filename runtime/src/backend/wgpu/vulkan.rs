//! What only Vulkan tells or takes: device numbers.

use ash::vk;

use super::adapters::DeviceIds;

/// The numbers of an adapter of the Vulkan interface.
pub(super) fn ids(adapter: &wgpu::Adapter) -> DeviceIds {
    // SAFETY: the adapter is only asked, nothing of it is changed or destroyed.
    let Some(adapter) = (unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }) else { return DeviceIds::default() };
    let instance = adapter.shared_instance();
    if instance.instance_api_version() < vk::API_VERSION_1_1 {
        return DeviceIds::default();
    }
    let mut ids = vk::PhysicalDeviceIDProperties::default();
    let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut ids);
    // SAFETY: the device is of this instance, which has the function since version 1.1.
    unsafe {
        instance.raw_instance().get_physical_device_properties2(adapter.raw_physical_device(), &mut properties);
    }
    DeviceIds { uuid: Some(ids.device_uuid), luid: (ids.device_luid_valid == vk::TRUE).then_some(ids.device_luid) }
}
