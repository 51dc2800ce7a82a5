//! What one session holds on the device: activations, KV cache, rotary tables.

use std::sync::Arc;

use awqua_shaders::{attention, attention_coop};
use wgpu::BufferUsages;

use super::device::{Gpu, buffer_size};
use super::plan::passes::Cache;
use crate::backend::forks::Start;
use crate::backend::{BufferDesc, KvType, Op, Program, RunnerConfig};
use crate::error::{Error, ErrorKind, Result};

/// Kernels read activations four elements at a time.
const ROW_ELEMENTS: u32 = 4;

/// An activation buffer: (rows, stride), f32.
pub(super) struct Activation<B> {
    pub(super) buffer: B,
    /// Elements from one row to the next.
    pub(super) stride: u32,
}

/// The buffers of one session, or whatever `B` stands for them while it is only planned.
pub(super) struct Memory<B = wgpu::Buffer> {
    /// By buffer id.
    pub(super) activations: Vec<Activation<B>>,
    /// (max_tokens) u32.
    pub(super) tokens: B,
    /// The step uniform.
    pub(super) step: B,
    /// Unnormalised attention of the splits.
    pub(super) partial_out: B,
    /// Largest score and sum of the splits.
    pub(super) partial_ml: B,
    /// Bound where a kernel reads nothing.
    pub(super) dummy: B,
    /// Bound where a kernel writes nothing.
    pub(super) unread: B,
    /// Keys and values by layer behind the prefix: (context - prefix, kv_heads, head_dim) each; in 8 bits (kv_heads,
    /// context - prefix, head_dim), then their scales.
    caches: Vec<(B, B)>,
    /// The first positions, if they are shared.
    pub(super) prefix: Option<Arc<Prefix>>,
    /// Whether attention is to be computed alike with and without it.
    pub(super) share_forks: bool,
    /// By rotary table: (context, rotary_dim / 2, 2) f32.
    ropes: Vec<B>,
    pub(super) context: u32,
    pub(super) kv_type: KvType,
    /// Bytes of all of them.
    pub(super) bytes: u64,
}

/// Keys and values of positions that several sessions begin with; nobody writes them any more.
pub(super) struct Prefix {
    /// By layer: (len, kv_heads, head_dim) each; in 8 bits (kv_heads, len, head_dim), then their scales.
    caches: Vec<(wgpu::Buffer, wgpu::Buffer)>,
    /// Positions.
    pub(super) len: u32,
    /// Bytes of all of them.
    pub(super) bytes: u64,
}

impl Start for Prefix {
    fn len(&self) -> u32 {
        self.len
    }
}

impl Prefix {
    /// Allocates for `len` positions.
    ///
    /// # Errors
    /// As [`Memory::new`].
    pub(super) fn new(gpu: &Gpu, program: &Program, kv_type: KvType, len: u32) -> Result<Self> {
        let size = part_bytes(program, kv_type, len);
        let what = format!("a shared KV cache of {len} tokens");
        gpu.has_room(&what, size.saturating_mul(2).saturating_mul(u64::from(program.layers)))?;
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        let pair = |_| Ok((gpu.buffer(&what, size, usage)?, gpu.buffer(&what, size, usage)?));
        let caches = (0..program.layers).map(pair).collect::<Result<_>>()?;
        Ok(Self { caches, len, bytes: Self::bytes(program, kv_type, len) })
    }

    /// Bytes that [`Self::new`] allocates.
    pub(super) fn bytes(program: &Program, kv_type: KvType, len: u32) -> u64 {
        buffer_size(part_bytes(program, kv_type, len)).saturating_mul(2).saturating_mul(u64::from(program.layers))
    }

    /// Keys and values of `layer`.
    pub(super) fn cache(&self, layer: u32) -> Result<(&wgpu::Buffer, &wgpu::Buffer)> {
        let cache = self.caches.get(layer as usize).map(|(keys, values)| (keys, values));
        cache.ok_or_else(|| Error::new(ErrorKind::InvalidInput, format!("the program has no layer {layer}")))
    }
}

impl Drop for Prefix {
    /// As [`Memory::destroy_caches`].
    fn drop(&mut self) {
        destroy(&self.caches);
    }
}

fn destroy(caches: &[(wgpu::Buffer, wgpu::Buffer)]) {
    for (keys, values) in caches {
        keys.destroy();
        values.destroy();
    }
}

/// Bytes that [`Memory::new`] allocates.
pub(super) fn bytes(program: &Program, config: &RunnerConfig) -> u64 {
    bytes_behind(program, config, 0)
}

/// The same with `prefix` positions of the cache shared.
pub(super) fn bytes_behind(program: &Program, config: &RunnerConfig, prefix: u32) -> u64 {
    let mut total = 0u64;
    let counted = Memory::layout(program, config, prefix, &mut |_, bytes, _| {
        total = total.saturating_add(buffer_size(bytes));
        Ok(())
    });
    // The closure never fails, and nothing else does.
    counted.map_or(u64::MAX, |_| total)
}

