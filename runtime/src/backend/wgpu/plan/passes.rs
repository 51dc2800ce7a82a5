//! Passes over several sessions: one row each, in caches of their own.

use std::sync::Arc;

use awqua_shaders::{
    FLAG_EACH, FLAG_STAGE, FLAG_WHOLE, Heads, Kernel, Reduce, RowMode, Step, Variant, attention, attention_each,
    attention_few, attention_reduce, attention_subgroup, attention_subgroup_each, gemv_dense_rows,
    gemv_dense_rows_coop, gemv_w4_rows, rope_append_each, uniform_bytes,
};
use wgpu::BufferUsages;

use super::super::WgpuBackend;
use super::super::choices;
use super::super::memory::{Memory, Prefix};
use super::super::pipelines::Pipeline;
use super::super::selftest;
use super::{Dispatch, DraftOp, Launch, LaunchFn, Plan, Planner, unsupported};
use crate::backend::{AttentionShape, BufferId, Op, Program, RunnerConfig};
use crate::error::{Error, ErrorKind, Result};

const MEMBERS: usize = attention_each::MEMBERS as usize;

/// Whether passes can be computed over heads of this shape on this device.
pub(in super::super) fn handles(limits: &wgpu::Limits, shape: &AttentionShape) -> bool {
    let stride = (shape.heads + 2 * shape.kv_heads).saturating_mul(shape.head_dim).next_multiple_of(4);
    limits.max_storage_buffers_per_shader_stage as usize >= awqua_shaders::EACH_BUFFERS
        && attention_few::handles(shape.head_dim, stride)
}

/// Kernels that only passes use and that compute as their CPU twins do.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct PassKernels {
    /// Whether dense products on matrix units are among them.
    pub(in super::super) dense_coop: bool,
    /// Whether attention by lanes of subgroups is among them.
    lanes: bool,
}

/// Tries the kernels that only passes use as `selftest` does the others; `None` if there can be no passes.
pub(in super::super) fn kernels(backend: &WgpuBackend) -> Option<PassKernels> {
    let WgpuBackend { elem, reduce, size, .. } = *backend;
    let variant = Variant { elem, reduce, size, ..Variant::default() };
    let kernels: [&'static Kernel; 4] =
        [&gemv_w4_rows::KERNEL, &gemv_dense_rows::KERNEL, &rope_append_each::KERNEL, &attention_each::KERNEL];
    let mut kernels = kernels.into_iter().chain(choices::KERNELS);
    let works = |kernel: &'static Kernel| selftest::pass(&backend.gpu, &backend.pipelines, kernel, variant).is_ok();
    if !kernels.all(works) {
        return None;
    }
    let (least, _) = backend.gpu.summary.subgroup.unwrap_or_default();
    let subgroups = reduce == Reduce::Subgroup && least >= attention_subgroup::LEAST_SUBGROUP;
    Some(PassKernels {
        dense_coop: backend.coop && works(&gemv_dense_rows_coop::KERNEL),
        lanes: subgroups && works(&attention_subgroup_each::KERNEL),
    })
}

/// What the plan of a pass knows besides the program.
pub(super) struct PassSites {
    /// Most positions of a member.
    context: u32,
    /// (rows) of position, context, shared positions and nothing.
    places: wgpu::Buffer,
    /// Unnormalised attention of the splits.
    partial_out: wgpu::Buffer,
    /// Largest score and sum of the splits.
    partial_ml: wgpu::Buffer,
    pub(super) sites: Vec<Site>,
}

/// An operation in the members' caches.
pub(super) struct Site {
    /// Its number in the plan.
    op: usize,
    pipeline: Arc<Pipeline>,
    layer: u32,
    /// Bindings in front of the caches, and behind them.
    storage: [Vec<wgpu::Buffer>; 2],
    form: Form,
}

#[derive(Clone, Copy)]
enum Form {
    RopeAppend(rope_append_each::Params),
    Attention(attention_each::Params),
    AttentionLanes(attention_subgroup_each::Params),
}

/// The cache of a member.
pub(in super::super) struct Cache {
    /// Keys and values by layer, behind the shared positions.
    pub(in super::super) layers: Vec<(wgpu::Buffer, wgpu::Buffer)>,
    pub(in super::super) prefix: Option<Arc<Prefix>>,
}

/// Rows that a dispatch works on.
struct Rows<'a> {
    first: u32,
    caches: &'a [Cache],
    prefix: Option<&'a Prefix>,
}

