//! Runs of operations that one kernel computes for few rows: a launch costs as much time as reading megabytes of weights.

use awqua_shaders::{FLAG_BIAS, FLAG_GLU, FLAG_NORM, RowMode, Step, gemv_w4_rope, gemv_w4_rows, gemv_w4_swiglu};

use super::super::tuning::Form;
use super::super::weights::{GpuW4, GpuWeight};
use super::linear::{Few, Gemv, matrix_params, rows_params};
use super::{Draft, DraftOp, Launch, Planner, activation_of};
use crate::backend::{Activation, BufferId, NormKind, Op, Rows, WeightId};
use crate::error::Result;

/// A norm over whole rows and where its result goes.
#[derive(Clone, Copy)]
pub(super) struct Norm {
    pub(super) x: BufferId,
    pub(super) weight: WeightId,
    pub(super) out: BufferId,
    dim: u32,
    pub(super) eps: f32,
}

impl Norm {
    pub(super) fn of(op: &Op) -> Option<Self> {
        match *op {
            Op::Norm {
                kind: NormKind::Rms,
                x,
                weight,
                bias: None,
                out,
                dim,
                segments: 1,
                eps,
                accumulate: false,
                rows: Rows::All,
            } if x.offset == 0 && out.offset == 0 && x.buffer != out.buffer => {
                Some(Self { x: x.buffer, weight, out: out.buffer, dim, eps })
            }
            _ => None,
        }
    }
}

/// What [`Planner::fused`] found.
struct Fused {
    few: Few,
    /// Operations that it computes.
    count: usize,
    /// The buffer whose staged form it leaves.
    ready: Option<BufferId>,
}

impl<'a> Planner<'a> {
    /// The operations at the start of `ops` as one, and how many they are; `None` where there is nothing to gain.
    pub(super) fn fused(&mut self, ops: &[Op]) -> Result<Option<(DraftOp, usize)>> {
        if let Some(Op::Experts { .. }) = ops.first() {
            return self.experts_glu(ops);
        }
        let Some(norm) = ops.first().and_then(Norm::of) else { return Ok(None) };
        if self.width(norm.x)? != norm.dim || self.width(norm.out)? != norm.dim {
            return Ok(None);
        }
        let fused = match ops {
            [_, linear, Op::RopeAppend { qkv, layer, rope }, ..] if self.pass.is_none() => {
                let few = self.linear_rope(norm, linear, *qkv, *layer, *rope)?;
                few.map(|few| Fused { few, count: 3, ready: None })
            }
            [_, linear, Op::Glu { x, out, activation }, rest @ ..] => {
                self.linear_glu(norm, linear, (*x, *out), *activation, rest)?
            }
            _ => None,
        };
        let fused = match fused {
            Some(fused) => Some(fused),
            None => self.linears(norm, &ops[1..])?,
        };
        let Some(Fused { mut few, count, ready }) = fused else { return Ok(None) };
        if reads_before_write(&ops[count..], norm.out) {
            return Ok(None);
        }
        if self.ready != Some(norm.out) {
            for drafts in [&mut few.one, &mut few.several].into_iter().filter(|drafts| !drafts.is_empty()) {
                drafts.insert(0, self.stage(norm.x, Some(norm.weight), norm.out, RowMode::All)?);
            }
        }
        let many = if self.pass.is_none() { self.many(norm, &ops[..count], &ops[count..])? } else { Vec::new() };
        self.ready = ready;
        Ok(Some((DraftOp { rows: RowMode::All, levels: self.levels(few, many) }, count)))
    }

    /// The operations `ops`, which begin with `norm`, for many rows; `rest` are those that follow.
    fn many(&mut self, norm: Norm, ops: &[Op], rest: &[Op]) -> Result<Vec<Draft>> {
        let first = self.halve_norm(norm, &ops[1..])?;
        let halved = first.is_some().then_some(norm.out);
        let mut many: Vec<Draft> = first.into_iter().collect();
        let mut left = None;
        for (i, op) in ops.iter().enumerate().skip(many.len()) {
            if let Op::Glu { x, out, activation } = *op
                && i + 1 == ops.len()
                && let Some(draft) = self.halve_glu(x, out, activation, rest)?
            {
                many.push(draft);
                left = Some(out);
                continue;
            }
            self.halved = halved;
            many.extend(self.op(op, &[])?.many());
        }
        self.halved = left;
        Ok(many)
    }

