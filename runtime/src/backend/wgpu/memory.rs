//! What one session holds on the device: activations, KV cache, rotary tables.

use awqua_shaders::attention;
use wgpu::BufferUsages;

use super::device::Gpu;
use crate::backend::{KvType, Op, Program, RunnerConfig};
use crate::error::{Error, ErrorKind, Result};

/// Kernels read activations four elements at a time.
const ROW_ELEMENTS: u32 = 4;

/// An activation buffer: (rows, stride), f32.
pub(super) struct Activation {
    pub(super) buffer: wgpu::Buffer,
    /// Elements from one row to the next.
    pub(super) stride: u32,
}

/// The buffers of one session.
pub(super) struct Memory {
    /// By buffer id.
    pub(super) activations: Vec<Activation>,
    /// (max_tokens) u32.
    pub(super) tokens: wgpu::Buffer,
    /// The step uniform.
    pub(super) step: wgpu::Buffer,
    /// Unnormalised attention of the splits.
    pub(super) partial_out: wgpu::Buffer,
    /// Largest score and sum of the splits.
    pub(super) partial_ml: wgpu::Buffer,
    /// Bound where a kernel reads nothing.
    pub(super) dummy: wgpu::Buffer,
    /// Bound where a kernel writes nothing.
    pub(super) unread: wgpu::Buffer,
    /// Keys and values by layer: (kv_heads, context, head_dim) each.
    caches: Vec<(wgpu::Buffer, wgpu::Buffer)>,
    /// By rotary table: (context, rotary_dim / 2, 2) f32.
    ropes: Vec<wgpu::Buffer>,
    pub(super) context: u32,
    pub(super) kv_type: KvType,
    /// Bytes of all of them.
    pub(super) bytes: u64,
}

impl Memory {
    /// Allocates for the capacities of `config`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] naming the buffer and its bytes, or a device error.
    pub(super) fn new(gpu: &Gpu, program: &Program, config: &RunnerConfig) -> Result<Self> {
        let kv_type = config.kv_type.unwrap_or(KvType::F16);
        let shape = program.attention;
        let size = |factors: &[u32], bytes: u64| factors.iter().fold(bytes, |p, f| p.saturating_mul(u64::from(*f)));
        let cache_bytes = size(&[shape.kv_heads, config.context, shape.head_dim], kv_type.size() as u64);
        gpu.has_room("the KV cache", cache_bytes.saturating_mul(2).saturating_mul(u64::from(program.layers)))?;

        let mut total = 0;
        let mut storage = |what: &str, bytes: u64| {
            let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
            let buffer = gpu.buffer(what, bytes, usage)?;
            total += buffer.size();
            Ok::<_, Error>(buffer)
        };
        let mut activations = Vec::new();
        for desc in &program.buffers {
            let rows = if desc.logits_rows { config.max_logits_rows } else { config.max_tokens };
            let stride = desc.width.checked_next_multiple_of(ROW_ELEMENTS).unwrap_or(u32::MAX);
            let buffer = storage(&format!("activation buffer `{}`", desc.name), size(&[rows, stride], 4))?;
            activations.push(Activation { buffer, stride });
        }
        let caches = (0..program.layers)
            .map(|layer| {
                let what = format!("the KV cache of {} tokens in layer {layer}", config.context);
                Ok((storage(&what, cache_bytes)?, storage(&what, cache_bytes)?))
            })
            .collect::<Result<_>>()?;
        let rope_bytes = size(&[config.context, shape.rotary_dim / 2], 8);
        let ropes = (0..program.rope_tables).map(|_| storage("a rotary table", rope_bytes)).collect::<Result<_>>()?;

        // Windows differ between layers; the buffers are shared, so they fit the layer with the most splits.
        let windows = program.ops.iter().filter_map(|op| match op {
            Op::Attention { window, .. } => Some(window.unwrap_or(0)),
            _ => None,
        });
        let mut splits = 0;
        for window in windows {
            let few = attention::splits_max(window, attention::split_len(1, config.context), config.context);
            let many = attention::splits_max(window, attention::split_len(u32::MAX, config.context), config.context);
            let few_tokens = attention::FEW_TOKENS.min(config.max_tokens);
            splits = splits.max(size(&[few, few_tokens], 1)).max(size(&[many, config.max_tokens], 1));
        }
        let partials = splits.saturating_mul(u64::from(shape.heads));
        let partial_out = partials.saturating_mul(4 * u64::from(shape.head_dim));
        Ok(Self {
            activations,
            tokens: storage("the tokens", size(&[config.max_tokens], 4))?,
            partial_out: storage("attention of the splits", partial_out)?,
            partial_ml: storage("sums of the splits", partials.saturating_mul(8))?,
            dummy: storage("a placeholder", 16)?,
            unread: storage("a placeholder", 16)?,
            step: gpu.buffer("the step", 16, BufferUsages::UNIFORM | BufferUsages::COPY_DST)?,
            caches,
            ropes,
            context: config.context,
            kv_type,
            bytes: total,
        })
    }

    /// Keys and values of `layer`.
    pub(super) fn cache(&self, layer: u32) -> Result<(&wgpu::Buffer, &wgpu::Buffer)> {
        let cache = self.caches.get(layer as usize).map(|(keys, values)| (keys, values));
        cache.ok_or_else(|| Error::new(ErrorKind::InvalidInput, format!("the program has no layer {layer}")))
    }

    /// Rotary table `table`.
    pub(super) fn rope(&self, table: u32) -> Result<&wgpu::Buffer> {
        let rope = self.ropes.get(table as usize);
        rope.ok_or_else(|| Error::new(ErrorKind::InvalidInput, format!("the program has no rotary table {table}")))
    }
}
