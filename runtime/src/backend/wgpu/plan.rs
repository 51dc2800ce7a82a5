//! A program as dispatches: bind groups and uniform blocks made once, dispatch sizes computed from each step.

use std::collections::HashMap;
use std::sync::Arc;

use awqua_shaders::{
    Cost, Dense, FLAG_ACCUMULATE, FLAG_BIAS, FLAG_CENTER, FLAG_FACTORS, FLAG_ORDER, FLAG_SEGMENTS, Kernel, Kv, Packed,
    RowMode, Step, Variant, arrange, embed, embed_packed, glu, head_norm, norm, rope_append, scale, uniform_bytes,
};
use bytemuck::Pod;
use wgpu::BufferUsages;

mod attention;
mod experts;
mod fuse;
mod halve;
mod linear;
pub(super) mod passes;
mod stage;

use super::WgpuBackend;
use super::memory::Memory;
use super::pipelines::Pipeline;
use super::weights::GpuWeight;
use crate::backend::{Activation, BufferId, KvType, NormKind, Op, Program, Rows, RunnerConfig, Span, WeightId};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::DenseType;
use experts::Experts;
pub(super) use linear::MOST_FEW_ROWS;
use linear::{Linear, few_rows};
pub(super) use linear::{matrix_params, rows_params, usual_size};
use passes::{PassSites, Site};

/// The dispatches of a program.
pub(super) struct Plan {
    /// One entry an operation or a run of them that is computed together, in order.
    pub(super) ops: Vec<PlannedOp>,
    /// Bytes of the uniform blocks and of staged inputs.
    pub(super) bytes: u64,
    /// Operations of a pass over several sessions that work in their caches, by [`Self::bind_members`].
    sites: Vec<Site>,
}

/// The dispatches of one operation or of several.
pub(super) struct PlannedOp {
    rows: RowMode,
    /// Most rows that the dispatches are for, ascending; the last ones are for any number.
    levels: Vec<(u32, Vec<Dispatch>)>,
}

impl PlannedOp {
    /// The rows it works on.
    pub(super) fn rows(&self) -> RowMode {
        self.rows
    }

    /// The dispatches for this step; none if no row takes part.
    pub(super) fn dispatches(&self, step: &Step) -> &[Dispatch] {
        match self.rows.count(step) {
            0 => &[],
            rows => self.levels.iter().find(|(most, _)| rows <= *most).map_or(&[], |(_, dispatches)| dispatches),
        }
    }
}

/// One kernel call.
pub(super) struct Dispatch {
    pub(super) pipeline: Arc<Pipeline>,
    pub(super) bind_group: wgpu::BindGroup,
    launch: LaunchFn,
}

type LaunchFn = Box<dyn Fn(&Step) -> Launch + Send + Sync>;

/// Size of a dispatch.
pub(super) struct Launch {
    /// Workgroups in x, y, z.
    pub(super) grid: [u32; 3],
    /// What it moves and computes at least.
    pub(super) cost: Cost,
}

impl Launch {
    /// Whether the step has nothing to do for it.
    pub(super) fn is_nothing(&self) -> bool {
        self.grid.contains(&0)
    }
}

impl Dispatch {
    /// Size for this step.
    pub(super) fn launch(&self, step: &Step) -> Launch {
        (self.launch)(step)
    }
}

impl Plan {
    /// Plans `program` over the buffers of `memory`.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] or [`ErrorKind::InvalidTensor`] where weights do not fit the program, or a device
    /// error.
    pub(super) fn new(backend: &WgpuBackend, program: &Program, memory: &Memory, max_tokens: u32) -> Result<Self> {
        Self::of(Planner::new(backend, program, memory, max_tokens, false))
    }

    fn of(mut planner: Planner<'_>) -> Result<Self> {
        let drafts = planner.drafts()?;
        let (backend, memory) = (planner.backend, planner.memory);
        let gpu = &backend.gpu;
        let uniform_bytes = planner.uniforms.len() as u64;
        let bytes = uniform_bytes + planner.staged_bytes;
        let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
        let uniforms = gpu.buffer("uniform blocks", uniform_bytes, usage)?;
        gpu.queue.write_buffer(&uniforms, 0, &planner.uniforms);
        let finish = |drafts: Vec<Draft>| {
            drafts.into_iter().map(|d| d.finish(backend, &uniforms, &memory.step)).collect::<Result<_>>()
        };
        let finish_op = |draft: DraftOp| {
            let levels = draft.levels.into_iter().map(|(most, drafts)| Ok((most, finish(drafts)?)));
            Ok(PlannedOp { rows: draft.rows, levels: levels.collect::<Result<_>>()? })
        };
        let ops = gpu.scoped("bind groups", 0, || drafts.into_iter().map(finish_op).collect::<Result<_>>())??;
        Ok(Self { ops, bytes, sites: planner.pass.map_or_else(Vec::new, |pass| pass.sites) })
    }

