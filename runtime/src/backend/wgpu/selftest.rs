//! Which kernel variants to trust: of what the device offers, the first that computes as the kernels' CPU twins do.
//!
//! Drivers do offer half precision or subgroup operations that go wrong in some shader; a model that talks nonsense
//! is the worst way to find out.

use awqua_shaders::{
    Elem, Kernel, Reduce, Rng, Size, Trial, Variant, attention, attention_coop, gemm_w4, gemm_w4_coop, gemv_w4, norm,
    uniform_bytes,
};
use wgpu::{BufferUsages, Features};

use super::WgpuOptions;
use super::device::Gpu;
use super::pipelines::Pipelines;
use super::readback::Readback;
use crate::error::{Error, ErrorKind, Result};

/// Kernels that together use every variant axis and the features that go wrong most.
static KERNELS: [&Kernel; 4] = [&norm::KERNEL, &gemv_w4::KERNEL, &gemm_w4::KERNEL, &attention::KERNEL];

/// The variants in use.
pub(super) struct Choice {
    pub(super) elem: Elem,
    pub(super) reduce: Reduce,
    pub(super) size: Size,
    /// Whether large products run on matrix units.
    pub(super) coop: bool,
    /// What was chosen and why, for people.
    pub(super) reason: String,
}

/// Chooses the fastest variants that the device offers, `options` allow and the trials confirm.
///
/// # Errors
/// [`ErrorKind::Device`] if even the plainest variant computes wrongly, or a device error.
pub(super) fn choose(gpu: &Gpu, pipelines: &Pipelines, options: &WgpuOptions) -> Result<Choice> {
    let f16 = gpu.features.contains(Features::SHADER_F16) && !options.force_f32;
    let subgroup = gpu.features.contains(Features::SUBGROUP) && !options.force_no_subgroup;
    let candidates = [
        (f16 && subgroup, Elem::F16, Reduce::Subgroup),
        (subgroup, Elem::F32, Reduce::Subgroup),
        (f16, Elem::F16, Reduce::Workgroup),
        (true, Elem::F32, Reduce::Workgroup),
    ];
    // Elsewhere nobody has measured yet that large workgroups pay.
    let fits = |size: &Size| size.invocations() <= gpu.limits.max_compute_invocations_per_workgroup;
    let size = match gpu.summary.kind {
        "discrete" => [Size::Large, Size::Medium].into_iter().find(fits).unwrap_or(Size::Small),
        _ => Size::Small,
    };
    let mut refused = String::new();
    for (_, elem, reduce) in candidates.into_iter().filter(|(offered, ..)| *offered) {
        let name = match (elem, reduce) {
            (Elem::F16, Reduce::Subgroup) => "f16 with subgroups",
            (Elem::F32, Reduce::Subgroup) => "f32 with subgroups",
            (Elem::F16, Reduce::Workgroup) => "f16",
            (Elem::F32, Reduce::Workgroup) => "f32",
        };
        let variant = Variant { elem, reduce, size, ..Variant::default() };
        match KERNELS.iter().try_for_each(|kernel| check(gpu, pipelines, kernel, variant)) {
            Ok(()) => {
                let mut coop = elem == Elem::F16 && gpu.features.contains(Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
                let kernels = [&gemm_w4_coop::KERNEL, &attention_coop::KERNEL];
                if coop && let Err(error) = kernels.iter().try_for_each(|kernel| check(gpu, pipelines, kernel, variant))
                {
                    coop = false;
                    refused += &format!("; matrix units refused: {}", error.message());
                }
                let units = if coop { " and matrix units" } else { "" };
                return Ok(Choice { elem, reduce, size, coop, reason: format!("{name}{units}{refused}") });
            }
            Err(error) if error.kind() == ErrorKind::DeviceLost => return Err(error),
            Err(error) => refused += &format!("; {name} refused: {}", error.message()),
        }
    }
    let message = format!("`{}` fails the self-test{refused}", gpu.summary.name);
    Err(Error::new(ErrorKind::Device, message))
}

/// Runs the trials of `kernel` and compares.
fn check(gpu: &Gpu, pipelines: &Pipelines, kernel: &'static Kernel, variant: Variant) -> Result<()> {
    let fits = |trial: &Trial| {
        let bytes = trial.storage.iter().map(|words| words.len() as u64 * 4).max().unwrap_or(0);
        bytes <= gpu.limits.max_storage_buffer_binding_size
    };
    for trial in (kernel.trials)(variant, &mut Rng::new(1)).into_iter().filter(fits) {
        if let Some(mismatch) = run(gpu, pipelines, kernel, variant, &trial)? {
            let message = format!("{}, {}: {mismatch}", kernel.label(variant), trial.label);
            return Err(Error::new(ErrorKind::Device, message));
        }
    }
    Ok(())
}

/// Runs one trial; returns the first difference from what its twin expects.
fn run(
    gpu: &Gpu,
    pipelines: &Pipelines,
    kernel: &'static Kernel,
    variant: Variant,
    trial: &Trial,
) -> Result<Option<String>> {
    let pipeline = pipelines.get(gpu, kernel, variant)?;
    let filled = |bytes: &[u8], usage| {
        let buffer = gpu.buffer("a trial", bytes.len() as u64, usage | BufferUsages::COPY_DST)?;
        gpu.queue.write_buffer(&buffer, 0, bytes);
        Ok::<_, Error>(buffer)
    };
    let params = filled(&trial.params, BufferUsages::UNIFORM)?;
    let step = filled(uniform_bytes(&trial.step), BufferUsages::UNIFORM)?;
    let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC;
    let storage: Vec<_> =
        trial.storage.iter().map(|words| filled(bytemuck::cast_slice(words), usage)).collect::<Result<_>>()?;
    let largest = trial.storage.iter().map(|words| words.len() as u64 * 4).max().unwrap_or(0);
    let readback = Readback::new(gpu, largest)?;

    let mut dispatched = false;
    for expected in &trial.expected {
        let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("trial") });
        if !dispatched {
            let params = params.as_entire_buffer_binding();
            let bind_group = gpu.scoped("a trial", 0, || pipeline.bind(gpu, params, &step, &storage))?;
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            pass.set_pipeline(&pipeline.compute);
            pass.set_bind_group(0, &bind_group, &[]);
            let [x, y, z] = trial.grid;
            pass.dispatch_workgroups(x, y, z);
            dispatched = true;
        }
        // Storage bindings start at 2.
        let Some(at) = (expected.binding as usize).checked_sub(2).filter(|at| *at < storage.len()) else { continue };
        let bytes = trial.storage[at].len() as u64 * 4;
        let mut mismatch = None;
        readback.submit_and_read(gpu, encoder, (&storage[at], 0), bytes, |found| {
            let words: Vec<u32> = found.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
            mismatch = expected.mismatch(&words);
        })?;
        if mismatch.is_some() {
            return Ok(mismatch);
        }
    }
    Ok(None)
}
