//! Which adapters there are, and which of them is meant.

use std::sync::OnceLock;

use wgpu::{Backends, DeviceType, Features, Limits};

use super::DeviceChoice;
use crate::error::{Error, ErrorKind, Result};

/// Storage buffers that one dispatch binds at most.
const STORAGE_BUFFERS: u32 = 8;
/// Workgroup memory that a kernel uses at most, in bytes.
const WORKGROUP_BYTES: u32 = 16 << 10;
/// Invocations of a workgroup at most.
const INVOCATIONS: u32 = 256;
/// Share of the memory budget, in percent, above which the driver is not asked for more.
const BUDGET_PERCENT: u8 = 97;

/// Numbers that name a device across interfaces and processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceIds {
    /// Of the device; the same for every interface that has such a number.
    pub uuid: Option<[u8; 16]>,
    /// Of the device on Windows until it restarts, as Direct3D and DXGI give it.
    pub luid: Option<[u8; 8]>,
}

/// What an adapter is and offers, for people and for choosing one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterSummary {
    /// Number by which [`DeviceChoice::Named`] can name it.
    pub index: usize,
    /// Name the driver gives it.
    pub name: String,
    /// Graphics interface in use: `vulkan`, `metal` or `dx12`.
    pub api: &'static str,
    /// `discrete`, `integrated`, `virtual`, `cpu` or `other`.
    pub kind: &'static str,
    /// Driver and its version.
    pub driver: String,
    /// `deviceUUID` and, on Windows, `deviceLUID` of Vulkan, by which other interfaces name the same device.
    pub ids: DeviceIds,
    /// Whether shaders can compute in half precision.
    pub f16: bool,
    /// Smallest and largest subgroup, if subgroup operations are offered.
    pub subgroup: Option<(u32, u32)>,
    /// Largest buffer, in bytes.
    pub max_buffer_bytes: u64,
    /// Largest part of a buffer that a kernel sees, in bytes; larger weights are split.
    pub max_binding_bytes: u64,
    /// Workgroup memory, in bytes.
    pub workgroup_bytes: u32,
    /// Why the adapter can not be used, if so.
    pub unusable: Option<String>,
}

/// All adapters, the preferred one first; empty if there is no driver.
pub fn adapters() -> Vec<AdapterSummary> {
    enumerate().iter().enumerate().map(|(index, adapter)| summary(index, adapter)).collect()
}

pub(super) fn summary(index: usize, adapter: &wgpu::Adapter) -> AdapterSummary {
    let info = adapter.get_info();
    let limits = adapter.limits();
    let features = adapter.features();
    AdapterSummary {
        index,
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
        api: info.backend.to_str(),
        kind: match info.device_type {
            DeviceType::DiscreteGpu => "discrete",
            DeviceType::IntegratedGpu => "integrated",
            DeviceType::VirtualGpu => "virtual",
            DeviceType::Cpu => "cpu",
            DeviceType::Other => "other",
        },
        f16: features.contains(Features::SHADER_F16),
        subgroup: features.contains(Features::SUBGROUP).then_some((info.subgroup_min_size, info.subgroup_max_size)),
        max_buffer_bytes: limits.max_buffer_size,
        max_binding_bytes: limits.max_storage_buffer_binding_size,
        workgroup_bytes: limits.max_compute_workgroup_storage_size,
        unusable: unusable(adapter),
        ids: ids(adapter),
        name: info.name,
    }
}

#[cfg(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd"))]
fn ids(adapter: &wgpu::Adapter) -> DeviceIds {
    super::vulkan::ids(adapter)
}

#[cfg(not(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd")))]
fn ids(_: &wgpu::Adapter) -> DeviceIds {
    DeviceIds::default()
}

/// Whether the adapter multiplies 16x16x16 matrices in half precision with sums in f32, in subgroups of 32.
pub(super) fn has_matrix_units(adapter: &wgpu::Adapter) -> bool {
    use awqua_shaders::gemm_w4_coop;
    let info = adapter.get_info();
    let limits = adapter.limits();
    let needed = Features::EXPERIMENTAL_COOPERATIVE_MATRIX | Features::SHADER_F16;
    adapter.features().contains(needed)
        && (info.subgroup_min_size, info.subgroup_max_size) == (32, 32)
        && limits.max_compute_workgroup_storage_size >= gemm_w4_coop::MEMORY
        && adapter.cooperative_matrix_properties().iter().any(|p| {
            (p.m_size, p.n_size, p.k_size) == (16, 16, 16)
                && p.ab_type == wgpu::CooperativeScalarType::F16
                && p.cr_type == wgpu::CooperativeScalarType::F32
        })
}