    /// The kernels that a plan for sessions of this kind needs; nothing is compiled or allocated for them.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub(super) fn kernels(
        backend: &WgpuBackend,
        program: &Program,
        config: &RunnerConfig,
    ) -> Result<Vec<(&'static Kernel, Variant)>> {
        let memory = Memory::placeholder(&backend.gpu, program, config)?;
        let drafts = Planner::new(backend, program, &memory, config.max_tokens, true).drafts()?;
        let drafts = drafts.into_iter().flat_map(|op| op.levels).flat_map(|(_, drafts)| drafts);
        let mut kernels = Vec::new();
        for (kernel, variant) in drafts.map(|draft| draft.kernel) {
            let variant = kernel.canonical(variant);
            if !kernels.iter().any(|(other, v): &(&Kernel, Variant)| other.name == kernel.name && *v == variant) {
                kernels.push((kernel, variant));
            }
        }
        Ok(kernels)
    }
}

/// A [`PlannedOp`] before the uniform buffer exists.
struct DraftOp {
    rows: RowMode,
    levels: Vec<(u32, Vec<Draft>)>,
}

impl DraftOp {
    /// An operation whose dispatches do not depend on the number of rows.
    fn always(rows: RowMode, dispatches: Vec<Draft>) -> Self {
        Self { rows, levels: vec![(u32::MAX, dispatches)] }
    }

    /// The dispatches for any number of rows.
    fn many(self) -> Vec<Draft> {
        self.levels.into_iter().last().map_or(Vec::new(), |(_, dispatches)| dispatches)
    }
}

struct Draft {
    kernel: (&'static Kernel, Variant),
    uniform: std::ops::Range<u64>,
    storage: Vec<wgpu::Buffer>,
    launch: LaunchFn,
}

impl Draft {
    fn finish(self, backend: &WgpuBackend, uniforms: &wgpu::Buffer, step: &wgpu::Buffer) -> Result<Dispatch> {
        let pipeline = backend.pipelines.get(&backend.gpu, self.kernel.0, self.kernel.1)?;
        let params = wgpu::BufferBinding {
            buffer: uniforms,
            offset: self.uniform.start,
            size: wgpu::BufferSize::new(self.uniform.end - self.uniform.start),
        };
        let bind_group = pipeline.bind(&backend.gpu, params, step, &self.storage);
        Ok(Dispatch { pipeline, bind_group, launch: self.launch })
    }
}

struct Planner<'a> {
    backend: &'a WgpuBackend,
    program: &'a Program,
    memory: &'a Memory,
    uniforms: Vec<u8>,
    /// Most rows of a step whose packed matrices take staged inputs.
    few_rows: u32,
    /// Staged inputs by the buffer they stand for.
    staged: HashMap<BufferId, wgpu::Buffer>,
    /// Half precision inputs of many rows and their scales, by chunks of a row.
    half_buffers: HashMap<u32, (wgpu::Buffer, wgpu::Buffer)>,
    /// Rows of a step by expert, and their tiles.
    pair_buffers: Option<(wgpu::Buffer, wgpu::Buffer)>,
    max_tokens: u32,
    staged_bytes: u64,
    /// Only find out which kernels it takes.
    dry: bool,
    /// The buffer whose staged form the last operation left up to date, for few rows.
    ready: Option<BufferId>,
    /// What there is to know of a pass, if the plan is for passes over several sessions.
    pass: Option<PassSites>,
    /// The buffer that the last operation left in half precision, for many rows.
    halved: Option<BufferId>,
}

impl<'a> Planner<'a> {
    fn new(backend: &'a WgpuBackend, program: &'a Program, memory: &'a Memory, max_tokens: u32, dry: bool) -> Self {
        Self {
            backend,
            program,
            memory,
            uniforms: Vec::new(),
            few_rows: few_rows(backend).min(max_tokens),
            staged: HashMap::new(),
            half_buffers: HashMap::new(),
            pair_buffers: None,
            max_tokens,
            staged_bytes: 0,
            dry,
            ready: None,
            pass: None,
            halved: None,
        }
    }

