//! Compute pipelines, made when first asked for; layouts come from the kernel catalogue alone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use awqua_shaders::catalogue::{Binding, BindingKind};
use awqua_shaders::{ENTRY_POINT, Kernel, Variant, compose};

use super::device::{Gpu, lock};
use crate::checksum::Checksum;
use crate::error::Result;

/// A kernel variant ready to dispatch.
pub(super) struct Pipeline {
    pub(super) compute: wgpu::ComputePipeline,
    pub(super) bindings: &'static [Binding],
    layout: wgpu::BindGroupLayout,
    label: String,
}

/// First bytes of a saved cache; the checksum of the rest follows.
const SAVED: &[u8; 8] = b"awqpipe1";

/// The pipelines of one device.
pub(super) struct Pipelines {
    made: Mutex<HashMap<(&'static str, Variant), Arc<Pipeline>>>,
    cache: Option<wgpu::PipelineCache>,
}

impl Pipelines {
    /// None yet; `saved` is what [`Self::save`] gave at an earlier start, and ignored if it is anything else.
    pub(super) fn new(gpu: &Gpu, saved: Option<&[u8]>) -> Self {
        let data = saved.and_then(|saved| {
            let rest = saved.strip_prefix(SAVED)?;
            let (sum, data) = rest.split_first_chunk()?;
            (u64::from_le_bytes(*sum) == checksum(data)).then_some(data)
        });
        let cache = gpu.features.contains(wgpu::Features::PIPELINE_CACHE).then(|| {
            let descriptor = wgpu::PipelineCacheDescriptor { label: Some("awqua"), data, fallback: true };
            // SAFETY: the data comes from `get_data`, as far as its mark and checksum can tell, which are there to catch
            // accidents; that nobody forges them is what `LoadOptions::pipeline_cache` asks for. wgpu checks device and
            // driver itself.
            gpu.scoped("the pipeline cache", 0, || unsafe { gpu.device.create_pipeline_cache(&descriptor) }).ok()
        });
        Self { made: Mutex::default(), cache: cache.flatten() }
    }

    /// The compiled pipelines for a later start, if the device gives them out.
    pub(super) fn save(&self) -> Option<Vec<u8>> {
        let data = self.cache.as_ref()?.get_data()?;
        Some([&SAVED[..], &checksum(&data).to_le_bytes(), &data].concat())
    }

    /// Whether the pipeline is compiled.
    pub(super) fn has(&self, kernel: &'static Kernel, variant: Variant) -> bool {
        lock(&self.made).contains_key(&(kernel.name, kernel.canonical(variant)))
    }

    /// The pipeline of `kernel`, compiled now if nobody asked before.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Device`] if the driver refuses the shader.
    pub(super) fn get(&self, gpu: &Gpu, kernel: &'static Kernel, variant: Variant) -> Result<Arc<Pipeline>> {
        let variant = kernel.canonical(variant);
        let mut made = lock(&self.made);
        if let Some(pipeline) = made.get(&(kernel.name, variant)) {
            return Ok(pipeline.clone());
        }
        let pipeline = Arc::new(compile(gpu, kernel, variant, self.cache.as_ref())?);
        made.insert((kernel.name, variant), pipeline.clone());
        Ok(pipeline)
    }
}

impl Pipeline {
    /// Kernel and variant.
    pub(super) fn label(&self) -> &str {
        &self.label
    }

    /// Binds the uniforms and, in the order of the bindings, the whole of the `storage` buffers.
    pub(super) fn bind(
        &self,
        gpu: &Gpu,
        params: wgpu::BufferBinding<'_>,
        step: &wgpu::Buffer,
        storage: &[wgpu::Buffer],
    ) -> wgpu::BindGroup {
        let mut storage = storage.iter();
        let entries: Vec<_> = self
            .bindings
            .iter()
            .map(|binding| wgpu::BindGroupEntry {
                binding: binding.index,
                resource: match (binding.kind, binding.index) {
                    (BindingKind::Uniform, 0) => wgpu::BindingResource::Buffer(params.clone()),
                    (BindingKind::Uniform, _) => step.as_entire_binding(),
                    _ => storage.next().expect("a buffer for every storage binding").as_entire_binding(),
                },
            })
            .collect();
        assert!(storage.next().is_none(), "more buffers than {} binds", self.label);
        gpu.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(&self.label),
            layout: &self.layout,
            entries: &entries,
        })
    }
}

fn compile(
    gpu: &Gpu,
    kernel: &'static Kernel,
    variant: Variant,
    cache: Option<&wgpu::PipelineCache>,
) -> Result<Pipeline> {
    let bindings = kernel.catalogue().bindings;
    let label = kernel.label(variant);
    let entries: Vec<_> = bindings.iter().map(layout_entry).collect();
    gpu.scoped(&label, 0, || {
        let device = &gpu.device;
        let source = wgpu::ShaderModuleDescriptor {
            label: Some(&label),
            source: wgpu::ShaderSource::Wgsl(compose(kernel, variant).into()),
        };
        // SAFETY: without run-time checks an index beyond its buffer is undefined behaviour. The shaders are ours, their
        // indices follow from the uniform blocks, which the planner makes from the sizes of the very buffers it binds,
        // and from a step that was checked against the capacities; token ids are below the vocabulary size. Their loops
        // end and their divisors come from those blocks. The trials run every kernel with the checks on.
        let module = unsafe { device.create_shader_module_trusted(source, wgpu::ShaderRuntimeChecks::unchecked()) };
        let layout = device
            .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(&label), entries: &entries });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(&label),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let compute = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(&label),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some(ENTRY_POINT),
            // Every kernel writes its workgroup memory before it reads it.
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache,
        });
        (compute, layout)
    })
    .map(|(compute, layout)| Pipeline { compute, bindings, layout, label: label.clone() })
}

fn layout_entry(binding: &Binding) -> wgpu::BindGroupLayoutEntry {
    let ty = match binding.kind {
        BindingKind::Uniform => wgpu::BufferBindingType::Uniform,
        BindingKind::StorageRead => wgpu::BufferBindingType::Storage { read_only: true },
        BindingKind::StorageReadWrite => wgpu::BufferBindingType::Storage { read_only: false },
    };
    wgpu::BindGroupLayoutEntry {
        binding: binding.index,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty,
            has_dynamic_offset: false,
            min_binding_size: wgpu::BufferSize::new(u64::from(binding.min_size)),
        },
        count: None,
    }
}

fn checksum(data: &[u8]) -> u64 {
    let mut sum = Checksum::default();
    sum.add(data);
    sum.finish()
}
