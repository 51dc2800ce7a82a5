//! Every kernel, variant and case on every adapter of this machine, against the CPU twins, with fresh random data.
//!
//! `AWQUA_SEED` repeats a run, `AWQUA_KERNELS=TEXT` keeps to labels with that text, `AWQUA_REQUIRE_GPU=1` makes a machine
//! without an adapter fail instead of skip.
#![cfg(feature = "wgpu")]
#![allow(clippy::print_stderr, reason = "a skip must be seen, and a failure must name its seed")]

use std::time::{SystemTime, UNIX_EPOCH};

use awqua_shaders::catalogue::BindingKind;
use awqua_shaders::{ALL, ENTRY_POINT, Elem, Kernel, Reduce, Rng, Trial, Variant, compose, uniform_bytes};
use wgpu::util::{BufferInitDescriptor, DeviceExt};

#[test]
fn kernels_match_their_twins() {
    let seed = std::env::var("AWQUA_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(fresh_seed);
    eprintln!("AWQUA_SEED={seed}");
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    if adapters.is_empty() {
        assert!(std::env::var("AWQUA_REQUIRE_GPU").as_deref() != Ok("1"), "AWQUA_REQUIRE_GPU=1 and no adapter found");
        eprintln!("SKIPPED kernels_match_their_twins: no adapter");
        return;
    }
    let asked = std::env::var("AWQUA_KERNELS").unwrap_or_default();
    let mut failures = Vec::new();
    for adapter in adapters {
        let harness = Harness::new(&adapter);
        let mut runs = 0;
        for kernel in ALL {
            for variant in kernel.variants() {
                let label = kernel.label(variant);
                if !label.contains(&asked) {
                    continue;
                }
                if !harness.supports(kernel, variant) {
                    eprintln!("SKIPPED {label} on {}: the adapter lacks its features", harness.name);
                    continue;
                }
                let pipeline = harness.pipeline(kernel, variant);
                for trial in (kernel.trials)(variant, &mut Rng::new(seed)) {
                    let buffers = harness.run(kernel, &pipeline, &trial);
                    for expected in &trial.expected {
                        if let Some(mismatch) = expected.mismatch(&buffers[expected.binding as usize - 2]) {
                            failures.push(format!("{}: {label}: {}: {mismatch}", harness.name, trial.label));
                        }
                    }
                    runs += 1;
                }
            }
        }
        eprintln!("{}: {runs} runs", harness.name);
    }
    assert!(failures.is_empty(), "AWQUA_SEED={seed}, {} failures:\n{}", failures.len(), failures.join("\n"));
}

fn fresh_seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |now| now.as_nanos() as u64)
}

/// A device and the least that runs one dispatch.
struct Harness {
    name: String,
    device: wgpu::Device,
    queue: wgpu::Queue,
}

impl Harness {
    fn new(adapter: &wgpu::Adapter) -> Self {
        let wanted = wgpu::Features::SHADER_F16 | wgpu::Features::SUBGROUP | wgpu::Features::SUBGROUP_BARRIER;
        // The matrix kernel needs this shape; others have the feature without it.
        let coop = adapter.cooperative_matrix_properties().iter().any(|p| {
            (p.m_size, p.n_size, p.k_size) == (16, 16, 16)
                && p.ab_type == wgpu::CooperativeScalarType::F16
                && p.cr_type == wgpu::CooperativeScalarType::F32
        });
        let coop = if coop { wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX } else { wgpu::Features::empty() };
        let descriptor = wgpu::DeviceDescriptor {
            required_features: adapter.features() & (wanted | coop),
            // SAFETY: a test of the kernel that uses the one experimental feature asked for, on drivers that report it.
            experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
            required_limits: adapter.limits(),
            ..Default::default()
        };
        let info = adapter.get_info();
        let (device, queue) =
            pollster::block_on(adapter.request_device(&descriptor)).expect("an adapter gives a device with its limits");
        Self { name: format!("{} ({:?})", info.name, info.backend), device, queue }
    }