    /// Plans the whole program.
    fn drafts(&mut self) -> Result<Vec<DraftOp>> {
        let mut drafts = Vec::new();
        let mut ops = self.program.ops.as_slice();
        while let Some(op) = ops.first() {
            if self.in_caches(op, &ops[1..], &mut drafts)? {
                ops = &ops[1..];
                continue;
            }
            let (draft, count) = match self.fused(ops)? {
                Some(fused) => fused,
                None => (self.op(op, &ops[1..])?, 1),
            };
            drafts.push(draft);
            ops = &ops[count..];
        }
        Ok(drafts)
    }

    /// A buffer of the plan's own.
    fn storage(&mut self, what: &str, bytes: u64) -> Result<wgpu::Buffer> {
        if self.dry {
            return Ok(self.memory.dummy.clone());
        }
        let buffer = self.backend.gpu.buffer(what, bytes, BufferUsages::STORAGE | BufferUsages::COPY_DST)?;
        self.staged_bytes += buffer.size();
        Ok(buffer)
    }

    /// Plans one operation; `rest` are those that follow.
    fn op(&mut self, op: &Op, rest: &[Op]) -> Result<DraftOp> {
        let (ready, halved) = (self.ready.take(), self.halved.take());
        match *op {
            Op::Embed { table, out, scale } => self.embed(table, out, scale),
            Op::Norm { x, out, .. } if x.buffer == out.buffer => self.norm_in_place(op),
            Op::Norm { .. } => self.norm(op),
            Op::Linear { x, weight, bias, out, accumulate, rows } => {
                let (rows, is_halved) = (row_mode(rows), halved == Some(x));
                self.linear(&Linear { x, weight, bias, out, accumulate, rows, is_halved }, ready, rest)
            }
            Op::Arrange { x, order, factors, out, rows } => self.arrange(x, order, factors, out, row_mode(rows)),
            Op::RopeAppend { qkv, layer, rope } => self.rope_append(qkv, layer, rope),
            Op::Attention { qkv, out, layer, scale, softcap, window } => {
                self.attention(qkv, out, layer, (scale, softcap), window, rest)
            }
            Op::Route { logits, routes, top_k, renormalise } => self.route(logits, routes, top_k, renormalise, rest),
            Op::Experts { x, weight, count, routes, out } => {
                self.experts(&Experts { x, weight, count, routes, out }, ready)
            }
            Op::Combine { x, routes, out } => self.combine(x, routes, out),
            Op::Gate { x, gate } => self.gate(x, gate),
            Op::Scale { x, scale, cap, rows } => self.scale(x, scale, cap, row_mode(rows)),
            Op::Glu { x, out, activation } => {
                let width = self.width(out)?;
                self.fits(x.into(), width.saturating_mul(2))?;
                let (x_stride, out_stride) = (self.stride(x), self.stride(out));
                let per_token = self.per_token(x);
                let activation = activation_of(activation) as u32;
                let params = glu::Params { width, x_stride, out_stride, activation, per_token, ..Default::default() };
                let storage = vec![self.buffer(x), self.buffer(out)];
                let launch = move |step: &Step| Launch {
                    grid: glu::grid(&params, step.n_tokens * per_token),
                    cost: glu::cost(&params, step.n_tokens * per_token),
                };
                let draft = self.draft(&glu::KERNEL, self.variant(), &params, storage, launch)?;
                Ok(DraftOp::always(RowMode::All, vec![draft]))
            }
        }
    }

