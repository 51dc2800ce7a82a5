//! Which kernel variants to trust: what the device offers, and of that what computes right on it.

use awqua_shaders::{Elem, Reduce};

use super::WgpuOptions;
use super::device::Gpu;
use super::pipelines::Pipelines;
use crate::error::Result;

/// The variants in use.
pub(super) struct Choice {
    pub(super) elem: Elem,
    pub(super) reduce: Reduce,
    /// What was chosen and why, for people.
    pub(super) reason: String,
}

/// Chooses.
pub(super) fn choose(gpu: &Gpu, _pipelines: &Pipelines, options: &WgpuOptions) -> Result<Choice> {
    let elem =
        if gpu.features.contains(wgpu::Features::SHADER_F16) && !options.force_f32 { Elem::F16 } else { Elem::F32 };
    let reduce = if gpu.features.contains(wgpu::Features::SUBGROUP) && !options.force_no_subgroup {
        Reduce::Subgroup
    } else {
        Reduce::Workgroup
    };
    Ok(Choice { elem, reduce, reason: format!("{elem:?} {reduce:?}") })
}