/// Cuts the rows so that those of a dispatch share their first positions or have all of their own.
fn cut(caches: &[Cache]) -> Vec<Rows<'_>> {
    let mut all: Vec<Rows<'_>> = Vec::new();
    for (row, cache) in caches.iter().enumerate() {
        let prefix = cache.prefix.as_deref();
        if let Some(last) = all.last_mut() {
            let fits = match (last.prefix, prefix) {
                (Some(one), Some(other)) => std::ptr::eq(one, other),
                _ => true,
            };
            if fits && last.caches.len() < MEMBERS {
                last.caches = &caches[last.first as usize..=row];
                last.prefix = last.prefix.or(prefix);
                continue;
            }
        }
        all.push(Rows { first: row as u32, caches: &caches[row..=row], prefix });
    }
    all
}

impl Plan {
    /// Plans passes of `program` over members of at most `config.context` positions; `places` is (rows) of position,
    /// context and shared positions of each. [`Self::bind_members`] has to follow.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub(in super::super) fn for_passes(
        backend: &WgpuBackend,
        program: &Program,
        memory: &Memory,
        config: &RunnerConfig,
        places: &wgpu::Buffer,
    ) -> Result<Self> {
        let mut planner = Planner::new(backend, program, memory, config.max_tokens, false);
        planner.few_rows = config.max_tokens;
        // Windows differ between layers; the buffers are for the layer with the most splits.
        let split_len = attention_each::split_len(config.context);
        let windows = program.ops.iter().filter_map(|op| match op {
            Op::Attention { window, .. } => Some(window.unwrap_or(0)),
            _ => None,
        });
        let splits = windows.map(|window| attention::splits_max(window, split_len, config.context)).max().unwrap_or(0);
        let partials = u64::from(splits) * u64::from(program.attention.heads) * u64::from(config.max_tokens);
        let partial_out = partials.saturating_mul(4 * u64::from(program.attention.head_dim));
        planner.pass = Some(PassSites {
            context: config.context,
            places: places.clone(),
            partial_out: planner.storage("attention of the splits", partial_out)?,
            partial_ml: planner.storage("sums of the splits", partials.saturating_mul(8))?,
            sites: Vec::new(),
        });
        Self::of(planner)
    }

    /// Has the following passes work in these caches, by row.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] or a device error.
    pub(in super::super) fn bind_members(
        &mut self,
        backend: &WgpuBackend,
        memory: &Memory,
        caches: &[Cache],
    ) -> Result<()> {
        let gpu = &backend.gpu;
        let align = gpu.limits.min_uniform_buffer_offset_alignment as usize;
        let rows = cut(caches);
        let mut blocks = Vec::new();
        let mut starts = Vec::new();
        for (site, rows) in self.sites.iter().flat_map(|site| rows.iter().map(move |rows| (site, rows))) {
            blocks.resize(blocks.len().next_multiple_of(align), 0);
            starts.push(blocks.len());
            blocks.extend_from_slice(site.form.at_row(rows.first).block());
        }
        let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
        let uniforms = gpu.buffer("uniform blocks of members", blocks.len() as u64, usage)?;
        gpu.queue.write_buffer(&uniforms, 0, &blocks);
        let mut starts = starts.into_iter();
        let made: Vec<(usize, Vec<Dispatch>)> = gpu.scoped("bind groups of members", 0, || {
            self.sites
                .iter()
                .map(|site| {
                    let dispatches = rows.iter().zip(&mut starts).map(|(rows, start)| {
                        let params = wgpu::BufferBinding {
                            buffer: &uniforms,
                            offset: start as u64,
                            size: wgpu::BufferSize::new(site.form.block().len() as u64),
                        };
                        let storage = site.storage(memory, rows)?;
                        let bind_group = site.pipeline.bind(gpu, params, &memory.step, &storage);
                        let launch = site.form.launch(memory, rows.caches.len() as u32);
                        Ok(Dispatch { pipeline: Arc::clone(&site.pipeline), bind_group, launch })
                    });
                    Ok((site.op, dispatches.collect::<Result<_>>()?))
                })
                .collect::<Result<_>>()
        })??;
        for (op, dispatches) in made {
            self.ops[op].levels = vec![(u32::MAX, dispatches)];
        }
        Ok(())
    }
}