    fn embed(&mut self, table: WeightId, out: BufferId, scale: f32) -> Result<DraftOp> {
        let weight = self.backend.weight(table)?;
        let Some((_, width)) = weight.dims() else { return Err(unsupported("an embedding table has to be a matrix")) };
        self.fits(out.into(), width)?;
        let mut dispatches = Vec::new();
        match weight {
            GpuWeight::Dense(table) => {
                for part in &table.parts {
                    let params = embed::Params {
                        width,
                        row_words: table.row_words,
                        first_row: part.first_row,
                        n_rows: part.rows,
                        out_stride: self.stride(out),
                        scale,
                        ..Default::default()
                    };
                    let storage = vec![self.memory.tokens.clone(), part.words.clone(), self.buffer(out)];
                    let launch = move |step: &Step| Launch {
                        grid: embed::grid(&params, step.n_tokens),
                        cost: embed::cost(&params, step.n_tokens),
                    };
                    let variant = Variant { dense: dense(table.dtype), ..self.variant() };
                    dispatches.push(self.draft(&embed::KERNEL, variant, &params, storage, launch)?);
                }
            }
            GpuWeight::W4(table) => {
                for part in &table.parts {
                    let params = embed_packed::Params {
                        n: part.rows,
                        k: width,
                        row_words: table.chunks,
                        group_size: table.group_size,
                        groups: table.groups,
                        first_row: part.first_row,
                        out_stride: self.stride(out),
                        flags: table.flags,
                        scale,
                        ..Default::default()
                    };
                    dispatches.push(self.embed_packed(Packed::W4, params, &part.qweight, &part.group_params, out)?);
                }
            }
            GpuWeight::Packed(table) => {
                for part in &table.parts {
                    let params = embed_packed::Params {
                        n: part.rows,
                        k: width,
                        row_words: table.row_words,
                        group_size: table.group_size,
                        groups: table.groups,
                        first_row: part.first_row,
                        out_stride: self.stride(out),
                        flags: table.flags,
                        scale,
                        ..Default::default()
                    };
                    dispatches.push(self.embed_packed(table.packed, params, &part.codes, &part.group_params, out)?);
                }
            }
            GpuWeight::Vector { .. } | GpuWeight::Order { .. } | GpuWeight::Expert { .. } => {}
        }
        Ok(DraftOp::always(RowMode::All, dispatches))
    }

    fn embed_packed(
        &mut self,
        packed: Packed,
        params: embed_packed::Params,
        codes: &wgpu::Buffer,
        group_params: &wgpu::Buffer,
        out: BufferId,
    ) -> Result<Draft> {
        let storage = vec![self.memory.tokens.clone(), codes.clone(), group_params.clone(), self.buffer(out)];
        let launch = move |step: &Step| Launch {
            grid: embed_packed::grid(&params, step.n_tokens),
            cost: embed_packed::cost(&params, step.n_tokens),
        };
        self.draft(&embed_packed::KERNEL, Variant { packed, ..self.variant() }, &params, storage, launch)
    }

    fn arrange(
        &mut self,
        x: BufferId,
        order: Option<WeightId>,
        factors: Option<WeightId>,
        out: BufferId,
        rows: RowMode,
    ) -> Result<DraftOp> {
        let width = self.width(out)?;
        self.fits(x.into(), width)?;
        let flag = |condition: bool, flag: u32| if condition { flag } else { 0 };
        let params = arrange::Params {
            width,
            x_stride: self.stride(x),
            out_stride: self.stride(out),
            flags: flag(order.is_some(), FLAG_ORDER) | flag(factors.is_some(), FLAG_FACTORS),
            row_mode: rows as u32,
            ..Default::default()
        };
        let order = match order.map(|order| self.backend.weight(order)).transpose()? {
            None => self.memory.dummy.clone(),
            Some(GpuWeight::Order { len, buffer }) if *len == width => buffer.clone(),
            Some(_) => return Err(unsupported("an order of other columns")),
        };
        let factors = match factors {
            None => self.memory.dummy.clone(),
            Some(factors) => self.vector(factors, width)?,
        };
        let storage = vec![self.buffer(x), order, factors, self.buffer(out)];
        let launch = move |step: &Step| Launch {
            grid: arrange::grid(&params, rows.count(step)),
            cost: arrange::cost(&params, rows.count(step)),
        };
        let draft = self.draft(&arrange::KERNEL, self.variant(), &params, storage, launch)?;
        Ok(DraftOp::always(rows, vec![draft]))
    }