impl Memory {
    /// Allocates for the capacities of `config`, behind the positions of `prefix`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] naming the buffer and its bytes, or a device error.
    pub(super) fn new(
        gpu: &Gpu,
        program: &Program,
        config: &RunnerConfig,
        prefix: Option<Arc<Prefix>>,
    ) -> Result<Self> {
        let shared = prefix.as_ref().map_or(0, |prefix| prefix.len);
        let cache = cache_bytes(program, config, shared);
        gpu.has_room("the KV cache", cache.saturating_mul(2).saturating_mul(u64::from(program.layers)))?;
        let mut total = 0;
        let mut memory = Self::layout(program, config, shared, &mut |what, bytes, usage| {
            let buffer = gpu.buffer(what, bytes, usage | BufferUsages::COPY_DST)?;
            total += buffer.size();
            Ok(buffer)
        })?;
        (memory.bytes, memory.prefix) = (total, prefix);
        Ok(memory)
    }

    /// As [`Self::new`], with one small buffer in the place of all: enough to plan with.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn placeholder(gpu: &Gpu, program: &Program, config: &RunnerConfig) -> Result<Self> {
        let dummy = gpu.buffer("a placeholder", 16, BufferUsages::STORAGE | BufferUsages::UNIFORM)?;
        Self::layout(program, config, 0, &mut |_, _, _| Ok(dummy.clone()))
    }

    /// Keys and values, for passes that work in them.
    pub(super) fn to_join(&self) -> Cache {
        Cache { layers: self.caches.clone(), prefix: self.prefix.clone() }
    }

    /// What tells this cache from others while both are there.
    pub(super) fn identity(&self) -> Option<(wgpu::Buffer, usize)> {
        let prefix = self.prefix.as_ref().map_or(0, |prefix| Arc::as_ptr(prefix) as usize);
        self.caches.first().map(|(keys, _)| (keys.clone(), prefix))
    }

    /// Gives the memory of the caches back, though bind groups of passes may still name it.
    pub(super) fn destroy_caches(&self) {
        destroy(&self.caches);
    }

    /// Positions that are shared.
    pub(super) fn shared(&self) -> u32 {
        self.prefix.as_ref().map_or(0, |prefix| prefix.len)
    }

    /// Keys and values of the shared positions of `layer`; placeholders if there are none.
    pub(super) fn shared_cache(&self, layer: u32) -> Result<(&wgpu::Buffer, &wgpu::Buffer)> {
        self.prefix.as_ref().map_or(Ok((&self.dummy, &self.dummy)), |prefix| prefix.cache(layer))
    }

    /// Keys and values of `layer` behind the shared positions.
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

impl<B> Memory<B> {
    /// Every buffer with its name, bytes and usage, made by `buffer`; `prefix` positions of the cache are not among them.
    fn layout(
        program: &Program,
        config: &RunnerConfig,
        prefix: u32,
        buffer: &mut dyn FnMut(&str, u64, BufferUsages) -> Result<B>,
    ) -> Result<Self> {
        let shape = program.attention;
        let mut storage = |what: &str, bytes: u64| buffer(what, bytes, BufferUsages::STORAGE | BufferUsages::COPY_SRC);
        let activations = program
            .buffers
            .iter()
            .map(|desc| {
                let rows = desc.rows(config);
                let stride = stride(desc);
                let what = format!("activation buffer `{}`", desc.name);
                Ok(Activation { buffer: storage(&what, size(&[rows, stride], 4))?, stride })
            })
            .collect::<Result<_>>()?;
        let cache_bytes = cache_bytes(program, config, prefix);
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
            step: buffer("the step", 16, BufferUsages::UNIFORM)?,
            caches,
            prefix: None,
            share_forks: config.share_forks,
            ropes,
            context: config.context,
            kv_type: config.kv_type.unwrap_or(KvType::F16),
            bytes: 0,
        })
    }
}

/// Bytes of the keys of one layer behind `prefix` positions, and of its values. Kernels on matrix units read whole spans
/// of positions.
fn cache_bytes(program: &Program, config: &RunnerConfig, prefix: u32) -> u64 {
    let positions = config.context.saturating_sub(prefix).checked_next_multiple_of(attention_coop::SPAN);
    part_bytes(program, config.kv_type.unwrap_or(KvType::F16), positions.unwrap_or(u32::MAX))
}

/// Bytes of the keys of `positions` positions of one layer, and of its values.
fn part_bytes(program: &Program, kv_type: KvType, positions: u32) -> u64 {
    let shape = program.attention;
    size(&[positions, shape.kv_heads], kv_type.row_bytes(shape.head_dim))
}

fn size(factors: &[u32], bytes: u64) -> u64 {
    factors.iter().fold(bytes, |product, factor| product.saturating_mul(u64::from(*factor)))
}

/// Elements from one row of an activation to the next.
fn stride(desc: &BufferDesc) -> u32 {
    desc.width.checked_next_multiple_of(ROW_ELEMENTS).unwrap_or(u32::MAX)
}
