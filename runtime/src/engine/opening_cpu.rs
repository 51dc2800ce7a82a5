//! Which device an engine opens in a build without GPUs.

use std::sync::Arc;

use super::{BackendChoice, EngineOptions, Ready};
use crate::backend::cpu::Processor;
use crate::backend::{Device, Opening, Program, RunnerConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::WeightShape;

/// Which device is meant; all but the first are of builds with GPUs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The preferred one.
    #[default]
    Best,
    /// By a part of its name, or its number.
    Named(String),
    /// By its `deviceUUID`.
    Uuid([u8; 16]),
    /// By its `deviceLUID`.
    Luid([u8; 8]),
}

impl DeviceChoice {
    /// Whether it means one device only.
    pub(super) fn is_asked_for(&self) -> bool {
        *self != Self::Best
    }

    /// Whether the device is the host's.
    pub(super) fn is_shared(&self) -> bool {
        false
    }
}

/// Whether models will be computed on the host.
pub(super) fn on_host(_: &EngineOptions, _: &DeviceChoice) -> bool {
    true
}

/// See [`Device::default_chunk`].
pub(super) const MOST_CHUNK: u32 = crate::backend::DEFAULT_CHUNK;

/// Bytes that a weight takes on a GPU: none of this build does.
pub(crate) fn weight_bytes(_: &WeightShape) -> u64 {
    0
}

/// Bytes that a session takes on a GPU: none of this build does.
pub(crate) fn runner_bytes(_: &Program, _: &RunnerConfig) -> u64 {
    0
}

/// The CPU.
pub(super) fn processor(options: &EngineOptions) -> Box<dyn Opening> {
    let device: Arc<dyn Device> = Arc::new(Processor { portable: options.portable_kernels });
    Box::new(Ready(Some(device)))
}

/// Begins to open what `options` say.
pub(super) fn begin(options: &EngineOptions, choice: &DeviceChoice) -> Result<Box<dyn Opening>> {
    match options.backend {
        BackendChoice::Cpu => Ok(processor(options)),
        BackendChoice::Auto if !choice.is_asked_for() => Ok(processor(options)),
        _ => Err(Error::new(ErrorKind::NoDevice, "this build has no GPU backend (feature `wgpu`)")),
    }
}