    /// A norm from one buffer to another.
    fn norm(&mut self, op: &Op) -> Result<DraftOp> {
        let Op::Norm { kind, x, weight, bias, out, dim, segments: 1, eps, accumulate, rows } = *op else {
            return Err(unsupported("a norm of several segments works in place"));
        };
        self.fits(x, dim)?;
        self.fits(out, dim)?;
        let row_mode = row_mode(rows);
        let flag = |condition: bool, flag: u32| if condition { flag } else { 0 };
        let params = norm::Params {
            dim,
            x_stride: self.stride(x.buffer),
            x_offset: x.offset,
            out_stride: self.stride(out.buffer),
            out_offset: out.offset,
            eps,
            row_mode: row_mode as u32,
            flags: flag(kind == NormKind::Layer, FLAG_CENTER)
                | flag(bias.is_some(), FLAG_BIAS)
                | flag(accumulate, FLAG_ACCUMULATE),
        };
        let bias = match bias {
            Some(bias) => self.vector(bias, dim)?,
            None => self.memory.dummy.clone(),
        };
        let storage = vec![self.buffer(x.buffer), self.vector(weight, dim)?, bias, self.buffer(out.buffer)];
        let launch = move |step: &Step| Launch {
            grid: norm::grid(&params, row_mode.count(step)),
            cost: norm::cost(&params, row_mode.count(step)),
        };
        let draft = self.draft(&norm::KERNEL, self.variant(), &params, storage, launch)?;
        Ok(DraftOp::always(row_mode, vec![draft]))
    }

    fn norm_in_place(&mut self, op: &Op) -> Result<DraftOp> {
        let Op::Norm { kind, x, weight, bias: None, out, dim, segments, eps, accumulate: false, rows: Rows::All } = *op
        else {
            return Err(unsupported("a norm within one buffer has all rows, no bias and no sum"));
        };
        if x.offset != out.offset {
            return Err(unsupported("a norm within one buffer works on the same columns"));
        }
        let columns = dim.saturating_mul(segments);
        self.fits(x, columns)?;
        let own_weights = segments > 1 && self.vector(weight, columns).is_ok();
        let weight = self.vector(weight, if own_weights { columns } else { dim })?;
        let center = if kind == NormKind::Layer { FLAG_CENTER } else { 0 };
        let flags = center | if own_weights { FLAG_SEGMENTS } else { 0 };
        let stride = self.stride(x.buffer);
        let params = head_norm::Params { dim, segments, stride, offset: x.offset, eps, flags, ..Default::default() };
        let launch = move |step: &Step| Launch {
            grid: head_norm::grid(&params, step.n_tokens),
            cost: head_norm::cost(&params, step.n_tokens),
        };
        let storage = vec![self.buffer(x.buffer), weight];
        let draft = self.draft(&head_norm::KERNEL, self.variant(), &params, storage, launch)?;
        Ok(DraftOp::always(RowMode::All, vec![draft]))
    }

    fn scale(&mut self, x: BufferId, factor: f32, cap: Option<f32>, rows: RowMode) -> Result<DraftOp> {
        if rows == RowMode::Logits {
            return Err(unsupported("scaling in place does not move rows"));
        }
        let params = scale::Params {
            width: self.width(x)?,
            stride: self.stride(x),
            scale: factor,
            cap: cap.unwrap_or(0.0),
            row_mode: rows as u32,
            ..Default::default()
        };
        let launch = move |step: &Step| Launch {
            grid: scale::grid(&params, rows.count(step)),
            cost: scale::cost(&params, rows.count(step)),
        };
        let draft = self.draft(&scale::KERNEL, self.variant(), &params, vec![self.buffer(x)], launch)?;
        Ok(DraftOp::always(rows, vec![draft]))
    }

    fn rope_append(&mut self, qkv: BufferId, layer: u32, rope: Option<u32>) -> Result<DraftOp> {
        let shape = self.program.attention;
        self.fits(qkv.into(), (shape.heads + 2 * shape.kv_heads).saturating_mul(shape.head_dim))?;
        let params = rope_append::Params {
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            rotary_dim: if rope.is_some() { shape.rotary_dim } else { 0 },
            qkv_stride: self.stride(qkv),
            context: self.memory.context,
            prefix: self.memory.shared(),
            ..Default::default()
        };
        let table = match rope {
            Some(table) => self.memory.rope(table)?.clone(),
            None => self.memory.dummy.clone(),
        };
        let (keys, values) = self.memory.cache(layer)?;
        let storage = vec![self.buffer(qkv), table, keys.clone(), values.clone()];
        let kv = self.variant().kv;
        if !kv.handles(shape.head_dim) {
            let message = format!("a KV cache of {:?} with heads of {} elements", self.memory.kv_type, shape.head_dim);
            return Err(unsupported(&message));
        }
        let launch = move |step: &Step| Launch {
            grid: rope_append::grid(&params, kv, step.n_tokens),
            cost: rope_append::cost(&params, kv, step.n_tokens),
        };
        let draft = self.draft(&rope_append::KERNEL, self.variant(), &params, storage, launch)?;
        Ok(DraftOp::always(RowMode::All, vec![draft]))
    }

