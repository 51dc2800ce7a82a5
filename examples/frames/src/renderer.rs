//! A stand-in for a game's renderer: passes of full-screen overdraw, as many as take the wanted time.

use std::time::{Duration, Instant};

use awqua::backend::wgpu::SharedGpu;

use crate::Outcome;

/// Passes of a frame, as shadows, geometry, lights and effects of a game are.
const PASSES: usize = 20;
const FORMAT: wgpu::TextureFormat = wgpu::TextureFormat::Rgba8Unorm;

const SHADER: &str = "
@vertex fn triangle(@builtin(vertex_index) i: u32) -> @builtin(position) vec4<f32> {
    return vec4(f32(i / 2u) * 4.0 - 1.0, f32(i % 2u) * 4.0 - 1.0, 0.0, 1.0);
}
@fragment fn shade(@builtin(position) at: vec4<f32>) -> @location(0) vec4<f32> {
    var v = at.xy * 0.01;
    for (var i = 0; i < 16; i++) { v = sin(v.yx * 1.7 + 0.3); }
    return vec4(abs(v), 0.5, 0.1);
}
";

pub struct Renderer {
    device: wgpu::Device,
    queue: wgpu::Queue,
    pipeline: wgpu::RenderPipeline,
    target: wgpu::TextureView,
    size: (u32, u32),
    /// Triangles drawn over each other in a pass.
    layers: u32,
    took: Duration,
}

impl Renderer {
    /// A renderer whose frames take about `time` on the GPU.
    pub fn new(gpu: &SharedGpu, time: Duration) -> Outcome<Self> {
        let (device, queue) = (gpu.device.clone(), gpu.queue.clone());
        let size = if gpu.adapter.get_info().device_type == wgpu::DeviceType::Cpu { (48, 27) } else { (960, 540) };
        let extent = wgpu::Extent3d { width: size.0, height: size.1, depth_or_array_layers: 1 };
        let texture = device.create_texture(&wgpu::TextureDescriptor {
            label: Some("frame"),
            size: extent,
            mip_level_count: 1,
            sample_count: 1,
            dimension: wgpu::TextureDimension::D2,
            format: FORMAT,
            usage: wgpu::TextureUsages::RENDER_ATTACHMENT,
            view_formats: &[],
        });
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some("overdraw"),
            source: wgpu::ShaderSource::Wgsl(SHADER.into()),
        });
        let blended = wgpu::ColorTargetState {
            format: FORMAT,
            blend: Some(wgpu::BlendState::ALPHA_BLENDING),
            write_mask: wgpu::ColorWrites::ALL,
        };
        let pipeline = device.create_render_pipeline(&wgpu::RenderPipelineDescriptor {
            label: Some("overdraw"),
            layout: None,
            vertex: wgpu::VertexState {
                module: &module,
                entry_point: Some("triangle"),
                compilation_options: wgpu::PipelineCompilationOptions::default(),
                buffers: &[],
            },
            primitive: wgpu::PrimitiveState::default(),
            depth_stencil: None,
            multisample: wgpu::MultisampleState::default(),
            fragment: Some(wgpu::FragmentState {
                module: &module,
                entry_point: Some("shade"),
                compilation_options: wgpu::PipelineCompilationOptions::default(),
                targets: &[Some(blended)],
            }),
            multiview_mask: None,
            cache: None,
        });
        let target = texture.create_view(&wgpu::TextureViewDescriptor::default());
        let mut renderer = Self { device, queue, pipeline, target, size, layers: 1, took: Duration::ZERO };
        renderer.calibrate(time)?;
        Ok(renderer)
    }

    /// What it draws, for people.
    pub fn describe(&self) -> String {
        let (width, height) = self.size;
        let took = self.took.as_secs_f64() * 1e3;
        format!("{PASSES} passes of {} layers over {width} x {height} take {took:.2} ms", self.layers)
    }

    /// Submits a frame.
    pub fn draw(&self) -> wgpu::SubmissionIndex {
        let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        for _ in 0..PASSES {
            let mut pass = encoder.begin_render_pass(&wgpu::RenderPassDescriptor {
                label: None,
                color_attachments: &[Some(wgpu::RenderPassColorAttachment {
                    view: &self.target,
                    depth_slice: None,
                    resolve_target: None,
                    ops: wgpu::Operations { load: wgpu::LoadOp::Load, store: wgpu::StoreOp::Store },
                })],
                depth_stencil_attachment: None,
                timestamp_writes: None,
                occlusion_query_set: None,
                multiview_mask: None,
            });
            pass.set_pipeline(&self.pipeline);
            pass.draw(0..3, 0..self.layers);
        }
        self.queue.submit([encoder.finish()])
    }

    /// Waits until the GPU has drawn a frame.
    pub fn wait(&self, frame: wgpu::SubmissionIndex) -> Outcome<()> {
        self.device.poll(wgpu::PollType::Wait { submission_index: Some(frame), timeout: None })?;
        Ok(())
    }

    /// Finds the number of layers that take `time`.
    fn calibrate(&mut self, time: Duration) -> Outcome<()> {
        // Each try comes nearer: what is not proportional to the layers matters less and less.
        for _ in 0..8 {
            let mut took = Vec::new();
            for _ in 0..7 {
                let start = Instant::now();
                self.wait(self.draw())?;
                took.push(start.elapsed());
            }
            took.sort();
            self.took = took[3];
            let factor = time.as_secs_f64() / self.took.as_secs_f64().max(1e-6);
            if (0.97..1.03).contains(&factor) {
                break;
            }
            self.layers = (f64::from(self.layers) * factor.min(50.0)).round().clamp(1.0, 1e6) as u32;
        }
        Ok(())
    }
}
