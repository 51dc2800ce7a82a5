//! Mixtures of experts: the choice, the products with the chosen experts' matrices, and their sum.

use awqua_shaders::{
    FLAG_NORM, RowMode, Step, Variant, combine, gate, gemm_dense_experts, gemm_w4_experts, gemv_w4, gemv_w4_experts,
    gemv_w4_glu_experts, group, route, w4,
};

use super::super::tuning::Form;
use super::super::weights::{GpuDense, GpuW4, GpuWeight};
use super::fuse::reads_before_write;
use super::linear::gemv_rows;
use super::{Draft, DraftOp, Launch, Planner, activation_of, dense, unsupported};
use crate::backend::{BufferId, Op, Span, WeightId};
use crate::error::Result;

/// [`Op::Experts`].
#[derive(Clone, Copy)]
pub(super) struct Experts {
    pub(super) x: BufferId,
    pub(super) weight: WeightId,
    pub(super) count: u32,
    pub(super) routes: BufferId,
    pub(super) out: Span,
}

impl<'a> Planner<'a> {
    pub(super) fn route(
        &mut self,
        logits: BufferId,
        routes: BufferId,
        top_k: u32,
        renormalise: bool,
        rest: &[Op],
    ) -> Result<DraftOp> {
        let experts = self.width(logits)?;
        if experts > route::EXPERTS_MAX || top_k > experts || top_k == 0 {
            let message = format!("{top_k} of {experts} experts, of which a device knows {}", route::EXPERTS_MAX);
            return Err(unsupported(&message));
        }
        self.fits(routes.into(), 2 * top_k)?;
        let params = route::Params {
            experts,
            top_k,
            logits_stride: self.stride(logits),
            routes_stride: self.stride(routes),
            renormalise: u32::from(renormalise),
            ..Default::default()
        };
        let storage = vec![self.buffer(logits), self.buffer(routes)];
        let launch = move |step: &Step| Launch {
            grid: route::grid(&params, step.n_tokens),
            cost: route::cost(&params, step.n_tokens),
        };
        let choice = self.draft(&route::KERNEL, self.variant(), &params, storage.clone(), launch)?;
        let again = self.draft(&route::KERNEL, self.variant(), &params, storage, launch)?;
        let grouping = self.group(routes, experts, top_k)?;
        // Packed experts of few rows find their rows by themselves.
        let mut packed = rest.iter().filter_map(|op| match op {
            Op::Experts { weight, .. } => Some(matches!(self.backend.weight(*weight), Ok(GpuWeight::W4(_)))),
            _ => None,
        });
        let few_rows = if packed.all(|packed| packed) { self.pair_rows() } else { 0 };
        Ok(DraftOp { rows: RowMode::All, levels: vec![(few_rows, vec![choice]), (u32::MAX, vec![again, grouping])] })
    }

    /// Brings the rows of an expert together, for tiled products.
    fn group(&mut self, routes: BufferId, experts: u32, top_k: u32) -> Result<Draft> {
        let (pairs, tiles) = self.pairs(experts, top_k)?;
        let params = group::Params {
            experts,
            top_k,
            routes_stride: self.stride(routes),
            tiles_max: group::tiles(experts, top_k, self.max_tokens),
        };
        let storage = vec![self.buffer(routes), pairs, tiles];
        let launch = move |step: &Step| Launch { grid: group::grid(), cost: group::cost(&params, step.n_tokens) };
        self.draft(&group::KERNEL, self.variant(), &params, storage, launch)
    }

    /// Pairs and tiles as `group` writes them.
    fn pairs(&mut self, experts: u32, top_k: u32) -> Result<(wgpu::Buffer, wgpu::Buffer)> {
        if let Some(pairs) = &self.pair_buffers {
            return Ok(pairs.clone());
        }
        let pairs = u64::from(self.max_tokens) * u64::from(top_k) * 4;
        let tiles = u64::from(group::tiles(experts, top_k, self.max_tokens)) * 16;
        let made = (self.storage("rows by expert", pairs)?, self.storage("tiles of rows by expert", tiles)?);
        Ok(self.pair_buffers.insert(made).clone())
    }