impl Site {
    /// The bindings for these rows; those of members that are not there are the first one's, and not used.
    fn storage(&self, memory: &Memory, rows: &Rows<'_>) -> Result<Vec<wgpu::Buffer>> {
        let [mut storage, behind] = self.storage.clone();
        if let Form::Attention(_) | Form::AttentionLanes(_) = self.form {
            let (keys, values) = match rows.prefix {
                Some(prefix) => prefix.cache(self.layer)?,
                None => (&memory.dummy, &memory.dummy),
            };
            storage.extend([keys.clone(), values.clone()]);
        }
        for i in 0..MEMBERS {
            let cache = rows.caches.get(i).or(rows.caches.first());
            let layer = cache.and_then(|cache| cache.layers.get(self.layer as usize));
            let none = || Error::new(ErrorKind::InvalidInput, format!("a member has no layer {}", self.layer));
            let (keys, values) = layer.ok_or_else(none)?;
            storage.extend([keys.clone(), values.clone()]);
        }
        storage.extend(behind);
        Ok(storage)
    }
}

impl Form {
    /// The same for rows from `first` on.
    fn at_row(mut self, first: u32) -> Self {
        match &mut self {
            Self::RopeAppend(params) => params.first_row = first,
            Self::Attention(params) => params.first_row = first,
            Self::AttentionLanes(params) => params.first_row = first,
        }
        self
    }

    /// The uniform block.
    fn block(&self) -> &[u8] {
        match self {
            Self::RopeAppend(params) => uniform_bytes(params),
            Self::Attention(params) => uniform_bytes(params),
            Self::AttentionLanes(params) => uniform_bytes(params),
        }
    }

    /// Of so many members; the position of a step is that of the last of them.
    fn launch(self, memory: &Memory, members: u32) -> LaunchFn {
        let kv = super::kv_of(memory.kv_type);
        let seen = |window: u32, step: &Step| (step.position + 1).min(if window == 0 { u32::MAX } else { window });
        match self {
            Self::RopeAppend(params) => Box::new(move |_: &Step| Launch {
                grid: rope_append_each::grid(&params, kv, members),
                cost: rope_append_each::cost(&params, kv, members),
            }),
            Self::Attention(params) => Box::new(move |step: &Step| Launch {
                grid: attention_each::grid(&params, step.position, members),
                cost: attention_each::cost(&params, kv, seen(params.window, step), members),
            }),
            Self::AttentionLanes(params) => Box::new(move |step: &Step| Launch {
                grid: attention_subgroup_each::grid(&params, step.position, members),
                cost: attention_subgroup_each::cost(&params, kv, seen(params.window, step), members),
            }),
        }
    }
}

