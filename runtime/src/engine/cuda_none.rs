//! A build without CUDA.

use super::{BackendChoice, DeviceChoice, EngineOptions};
use crate::backend::{Opening, Program, RunnerConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::WeightShape;

/// See [`crate::backend::Device::default_chunk`].
pub(super) const DEFAULT_CHUNK: u32 = crate::backend::DEFAULT_CHUNK;

/// Whether CUDA was asked for.
pub(super) fn is_chosen(options: &EngineOptions, _: &DeviceChoice) -> bool {
    options.backend == BackendChoice::Cuda
}

/// Refuses.
pub(super) fn begin(_: &EngineOptions, _: &DeviceChoice) -> Result<Box<dyn Opening>> {
    Err(Error::new(ErrorKind::NoDevice, "this build has no CUDA backend (feature `cuda`)"))
}

/// Nothing to check.
pub(super) fn check(_: &Program, _: &[WeightShape]) -> Result<()> {
    Ok(())
}

/// Nothing is there.
pub(super) fn weight_bytes(_: &WeightShape) -> u64 {
    0
}

/// Nothing is there.
pub(super) fn runner_bytes(_: &Program, _: &RunnerConfig) -> u64 {
    0
}