/// Why the kernels can not run there, if so.
fn unusable(adapter: &wgpu::Adapter) -> Option<String> {
    let capabilities = adapter.get_downlevel_capabilities();
    if !capabilities.flags.contains(wgpu::DownlevelFlags::COMPUTE_SHADERS) {
        return Some("it offers no compute shaders".to_owned());
    }
    lacks(&adapter.limits())
}

/// What the limits lack for the kernels, if so.
pub(super) fn lacks(limits: &Limits) -> Option<String> {
    let needs = [
        ("storage buffers", limits.max_storage_buffers_per_shader_stage, STORAGE_BUFFERS),
        ("bytes of workgroup memory", limits.max_compute_workgroup_storage_size, WORKGROUP_BYTES),
        ("invocations a workgroup", limits.max_compute_invocations_per_workgroup, INVOCATIONS),
    ];
    needs
        .iter()
        .find(|(_, has, needed)| has < needed)
        .map(|(what, has, needed)| format!("it offers {has} {what}, {needed} are needed"))
}

/// The instance of the process, made on first use; `None` where no graphics interface is compiled in. It is shared and
/// never dropped: a driver may give out only some dozens of them in the life of a process (NVIDIA 580 on Linux finds no
/// adapter after about forty), and unloading one at exit is where drivers crash.
pub(super) fn instance() -> Option<&'static wgpu::Instance> {
    static INSTANCE: OnceLock<wgpu::Instance> = OnceLock::new();
    // Creating an instance without any compiled-in graphics interface panics.
    if wgpu::Instance::enabled_backend_features().is_empty() {
        return None;
    }
    Some(INSTANCE.get_or_init(|| {
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
        descriptor.backends = Backends::PRIMARY;
        // The debug layers cost time and print; our own errors come through scopes and the handler.
        descriptor.flags = wgpu::InstanceFlags::VALIDATION_INDIRECT_CALL;
        descriptor.memory_budget_thresholds.for_resource_creation = Some(BUDGET_PERCENT);
        wgpu::Instance::new(descriptor)
    }))
}

pub(super) fn enumerate() -> Vec<wgpu::Adapter> {
    let Some(instance) = instance() else { return Vec::new() };
    let mut adapters = pollster::block_on(instance.enumerate_adapters(Backends::PRIMARY));
    adapters.sort_by_key(|adapter| {
        let info = adapter.get_info();
        let kind = match info.device_type {
            DeviceType::DiscreteGpu => 0,
            DeviceType::IntegratedGpu => 1,
            DeviceType::VirtualGpu => 2,
            DeviceType::Other => 3,
            DeviceType::Cpu => 4,
        };
        // The same GPU appears once per interface on Windows; Vulkan has the more complete shader features.
        (kind, info.backend == wgpu::Backend::Dx12)
    });
    adapters
}

/// Index of the adapter that is meant.
///
/// # Errors
/// [`ErrorKind::NoDevice`] saying what there is.
pub(super) fn select(adapters: &[AdapterSummary], choice: &DeviceChoice) -> Result<usize> {
    let none = |message: String| Err(Error::new(ErrorKind::NoDevice, message));
    if adapters.is_empty() {
        return none("no GPU adapter found; is a Vulkan, Metal or Direct3D 12 driver installed?".to_owned());
    }
    let usable = |a: &&AdapterSummary| a.unusable.is_none();
    let found = match choice {
        DeviceChoice::Named(text) => match text.parse::<usize>() {
            Ok(index) => adapters.get(index),
            Err(_) => {
                let text = text.to_lowercase();
                adapters.iter().find(|a| a.name.to_lowercase().contains(&text))
            }
        },
        DeviceChoice::Uuid(uuid) => adapters.iter().find(|a| a.ids.uuid.as_ref() == Some(uuid)),
        DeviceChoice::Luid(luid) => adapters.iter().find(|a| a.ids.luid.as_ref() == Some(luid)),
        _ => adapters.iter().find(usable).or(adapters.first()),
    };
    let Some(found) = found else {
        let names: Vec<_> = adapters.iter().map(|a| format!("{}: `{}`", a.index, a.name)).collect();
        return none(format!("no adapter matches {choice}; found [{}]", names.join(", ")));
    };
    match &found.unusable {
        Some(reason) => none(format!("`{}` can not be used: {reason}", found.name)),
        None => Ok(found.index),
    }
}
