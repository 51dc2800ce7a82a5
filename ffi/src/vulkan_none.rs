//! Without Vulkan.

use runtime::DeviceChoice;

use super::awqua_vulkan;
use crate::status::awqua_status::AWQUA_ERR_UNSUPPORTED;
use crate::status::{Failure, Outcome};

/// Refuses the device.
///
/// # Safety
/// None is needed.
pub unsafe fn choice(_: &awqua_vulkan) -> Outcome<DeviceChoice> {
    Err(Failure::new(AWQUA_ERR_UNSUPPORTED, "this library was built without Vulkan"))
}
