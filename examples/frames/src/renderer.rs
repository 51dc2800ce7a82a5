//! A stand-in for a game's renderer: passes of full-screen overdraw, as many as take the wanted time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use awqua::backend::wgpu::SharedGpu;

use crate::{FRAME, Outcome};

/// Passes of a frame, as shadows, geometry, lights and effects of a game are.
const PASSES: u32 = 20;
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
    clock: Option<Clock>,
    /// Triangles of a frame, drawn over each other in its passes.
    layers: u32,
    took: Duration,
}

/// What the GPU says of the time between the first and the last pass of a frame.
struct Clock {
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    readable: wgpu::Buffer,
    /// Seconds of a tick of its clock.
    period: f64,
}

impl Clock {
    fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Option<Self> {
        device.features().contains(wgpu::Features::TIMESTAMP_QUERY).then(|| {
            let buffer = |usage| {
                device.create_buffer(&wgpu::BufferDescriptor {
                    label: Some("times of a frame"),
                    size: 16,
                    usage,
                    mapped_at_creation: false,
                })
            };
            Self {
                queries: device.create_query_set(&wgpu::QuerySetDescriptor {
                    label: Some("times of a frame"),
                    ty: wgpu::QueryType::Timestamp,
                    count: 2,
                }),
                resolved: buffer(wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC),
                readable: buffer(wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST),
                period: f64::from(queue.get_timestamp_period()) * 1e-9,
            }
        })
    }

    /// The time of the frame that was waited for.
    fn read(&self, device: &wgpu::Device) -> Outcome<Option<Duration>> {
        let is_mapped = Arc::new(AtomicBool::new(false));
        let told = is_mapped.clone();
        self.readable.map_async(wgpu::MapMode::Read, .., move |found| told.store(found.is_ok(), Ordering::Release));
        // Its submission is done, so this does not wait, and least of all for what is queued behind the frame.
        device.poll(wgpu::PollType::Poll)?;
        let ticks = match is_mapped.load(Ordering::Acquire) {
            true => {
                let view = self.readable.get_mapped_range(..)?;
                let tick = |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes).unwrap_or_default();
                tick(&view[8..]).checked_sub(tick(&view[..8]))
            }
            false => None,
        };
        self.readable.unmap();
        Ok(ticks.and_then(|ticks| Duration::try_from_secs_f64(ticks as f64 * self.period).ok()))
    }
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
        let clock = Clock::new(&device, &queue);
        let mut renderer = Self { device, queue, pipeline, target, size, clock, layers: PASSES, took: Duration::ZERO };
        renderer.calibrate(time)?;
        Ok(renderer)
    }

    /// What it draws, for people.
    pub fn describe(&self) -> String {
        let (width, height) = self.size;
        let took = self.took.as_secs_f64() * 1e3;
        format!("{PASSES} passes with {} layers over {width} x {height} take {took:.2} ms", self.layers)
    }

    /// Submits a frame.
    pub fn draw(&self) -> wgpu::SubmissionIndex {
        let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        for number in 0..PASSES {
            let times = self.clock.as_ref().filter(|_| number == 0 || number + 1 == PASSES);
            let mut pass = encoder.begin_render_pass(&wgpu::RenderPassDescriptor {
                label: None,
                color_attachments: &[Some(wgpu::RenderPassColorAttachment {
                    view: &self.target,
                    depth_slice: None,
                    resolve_target: None,
                    ops: wgpu::Operations { load: wgpu::LoadOp::Load, store: wgpu::StoreOp::Store },
                })],
                depth_stencil_attachment: None,
                timestamp_writes: times.map(|clock| wgpu::RenderPassTimestampWrites {
                    query_set: &clock.queries,
                    beginning_of_pass_write_index: (number == 0).then_some(0),
                    end_of_pass_write_index: (number > 0).then_some(1),
                }),
                occlusion_query_set: None,
                multiview_mask: None,
            });
            pass.set_pipeline(&self.pipeline);
            // What does not come out even goes to the first ones.
            pass.draw(0..3, 0..self.layers / PASSES + u32::from(number < self.layers % PASSES));
        }
        if let Some(clock) = &self.clock {
            encoder.resolve_query_set(&clock.queries, 0..2, &clock.resolved, 0);
            encoder.copy_buffer_to_buffer(&clock.resolved, 0, &clock.readable, 0, 16);
        }
        self.queue.submit([encoder.finish()])
    }

    /// Waits until the GPU has drawn a frame, which was the last one; what its clock says of it, if it has one.
    pub fn wait(&self, frame: wgpu::SubmissionIndex) -> Outcome<Option<Duration>> {
        self.device.poll(wgpu::PollType::Wait { submission_index: Some(frame), timeout: None })?;
        self.clock.as_ref().map_or(Ok(None), |clock| clock.read(&self.device))
    }

    /// Finds the number of layers that take `time` in a loop of 60 Hz: a GPU that rests between frames has another clock
    /// than one that is never idle, and one that was just woken yet another.
    fn calibrate(&mut self, time: Duration) -> Outcome<()> {
        // Each try comes nearer: what is not proportional to the layers matters less and less.
        for attempt in 0..8 {
            let mut took = Vec::new();
            let mut next = Instant::now();
            for _ in 0..if attempt == 0 { 30 } else { 12 } {
                let start = Instant::now();
                self.wait(self.draw())?;
                took.push(start.elapsed());
                next += FRAME;
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
            took.sort();
            self.took = took[took.len() / 2];
            let factor = time.as_secs_f64() / self.took.as_secs_f64().max(1e-6);
            if (0.98..1.02).contains(&factor) && attempt > 0 {
                break;
            }
            self.layers = (f64::from(self.layers) * factor.min(50.0)).round().clamp(1.0, 2e7) as u32;
        }
        Ok(())
    }
}