    /// Gate and up of packed experts and their product as one, for the packed experts that follow; `None` where the
    /// operations at the start of `ops` are others.
    pub(super) fn experts_glu(&mut self, ops: &[Op]) -> Result<Option<(DraftOp, usize)>> {
        let [
            Op::Experts { x, weight, count, routes, out },
            Op::Glu { x: gate_up, out: product, activation },
            Op::Experts { x: next, weight: down, .. },
            rest @ ..,
        ] = ops
        else {
            return Ok(None);
        };
        let op = Experts { x: *x, weight: *weight, count: *count, routes: *routes, out: *out };
        let (GpuWeight::W4(matrix), GpuWeight::W4(_)) = (self.backend.weight(*weight)?, self.backend.weight(*down)?)
        else {
            return Ok(None);
        };
        let (n, expert_rows) = self.outputs(&op, matrix.n)?;
        let top_k = self.per_token(*product);
        let whole = out.buffer == *gate_up && out.offset == 0 && self.width(*gate_up)? == n;
        let halves = self.width(*product)?.checked_mul(2) == Some(n) && self.width(*x)? == matrix.k;
        if !whole || !halves || next != product || self.per_token(*x) != 1 || reads_before_write(rest, *product) {
            return Ok(None);
        }
        let mut few = vec![self.stage(*x, None, *x, RowMode::All)?];
        for part in &matrix.parts {
            let params = gemv_w4_glu_experts::Params {
                n,
                k: matrix.k,
                chunks: matrix.chunks,
                group_size: matrix.group_size,
                group_shift: gemv_w4::group_shift(matrix.group_size, matrix.k),
                groups: matrix.groups,
                flags: matrix.flags,
                stage_quads: self.quads(*product)?,
                activation: activation_of(*activation) as u32,
                top_k,
                routes_stride: self.stride(*routes),
                first_expert: part.first_row / expert_rows,
                experts: part.rows / expert_rows,
                expert_rows,
                ..Default::default()
            };
            let storage = vec![
                self.staged(*x)?,
                part.qweight.clone(),
                part.group_params.clone(),
                self.buffer(*routes),
                self.staged(*product)?,
            ];
            let launch = move |step: &Step| Launch {
                grid: gemv_w4_glu_experts::grid(&params, step.n_tokens),
                cost: gemv_w4_glu_experts::cost(&params, step.n_tokens),
            };
            let variant = self.sized(matrix, Form::Pair, (n / 2).div_ceil(32).saturating_mul(top_k));
            few.push(self.draft(&gemv_w4_glu_experts::KERNEL, variant, &params, storage, launch)?);
        }
        let mut many = self.experts_many(matrix, &op, top_k, true)?;
        many.extend(self.op(&ops[1], &[])?.many());
        self.ready = Some(*product);
        Ok(Some((DraftOp { rows: RowMode::All, levels: vec![(self.pair_rows(), few), (u32::MAX, many)] }, 2)))
    }

    /// Most rows of a step whose experts are multiplied a pair of row and expert at a time.
    fn pair_rows(&self) -> u32 {
        if self.pass.is_some() { self.few_rows } else { gemv_rows(self.backend.gpu.summary.kind).min(self.few_rows) }
    }