    fn draft<P: Pod + bytemuck::Zeroable>(
        &mut self,
        kernel: &'static Kernel,
        variant: Variant,
        params: &P,
        storage: Vec<wgpu::Buffer>,
        launch: impl Fn(&Step) -> Launch + Send + Sync + 'static,
    ) -> Result<Draft> {
        let align = self.backend.gpu.limits.min_uniform_buffer_offset_alignment as usize;
        let start = self.uniforms.len().next_multiple_of(align);
        self.uniforms.resize(start, 0);
        self.uniforms.extend_from_slice(uniform_bytes(params));
        let uniform = start as u64..self.uniforms.len() as u64;
        Ok(Draft { kernel: (kernel, variant), uniform, storage, launch: Box::new(launch) })
    }

    fn variant(&self) -> Variant {
        let kv = kv_of(self.memory.kv_type);
        let WgpuBackend { elem, reduce, size, .. } = *self.backend;
        Variant { elem, reduce, kv, size, ..Variant::default() }
    }

    fn buffer(&self, id: BufferId) -> wgpu::Buffer {
        self.memory.activations[id.0 as usize].buffer.clone()
    }

    fn stride(&self, id: BufferId) -> u32 {
        self.memory.activations[id.0 as usize].stride
    }

    /// Rows of a token.
    fn per_token(&self, id: BufferId) -> u32 {
        self.program.buffers.get(id.0 as usize).map_or(1, |desc| desc.per_token)
    }

    fn width(&self, id: BufferId) -> Result<u32> {
        match self.program.buffers.get(id.0 as usize) {
            Some(desc) => Ok(desc.width),
            None => Err(Error::new(ErrorKind::InvalidInput, format!("the program has no buffer {}", id.0))),
        }
    }

    /// Checks that `columns` columns from `span` on are there.
    fn fits(&self, span: Span, columns: u32) -> Result<()> {
        let width = self.width(span.buffer)?;
        if span.offset.checked_add(columns).is_none_or(|end| end > width) {
            let name = self.program.buffers[span.buffer.0 as usize].name;
            let message = format!("{columns} columns from {} do not fit the {width} of buffer `{name}`", span.offset);
            return Err(Error::new(ErrorKind::InvalidTensor, message));
        }
        Ok(())
    }

    fn vector(&self, id: WeightId, expected: u32) -> Result<wgpu::Buffer> {
        match self.backend.weight(id)? {
            GpuWeight::Vector { len, buffer } if *len == expected => Ok(buffer.clone()),
            GpuWeight::Vector { len, .. } => {
                Err(Error::new(ErrorKind::InvalidTensor, format!("expected a vector of {expected}, found {len}")))
            }
            _ => Err(unsupported("a norm weight or bias has to be a vector")),
        }
    }
}

fn kv_of(kv_type: KvType) -> Kv {
    match kv_type {
        KvType::F16 => Kv::F16,
        KvType::F32 => Kv::F32,
        KvType::Q8 => Kv::Q8,
    }
}

fn row_mode(rows: Rows) -> RowMode {
    match rows {
        Rows::All => RowMode::All,
        Rows::Logits => RowMode::Logits,
        Rows::Compacted => RowMode::Compacted,
    }
}

/// The kernels' number of an activation.
fn activation_of(activation: Activation) -> awqua_shaders::Activation {
    match activation {
        Activation::Silu => awqua_shaders::Activation::Silu,
        Activation::GeluTanh => awqua_shaders::Activation::GeluTanh,
        Activation::Gelu => awqua_shaders::Activation::Gelu,
    }
}

fn dense(dtype: DenseType) -> Dense {
    match dtype {
        DenseType::F16 => Dense::F16,
        DenseType::BF16 => Dense::BF16,
        DenseType::F32 => Dense::F32,
    }
}

fn unsupported(message: &str) -> Error {
    Error::new(ErrorKind::Unsupported, message.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_take_the_bytes_that_kernels_read() {
        for kv_type in [KvType::F16, KvType::F32, KvType::Q8] {
            for head_dim in (4..=256).step_by(4) {
                assert_eq!(
                    kv_type.row_bytes(head_dim),
                    4 * kv_of(kv_type).row_words(head_dim),
                    "{kv_type:?} {head_dim}"
                );
            }
        }
    }
}