    fn supports(&self, kernel: &Kernel, variant: Variant) -> bool {
        let has = |feature| self.device.features().contains(feature);
        let subgroups = wgpu::Features::SUBGROUP | wgpu::Features::SUBGROUP_BARRIER;
        let coop = has(wgpu::Features::SHADER_F16 | wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | subgroups);
        (!kernel.needs_coop() || coop)
            && (variant.elem == Elem::F32 || has(wgpu::Features::SHADER_F16))
            && (variant.reduce == Reduce::Workgroup || has(wgpu::Features::SUBGROUP))
            && variant.size.invocations() <= self.device.limits().max_compute_invocations_per_workgroup
    }

    /// The pipeline over a layout made only from the catalogue.
    fn pipeline(&self, kernel: &Kernel, variant: Variant) -> wgpu::ComputePipeline {
        let label = kernel.label(variant);
        let entries: Vec<wgpu::BindGroupLayoutEntry> = kernel
            .catalogue()
            .bindings
            .iter()
            .map(|binding| wgpu::BindGroupLayoutEntry {
                binding: binding.index,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: match binding.kind {
                        BindingKind::Uniform => wgpu::BufferBindingType::Uniform,
                        BindingKind::StorageRead => wgpu::BufferBindingType::Storage { read_only: true },
                        BindingKind::StorageReadWrite => wgpu::BufferBindingType::Storage { read_only: false },
                    },
                    has_dynamic_offset: false,
                    min_binding_size: std::num::NonZeroU64::new(binding.min_size.into()),
                },
                count: None,
            })
            .collect();
        let group = self
            .device
            .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(&label), entries: &entries });
        let layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(&label),
            bind_group_layouts: &[Some(&group)],
            immediate_size: 0,
        });
        let module = self.device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some(&label),
            source: wgpu::ShaderSource::Wgsl(compose(kernel, variant).into()),
        });
        self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(&label),
            layout: Some(&layout),
            module: &module,
            entry_point: Some(ENTRY_POINT),
            compilation_options: Default::default(),
            cache: None,
        })
    }

    /// Runs a trial and returns the words of its storage buffers afterwards.
    fn run(&self, kernel: &Kernel, pipeline: &wgpu::ComputePipeline, trial: &Trial) -> Vec<Vec<u32>> {
        let buffer = |contents: &[u8], usage| {
            self.device.create_buffer_init(&BufferInitDescriptor { label: Some(kernel.name), contents, usage })
        };
        let params = buffer(&trial.params, wgpu::BufferUsages::UNIFORM);
        let step = buffer(uniform_bytes(&trial.step), wgpu::BufferUsages::UNIFORM);
        let storage: Vec<wgpu::Buffer> = trial
            .storage
            .iter()
            .map(|words| {
                let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                buffer(&bytes, wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC)
            })
            .collect();
        let entries: Vec<wgpu::BindGroupEntry> = kernel
            .catalogue()
            .bindings
            .iter()
            .map(|binding| wgpu::BindGroupEntry {
                binding: binding.index,
                resource: match binding.index {
                    0 => params.as_entire_binding(),
                    1 => step.as_entire_binding(),
                    index => storage[index as usize - 2].as_entire_binding(),
                },
            })
            .collect();
        let group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(kernel.name),
            layout: &pipeline.get_bind_group_layout(0),
            entries: &entries,
        });
        let mut encoder = self.device.create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(pipeline);
        pass.set_bind_group(0, &group, &[]);
        let [x, y, z] = trial.grid;
        pass.dispatch_workgroups(x, y, z);
        drop(pass);
        let readback: Vec<wgpu::Buffer> = storage
            .iter()
            .map(|source| {
                let target = self.device.create_buffer(&wgpu::BufferDescriptor {
                    label: Some("readback"),
                    size: source.size(),
                    usage: wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ,
                    mapped_at_creation: false,
                });
                encoder.copy_buffer_to_buffer(source, 0, &target, 0, source.size());
                target
            })
            .collect();
        self.queue.submit([encoder.finish()]);
        for target in &readback {
            target.map_async(wgpu::MapMode::Read, .., |result| result.expect("a readback buffer maps"));
        }
        self.device.poll(wgpu::PollType::wait_indefinitely()).expect("the device finishes");
        readback
            .iter()
            .map(|target| {
                let view = target.get_mapped_range(..).expect("the buffer is mapped");
                view.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            })
            .collect()
    }
}