    /// `ready` is the buffer whose staged form is up to date.
    pub(super) fn experts(&mut self, op: &Experts, ready: Option<BufferId>) -> Result<DraftOp> {
        let backend = self.backend;
        let (top_k, shared) = (self.per_token(op.out.buffer), self.per_token(op.x) == 1);
        if !shared && self.per_token(op.x) != top_k {
            return Err(unsupported("experts read a row of a token, or one each"));
        }
        self.fits(op.routes.into(), 2 * top_k)?;
        match backend.weight(op.weight)? {
            GpuWeight::W4(matrix) => {
                let few = self.experts_few(matrix, op, top_k, shared, ready)?;
                let many = self.experts_many(matrix, op, top_k, shared)?;
                Ok(DraftOp { rows: RowMode::All, levels: vec![(self.pair_rows(), few), (u32::MAX, many)] })
            }
            GpuWeight::Dense(matrix) => {
                Ok(DraftOp::always(RowMode::All, self.experts_dense(matrix, op, top_k, shared)?))
            }
            _ => Err(unsupported("experts of this form")),
        }
    }

    /// Outputs of an expert and rows from one to the next in `rows` rows of all.
    fn outputs(&self, op: &Experts, rows: u32) -> Result<(u32, u32)> {
        let expert_rows = rows / op.count.max(1);
        let n = match self.backend.weight(WeightId(op.weight.0 + 1)) {
            Ok(GpuWeight::Expert { n, first }) if *first == op.weight.0 => *n,
            _ => expert_rows.min(self.width(op.out.buffer)? - op.out.offset),
        };
        self.fits(op.out, n)?;
        Ok((n, expert_rows))
    }

    /// A pair at a time, from staged inputs.
    fn experts_few(
        &mut self,
        matrix: &'a GpuW4,
        op: &Experts,
        top_k: u32,
        shared: bool,
        ready: Option<BufferId>,
    ) -> Result<Vec<Draft>> {
        let (n, expert_rows) = self.outputs(op, matrix.n)?;
        if self.width(op.x)? != matrix.k {
            return Err(unsupported("experts of another width than their input"));
        }
        let mut drafts = Vec::new();
        if ready != Some(op.x) {
            drafts.push(self.stage(op.x, None, op.x, RowMode::All)?);
        }
        for part in &matrix.parts {
            let params = gemv_w4_experts::Params {
                n,
                k: matrix.k,
                chunks: matrix.chunks,
                group_size: matrix.group_size,
                group_shift: gemv_w4::group_shift(matrix.group_size, matrix.k),
                groups: matrix.groups,
                out_stride: self.stride(op.out.buffer),
                out_offset: op.out.offset,
                flags: matrix.flags & !FLAG_NORM,
                eps: 0.0,
                top_k,
                shared_input: u32::from(shared),
                routes_stride: self.stride(op.routes),
                first_expert: part.first_row / expert_rows,
                experts: part.rows / expert_rows,
                expert_rows,
            };
            let storage = vec![
                self.staged(op.x)?,
                part.qweight.clone(),
                part.group_params.clone(),
                self.buffer(op.routes),
                self.buffer(op.out.buffer),
            ];
            let launch = move |step: &Step| Launch {
                grid: gemv_w4_experts::grid(&params, step.n_tokens),
                cost: gemv_w4_experts::cost(&params, step.n_tokens),
            };
            let workgroups = n.div_ceil(w4::TILE_N as u32).saturating_mul(top_k);
            let variant = self.sized(matrix, Form::One, workgroups);
            drafts.push(self.draft(&gemv_w4_experts::KERNEL, variant, &params, storage, launch)?);
        }
        Ok(drafts)
    }

