//! Whether an engine opens an NVIDIA GPU through CUDA.

use super::{BackendChoice, DeviceChoice, EngineOptions};
use crate::backend::cuda::{self, CudaChoice, CudaOptions};
use crate::backend::{Opening, Program, RunnerConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::WeightShape;

/// The device that is meant, if CUDA can know it.
fn device(choice: &DeviceChoice) -> Option<CudaChoice> {
    match choice {
        DeviceChoice::Best => Some(CudaChoice::Best),
        DeviceChoice::Named(name) => Some(CudaChoice::Named(name.clone())),
        DeviceChoice::Uuid(uuid) => Some(CudaChoice::Uuid(*uuid)),
        _ => None,
    }
}

/// Whether CUDA is what `options` and `choice` lead to: asked for, or there and fitting.
pub(super) fn is_chosen(options: &EngineOptions, choice: &DeviceChoice) -> bool {
    let fits = |device: CudaChoice| device.select(&cuda::devices()).is_some_and(|d| d.unusable.is_none());
    match options.backend {
        BackendChoice::Cuda => true,
        BackendChoice::Auto => device(choice).is_some_and(fits),
        BackendChoice::Cpu | BackendChoice::Wgpu => false,
    }
}

/// Begins to open it.
pub(super) fn begin(options: &EngineOptions, choice: &DeviceChoice) -> Result<Box<dyn Opening>> {
    let none = || Error::new(ErrorKind::NoDevice, "CUDA knows devices by name and UUID");
    let device = device(choice).ok_or_else(none)?;
    Ok(cuda::begin_open(CudaOptions {
        device,
        force_portable: options.portable_kernels,
        high_priority: options.high_priority,
        ..CudaOptions::default()
    }))
}

/// Whether it can compute `program` over `weights`.
pub(super) fn check(program: &Program, weights: &[WeightShape]) -> Result<()> {
    cuda::check(program, weights)
}

pub(super) use crate::backend::cuda::DEFAULT_CHUNK;

/// Bytes that a weight takes there.
pub(super) fn weight_bytes(shape: &WeightShape) -> u64 {
    cuda::weight_bytes(shape)
}

/// Bytes that a session takes there at most.
pub(super) fn runner_bytes(program: &Program, config: &RunnerConfig) -> u64 {
    cuda::runner_bytes(program, config)
}
