//! Any GPU through wgpu: Vulkan, Metal or Direct3D 12.
//!
//! `device` opens an adapter and turns its failures into errors, `pipelines` compiles kernels, `weights` lays matrices
//! out, `memory` is what a session holds there,
//! `pace` estimates how long work takes, `plan` turns a program into bind groups and uniform blocks once, `run` encodes and submits one step of it,
//! and `sampling` picks tokens without reading logits back. `selftest` decides which kernel variants can be trusted.

use std::sync::Arc;

use awqua_shaders::{Elem, Reduce, Size};

use super::{Backend, BackendInfo, KvType, Program, Runner, RunnerConfig, WeightId};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{Weight, WeightShape};

mod device;
mod memory;
mod pace;
mod pipelines;
mod plan;
mod profile;
mod readback;
mod run;
mod sampling;
mod selftest;
mod weights;

pub use device::{AdapterSummary, adapters};

use device::Gpu;
use pipelines::Pipelines;
use weights::GpuWeight;

/// What to open and which kernel variants to allow.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WgpuOptions {
    /// Part of the adapter's name, or its number in [`adapters`]; `None` takes the preferred one.
    pub device: Option<String>,
    /// Compute in single precision even where half precision is offered.
    pub force_f32: bool,
    /// Do without subgroup operations even where they are offered.
    pub force_no_subgroup: bool,
    /// Bytes of a buffer that kernels may see at once, if less than the device allows; splits weights accordingly.
    pub limit_binding: Option<u64>,
    /// Multiplications and additions after which a submission ends, so that others get their turn on the device;
    /// `None` takes some tens of milliseconds' worth.
    pub submission_flops: Option<u64>,
}

/// Opens the adapter that `options` name, or the preferred one, and checks its arithmetic.
///
/// # Errors
/// [`ErrorKind::NoDevice`] if no adapter fits, [`ErrorKind::Device`] if its driver fails or computes wrongly.
pub fn open(options: &WgpuOptions) -> Result<Box<dyn Backend>> {
    Ok(Box::new(WgpuBackend::open(options)?))
}

/// The weights of one model on one GPU.
pub struct WgpuBackend {
    gpu: Gpu,
    pipelines: Pipelines,
    elem: Elem,
    reduce: Reduce,
    size: Size,
    coop: bool,
    variant: String,
    weights: Vec<GpuWeight>,
    /// Rows of the last weight that came so far.
    filled: usize,
    weight_bytes: u64,
}

impl WgpuBackend {
    /// As [`open`].
    ///
    /// # Errors
    /// As [`open`].
    pub fn open(options: &WgpuOptions) -> Result<Self> {
        let gpu = Gpu::open(options)?;
        let pipelines = Pipelines::default();
        let choice = selftest::choose(&gpu, &pipelines, options)?;
        Ok(Self {
            gpu,
            pipelines,
            elem: choice.elem,
            reduce: choice.reduce,
            size: choice.size,
            coop: choice.coop,
            variant: choice.reason,
            weights: Vec::new(),
            filled: 0,
            weight_bytes: 0,
        })
    }

    /// Destroys the device and frees its memory at once; the sessions on it fail with [`ErrorKind::DeviceLost`].
    pub fn destroy(&self) {
        self.gpu.destroy();
    }

    fn weight(&self, id: WeightId) -> Result<&GpuWeight> {
        self.weights
            .get(id.0 as usize)
            .ok_or_else(|| Error::new(ErrorKind::InvalidInput, format!("the backend holds no weight {}", id.0)))
    }
}

impl Backend for WgpuBackend {
    fn info(&self) -> BackendInfo {
        BackendInfo {
            backend: "wgpu",
            device: format!("{} ({})", self.gpu.summary.name, self.gpu.summary.api),
            variant: self.variant.clone(),
            default_kv: KvType::F16,
            weight_bytes: self.weight_bytes,
        }
    }

    fn reserve(&mut self, name: &str, shape: &WeightShape) -> Result<WeightId> {
        let id = u32::try_from(self.weights.len())
            .map_err(|_| Error::new(ErrorKind::Unsupported, "too many weights".to_owned()))?;
        self.weights.push(GpuWeight::reserve(&self.gpu, name, shape)?);
        self.filled = 0;
        self.weight_bytes += weights::bytes(shape);
        Ok(WeightId(id))
    }

    fn fill(&mut self, id: WeightId, rows: Weight) -> Result<()> {
        let last = self.weights.len().checked_sub(1);
        let count = rows.shape().rows();
        match self.weights.get_mut(id.0 as usize) {
            Some(weight) if last == Some(id.0 as usize) && self.filled + count <= weight.rows() => {
                weight.fill(&self.gpu, self.filled, &rows)?;
                self.filled += count;
                Ok(())
            }
            _ => Err(Error::new(ErrorKind::InvalidInput, format!("weight {} takes no {count} rows", id.0))),
        }
    }

    fn weight_bytes(&self, shape: &WeightShape) -> u64 {
        weights::bytes(shape)
    }

    fn upload_is_settled(&self) -> Result<bool> {
        self.gpu.is_idle()
    }

    fn wait(&self) -> Result<()> {
        self.gpu.wait_for_any()
    }

    fn runner(self: Arc<Self>, program: &Arc<Program>, config: &RunnerConfig) -> Result<Box<dyn Runner>> {
        Ok(Box::new(run::WgpuRunner::new(self, program, config)?))
    }

    fn force_loss(&self) {
        self.destroy();
    }
}