    /// q, k and v projections, rotation and the way to the cache.
    fn linear_rope(
        &mut self,
        norm: Norm,
        linear: &Op,
        qkv: BufferId,
        layer: u32,
        rope: Option<u32>,
    ) -> Result<Option<Few>> {
        let shape = self.program.attention;
        let rotary_dim = if rope.is_some() { shape.rotary_dim } else { 0 };
        let Some((matrix, bias)) = self.whole_matrix(linear, norm.out, qkv)? else { return Ok(None) };
        if matrix.n != (shape.heads + 2 * shape.kv_heads) * shape.head_dim
            || self.width(qkv)? != matrix.n
            || !gemv_w4_rope::handles(shape.head_dim, rotary_dim, self.variant().kv)
        {
            return Ok(None);
        }
        let base = matrix_params(matrix);
        let params = gemv_w4_rope::Params {
            n: base.n,
            k: base.k,
            chunks: base.chunks,
            group_size: base.group_size,
            group_shift: base.group_shift,
            groups: base.groups,
            out_stride: self.stride(qkv),
            flags: base.flags | FLAG_NORM | if bias.is_some() { FLAG_BIAS } else { 0 },
            eps: norm.eps,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            rotary_dim,
            context: self.memory.context,
            prefix: self.memory.shared(),
            ..Default::default()
        };
        let table = match rope {
            Some(table) => self.memory.rope(table)?.clone(),
            None => self.memory.dummy.clone(),
        };
        let (keys, values) = self.memory.cache(layer)?;
        let part = &matrix.parts[0];
        let storage = vec![
            self.staged(norm.out)?,
            part.qweight.clone(),
            part.group_params.clone(),
            self.bias(bias, matrix.n)?,
            table,
            self.buffer(qkv),
            keys.clone(),
            values.clone(),
        ];
        let launch = move |step: &Step| Launch {
            grid: gemv_w4_rope::grid(&params, step.n_tokens),
            cost: gemv_w4_rope::cost(&params, step.n_tokens),
        };
        let variant = self.sized(matrix, Form::Pair, (matrix.n / 2).div_ceil(32));
        let one = vec![self.draft(&gemv_w4_rope::KERNEL, variant, &params, storage, launch)?];
        let mut several = Vec::new();
        if self.backend.takes_rows() {
            several.push(self.gemv(&Gemv {
                input: norm.out,
                norm_eps: Some(norm.eps),
                matrix,
                part,
                bias,
                out: qkv.into(),
                accumulate: false,
                rows: RowMode::All,
                target: None,
                form: Form::Rows,
            })?);
            several.extend(self.rope_append(qkv, layer, rope)?.many());
        }
        Ok(Some(Few { one, several }))
    }

    /// Gate and up projections and their product, for the packed matrix that follows.
    fn linear_glu(
        &mut self,
        norm: Norm,
        linear: &Op,
        (x, out): (BufferId, BufferId),
        activation: Activation,
        rest: &[Op],
    ) -> Result<Option<Fused>> {
        let Some((matrix, bias)) = self.whole_matrix(linear, norm.out, x)? else { return Ok(None) };
        if self.width(x)? != matrix.n || self.width(out)?.checked_mul(2) != Some(matrix.n) {
            return Ok(None);
        }
        let Some(target) = self.stage_target(out, Some(norm.out), rest)?.filter(|target| target.norm.is_none()) else {
            return Ok(None);
        };
        let base = matrix_params(matrix);
        let flags = base.flags | FLAG_NORM | if bias.is_some() { FLAG_BIAS } else { 0 };
        let several = gemv_w4_rows::Params {
            flags: flags | FLAG_GLU,
            row_mode: RowMode::All as u32,
            eps: norm.eps,
            stage_quads: target.quads,
            activation: activation_of(activation) as u32,
            ..rows_params(&base)
        };
        let params = gemv_w4_swiglu::Params {
            n: base.n,
            k: base.k,
            chunks: base.chunks,
            group_size: base.group_size,
            group_shift: base.group_shift,
            groups: base.groups,
            flags,
            row_mode: RowMode::All as u32,
            eps: norm.eps,
            stage_quads: target.quads,
            activation: activation_of(activation) as u32,
            ..Default::default()
        };
        let part = &matrix.parts[0];
        let vectors = self.bias(bias, matrix.n)?;
        let storage = vec![
            self.staged(norm.out)?,
            part.qweight.clone(),
            part.group_params.clone(),
            vectors.clone(),
            target.buffer.clone(),
        ];
        let launch = move |step: &Step| Launch {
            grid: gemv_w4_swiglu::grid(&params, step.n_tokens),
            cost: gemv_w4_swiglu::cost(&params, step.n_tokens),
        };
        let variant = self.sized(matrix, Form::Pair, (matrix.n / 2).div_ceil(32));
        let few = self.few(|planner, form| {
            let draft = if form == Form::Rows && planner.has_rows_kernel(matrix) {
                let unwritten = planner.memory.unread.clone();
                let rest = [vectors.clone(), unwritten, target.buffer.clone()];
                planner.gemv_rows(matrix, part, several, norm.out, rest)?
            } else {
                planner.draft(&gemv_w4_swiglu::KERNEL, variant, &params, storage.clone(), launch)?
            };
            Ok(vec![draft])
        })?;
        Ok(Some(Fused { few, count: 3, ready: Some(target.of) }))
    }