impl Planner<'_> {
    /// Plans `op`, with `rest` behind it, if it works in the caches of the members of a pass; whether it does.
    pub(super) fn in_caches(&mut self, op: &Op, rest: &[Op], drafts: &mut Vec<DraftOp>) -> Result<bool> {
        if self.pass.is_none() {
            return Ok(false);
        }
        match *op {
            Op::RopeAppend { qkv, layer, rope } => {
                self.ready = None;
                self.rope_append_each(qkv, layer, rope, drafts)?;
            }
            Op::Attention { qkv, out, layer, scale, softcap, window } => {
                self.ready = None;
                let (cap, window) = (softcap.unwrap_or(0.0), window.unwrap_or(0));
                self.attention_each((qkv, out), layer, (scale, cap, window), rest, drafts)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn site(
        &mut self,
        kernel: &'static Kernel,
        layer: u32,
        storage: [Vec<wgpu::Buffer>; 2],
        form: Form,
        drafts: &mut Vec<DraftOp>,
    ) -> Result<()> {
        let shape = self.program.attention;
        let variant = Variant { heads: Heads::of(shape.heads, shape.kv_heads), ..self.variant() };
        let pipeline = self.backend.pipelines.get(&self.backend.gpu, kernel, variant)?;
        if let Some(pass) = &mut self.pass {
            pass.sites.push(Site { op: drafts.len(), pipeline, layer, storage, form });
        }
        drafts.push(DraftOp::always(RowMode::All, Vec::new()));
        Ok(())
    }

    fn rope_append_each(
        &mut self,
        qkv: BufferId,
        layer: u32,
        rope: Option<u32>,
        drafts: &mut Vec<DraftOp>,
    ) -> Result<()> {
        let shape = self.program.attention;
        self.fits(qkv.into(), (shape.heads + 2 * shape.kv_heads).saturating_mul(shape.head_dim))?;
        let params = rope_append_each::Params {
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            rotary_dim: if rope.is_some() { shape.rotary_dim } else { 0 },
            qkv_stride: self.stride(qkv),
            ..Default::default()
        };
        let table = match rope {
            Some(table) => self.memory.rope(table)?.clone(),
            None => self.memory.dummy.clone(),
        };
        let Some(pass) = &self.pass else { return Err(unsupported("no pass is planned")) };
        let storage = vec![pass.places.clone(), self.buffer(qkv), table];
        self.site(&rope_append_each::KERNEL, layer, [storage, Vec::new()], Form::RopeAppend(params), drafts)
    }

    fn attention_each(
        &mut self,
        (qkv, out): (BufferId, BufferId),
        layer: u32,
        (scale, cap, window): (f32, f32, u32),
        rest: &[Op],
        drafts: &mut Vec<DraftOp>,
    ) -> Result<()> {
        let shape = self.program.attention;
        let heads = shape.heads.saturating_mul(shape.head_dim);
        self.fits(qkv.into(), heads + 2 * shape.kv_heads * shape.head_dim)?;
        self.fits(out.into(), heads)?;
        let target = if self.width(out)? == heads { self.stage_target(out, None, rest)? } else { None };
        let Some(pass) = &self.pass else { return Err(unsupported("no pass is planned")) };
        let split_len = attention_each::split_len(pass.context);
        let params = attention_each::Params {
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            qkv_stride: self.stride(qkv),
            scale,
            window,
            splits_max: attention::splits_max(window, split_len, pass.context),
            split_len,
            cap,
            ..Default::default()
        };
        let lanes = self.backend.pass_kernels().is_some_and(|kernels| kernels.lanes)
            && self.has_subgroups_for(shape.head_dim, params.qkv_stride);
        let stage = if target.is_some() { FLAG_STAGE } else { 0 };
        let stage_quads = target.as_ref().map_or(0, |target| target.quads);
        let reduce = attention_reduce::Params {
            heads: shape.heads,
            head_dim: shape.head_dim,
            out_stride: self.stride(out),
            window,
            splits_max: params.splits_max,
            split_len,
            flags: FLAG_EACH | stage | if lanes { FLAG_WHOLE } else { 0 },
            stage_quads,
        };
        let partials = [pass.partial_out.clone(), pass.partial_ml.clone()];
        let places = pass.places.clone();
        let staged_out = target.as_ref().map_or(&self.memory.unread, |target| &target.buffer).clone();
        let mut storage = vec![places.clone(), self.buffer(qkv)];
        storage.extend(partials.clone());
        if lanes {
            let outputs = vec![self.buffer(out), staged_out.clone()];
            let params = attention_subgroup_each::Params {
                heads: params.heads,
                kv_heads: params.kv_heads,
                head_dim: params.head_dim,
                qkv_stride: params.qkv_stride,
                scale,
                window,
                splits_max: params.splits_max,
                split_len,
                cap,
                out_stride: self.stride(out),
                flags: stage,
                stage_quads,
                ..Default::default()
            };
            let form = Form::AttentionLanes(params);
            self.site(&attention_subgroup_each::KERNEL, layer, [storage, outputs], form, drafts)?;
        } else {
            self.site(&attention_each::KERNEL, layer, [storage, Vec::new()], Form::Attention(params), drafts)?;
        }
        let mut storage = partials.to_vec();
        storage.extend([self.buffer(out), staged_out, places]);
        let launch = move |step: &Step| Launch {
            // The position is that of the last of the members, so nothing is left to do for any of them.
            grid: match lanes && window == 0 && step.position < split_len {
                true => [0; 3],
                false => attention_reduce::grid(&reduce, step.n_tokens),
            },
            cost: attention_reduce::cost(
                &reduce,
                attention::splits(window, split_len, step.position, 1),
                step.n_tokens,
            ),
        };
        let reduce = self.draft(&attention_reduce::KERNEL, self.variant(), &reduce, storage, launch)?;
        drafts.push(DraftOp::always(RowMode::All, vec![reduce]));
        self.ready = target.map(|target| target.of);
        Ok(())
    }
}
