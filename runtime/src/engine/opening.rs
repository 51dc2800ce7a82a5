//! Which device an engine opens.

use std::sync::Arc;

use super::{BackendChoice, EngineOptions, Ready};
use crate::backend::cpu::Processor;
use crate::backend::wgpu::{self, WgpuOptions};
use crate::backend::{Device, Opening};
use crate::error::Result;

pub use crate::backend::wgpu::DeviceChoice;

impl DeviceChoice {
    /// Whether it means one device only: naming it is asking for it.
    pub(super) fn is_asked_for(&self) -> bool {
        !matches!(self, Self::Best)
    }

    /// Whether the device is the host's.
    pub(super) fn is_shared(&self) -> bool {
        matches!(self, Self::Shared(_) | Self::Adopted(_))
    }
}

/// Whether models will be computed on the host.
pub(super) fn on_host(options: &EngineOptions, choice: &DeviceChoice) -> bool {
    match options.backend {
        BackendChoice::Cpu => true,
        BackendChoice::Wgpu | BackendChoice::Cuda => false,
        BackendChoice::Auto => !choice.is_asked_for() && !has_hardware(),
    }
}

fn has_hardware() -> bool {
    wgpu::adapters().iter().any(|a| a.kind != "cpu" && a.unusable.is_none())
}

/// Bytes that a weight and a session take on a GPU, and how many tokens a session computes at a time there at most.
pub(crate) use crate::backend::wgpu::{DISCRETE_CHUNK as MOST_CHUNK, runner_bytes, weight_bytes};

/// The CPU.
pub(super) fn processor(options: &EngineOptions) -> Box<dyn Opening> {
    let device: Arc<dyn Device> = Arc::new(Processor { portable: options.portable_kernels });
    Box::new(Ready(Some(device)))
}

/// Begins to open what `options` say, `choice` among the GPUs.
pub(super) fn begin(options: &EngineOptions, choice: &DeviceChoice) -> Result<Box<dyn Opening>> {
    let gpu = || {
        wgpu::begin_open(WgpuOptions {
            device: choice.clone(),
            force_f32: options.portable_kernels,
            force_no_subgroup: options.portable_kernels,
            pipeline_cache: options.pipeline_cache.clone(),
            tuning: options.tuning.clone(),
            ..WgpuOptions::default()
        })
    };
    Ok(match options.backend {
        BackendChoice::Cpu => processor(options),
        BackendChoice::Wgpu | BackendChoice::Cuda => gpu(),
        BackendChoice::Auto if choice.is_asked_for() => gpu(),
        BackendChoice::Auto if has_hardware() => gpu(),
        BackendChoice::Auto => processor(options),
    })
}