    /// The packed projections that follow a norm.
    fn linears(&mut self, norm: Norm, ops: &[Op]) -> Result<Option<Fused>> {
        let mut linears = Vec::new();
        for op in ops {
            let Op::Linear { x, weight, bias, out, accumulate: false, rows: Rows::All } = *op else { break };
            if x != norm.out {
                break;
            }
            let GpuWeight::W4(matrix) = self.backend.weight(weight)? else { return Ok(None) };
            if matrix.k != norm.dim {
                return Ok(None);
            }
            self.fits(out, matrix.n)?;
            linears.push((matrix, bias, out));
        }
        if linears.is_empty() {
            return Ok(None);
        }
        let few = self.few(|planner, form| {
            let parts = linears.iter().flat_map(|linear| linear.0.parts.iter().map(move |part| (linear, part)));
            parts
                .map(|(&(matrix, bias, out), part)| {
                    planner.gemv(&Gemv {
                        input: norm.out,
                        norm_eps: Some(norm.eps),
                        matrix,
                        part,
                        bias,
                        out,
                        accumulate: false,
                        rows: RowMode::All,
                        target: None,
                        form,
                    })
                })
                .collect()
        })?;
        Ok(Some(Fused { few, count: 1 + linears.len(), ready: None }))
    }

    /// The matrix in one part and the bias of a linear layer from `from` to the whole of `to`.
    fn whole_matrix(&self, linear: &Op, from: BufferId, to: BufferId) -> Result<Option<(&'a GpuW4, Option<WeightId>)>> {
        match *linear {
            Op::Linear { x, weight, bias, out, accumulate: false, rows: Rows::All }
                if x == from && out.buffer == to && out.offset == 0 =>
            {
                match self.backend.weight(weight)? {
                    GpuWeight::W4(matrix) if matrix.parts.len() == 1 && matrix.k == self.width(from)? => {
                        Ok(Some((matrix, bias)))
                    }
                    _ => Ok(None),
                }
            }
            _ => Ok(None),
        }
    }

    /// The bias of a matrix with `n` outputs, or something to bind in its place.
    fn bias(&self, bias: Option<WeightId>, n: u32) -> Result<wgpu::Buffer> {
        match bias {
            Some(bias) => self.vector(bias, n),
            None => Ok(self.memory.dummy.clone()),
        }
    }
}

/// Whether one of `ops` reads `buffer` before another one writes it anew.
pub(super) fn reads_before_write(ops: &[Op], buffer: BufferId) -> bool {
    for op in ops {
        let (reads, writes) = match *op {
            Op::Embed { out, .. } => (None, out),
            Op::Norm { x, out, .. } => (Some(x.buffer), out.buffer),
            Op::Linear { x, out, .. } => (Some(x), out.buffer),
            Op::RopeAppend { qkv, .. } => (Some(qkv), qkv),
            Op::Attention { qkv, out, .. } => (Some(qkv), out),
            Op::Glu { x, out, .. } => (Some(x), out),
            Op::Scale { x, .. } => (Some(x), x),
            Op::Arrange { x, out, .. } => (Some(x), out),
            Op::Route { logits, routes, .. } => (Some(logits), routes),
            Op::Experts { x, out, .. } => (Some(x), out.buffer),
            Op::Combine { x, out, .. } => (Some(x), out),
            Op::Gate { x, .. } => (Some(x), x),
        };
        let adds =
            matches!(*op, Op::Norm { accumulate: true, .. } | Op::Linear { accumulate: true, .. } | Op::Combine { .. });
        if reads == Some(buffer) || adds && writes == buffer {
            return true;
        }
        if writes == buffer {
            return false;
        }
    }
    false
}