    /// Tiles of the pairs of an expert.
    fn experts_many(&mut self, matrix: &'a GpuW4, op: &Experts, top_k: u32, shared: bool) -> Result<Vec<Draft>> {
        let (n, expert_rows) = self.outputs(op, matrix.n)?;
        let (pairs, tiles) = self.pairs(op.count, top_k)?;
        let count = op.count;
        let mut drafts = Vec::new();
        for part in &matrix.parts {
            let params = gemm_w4_experts::Params {
                n,
                k: matrix.k,
                chunks: matrix.chunks,
                group_size: matrix.group_size,
                groups: matrix.groups,
                x_stride: self.stride(op.x),
                out_stride: self.stride(op.out.buffer),
                out_offset: op.out.offset,
                flags: matrix.flags,
                top_k,
                shared_input: u32::from(shared),
                first_expert: part.first_row / expert_rows,
                experts: part.rows / expert_rows,
                expert_rows,
                ..Default::default()
            };
            let storage = vec![
                self.buffer(op.x),
                part.qweight.clone(),
                part.group_params.clone(),
                self.memory.dummy.clone(),
                self.buffer(op.out.buffer),
                pairs.clone(),
                tiles.clone(),
            ];
            let launch = move |step: &Step| Launch {
                grid: gemm_w4_experts::grid(n, group::tiles(count, top_k, step.n_tokens)),
                cost: gemm_w4_experts::cost(&params, step.n_tokens),
            };
            drafts.push(self.draft(&gemm_w4_experts::KERNEL, self.variant(), &params, storage, launch)?);
        }
        Ok(drafts)
    }

    fn experts_dense(&mut self, matrix: &'a GpuDense, op: &Experts, top_k: u32, shared: bool) -> Result<Vec<Draft>> {
        let (n, expert_rows) = self.outputs(op, matrix.n)?;
        let (pairs, tiles) = self.pairs(op.count, top_k)?;
        let count = op.count;
        let mut drafts = Vec::new();
        for part in &matrix.parts {
            let params = gemm_dense_experts::Params {
                n,
                k: matrix.k,
                row_words: matrix.row_words,
                x_stride: self.stride(op.x),
                out_stride: self.stride(op.out.buffer),
                out_offset: op.out.offset,
                top_k,
                shared_input: u32::from(shared),
                first_expert: part.first_row / expert_rows,
                experts: part.rows / expert_rows,
                expert_rows,
                ..Default::default()
            };
            let storage = vec![
                self.buffer(op.x),
                part.words.clone(),
                self.memory.dummy.clone(),
                self.buffer(op.out.buffer),
                pairs.clone(),
                tiles.clone(),
            ];
            let launch = move |step: &Step| Launch {
                grid: gemm_dense_experts::grid(n, group::tiles(count, top_k, step.n_tokens)),
                cost: gemm_dense_experts::cost(&params, step.n_tokens),
            };
            let variant = Variant { dense: dense(matrix.dtype), ..self.variant() };
            drafts.push(self.draft(&gemm_dense_experts::KERNEL, variant, &params, storage, launch)?);
        }
        Ok(drafts)
    }

    pub(super) fn combine(&mut self, x: BufferId, routes: BufferId, out: BufferId) -> Result<DraftOp> {
        let (width, top_k) = (self.width(out)?, self.width(routes)? / 2);
        self.fits(x.into(), width)?;
        let params = combine::Params {
            width,
            top_k,
            x_stride: self.stride(x),
            routes_stride: self.stride(routes),
            out_stride: self.stride(out),
            ..Default::default()
        };
        let storage = vec![self.buffer(x), self.buffer(routes), self.buffer(out)];
        let launch = move |step: &Step| Launch {
            grid: combine::grid(&params, step.n_tokens),
            cost: combine::cost(&params, step.n_tokens),
        };
        let draft = self.draft(&combine::KERNEL, self.variant(), &params, storage, launch)?;
        Ok(DraftOp::always(RowMode::All, vec![draft]))
    }

    pub(super) fn gate(&mut self, x: BufferId, by: BufferId) -> Result<DraftOp> {
        let params = gate::Params {
            width: self.width(x)?,
            stride: self.stride(x),
            gate_stride: self.stride(by),
            ..Default::default()
        };
        let storage = vec![self.buffer(x), self.buffer(by)];
        let launch = move |step: &Step| Launch {
            grid: gate::grid(&params, step.n_tokens),
            cost: gate::cost(&params, step.n_tokens),
        };
        let draft = self.draft(&gate::KERNEL, self.variant(), &params, storage, launch)?;
        Ok(DraftOp::always(RowMode::All, vec![draft]))
    }
}
