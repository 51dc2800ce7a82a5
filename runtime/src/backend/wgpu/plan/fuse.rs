//! Runs of operations that one kernel computes for few rows: a launch costs as much time as reading megabytes of weights.

use awqua_shaders::{FLAG_BIAS, FLAG_NORM, RowMode, Step, gemv_w4, gemv_w4_rope, gemv_w4_swiglu};

use super::super::weights::{GpuW4, GpuWeight};
use super::{Draft, DraftOp, Launch, Planner, gemv_rows, row_mode};
use crate::backend::{BufferId, Op, Rows, WeightId};
use crate::error::Result;

/// A norm over whole rows and where its result goes.
#[derive(Clone, Copy)]
struct Norm {
    x: BufferId,
    weight: WeightId,
    out: BufferId,
    dim: u32,
    eps: f32,
}

impl Norm {
    fn of(op: &Op) -> Option<Self> {
        match *op {
            Op::RmsNorm { x, weight, out, dim, segments: 1, eps, rows: Rows::All }
                if x.offset == 0 && out.offset == 0 && x.buffer != out.buffer =>
            {
                Some(Self { x: x.buffer, weight, out: out.buffer, dim, eps })
            }
            _ => None,
        }
    }
}

impl<'a> Planner<'a> {
    /// The operations at the start of `ops` as one, and how many they are; `None` where there is nothing to gain.
    pub(super) fn fused(&mut self, ops: &[Op]) -> Result<Option<(DraftOp, usize)>> {
        let Some(norm) = ops.first().and_then(Norm::of) else { return Ok(None) };
        if self.width(norm.x)? != norm.dim || self.width(norm.out)? != norm.dim {
            return Ok(None);
        }
        let few = match ops {
            [_, linear, Op::RopeAppend { qkv, layer, rope }, ..] => {
                self.norm_linear_rope(norm, linear, *qkv, *layer, *rope)?.map(|draft| (vec![draft], 3))
            }
            [_, linear, Op::SiluMul { x, out }, ..] => {
                self.norm_linear_swiglu(norm, linear, *x, *out)?.map(|draft| (vec![draft], 3))
            }
            _ => None,
        };
        let few = match few {
            Some(few) => Some(few),
            None => self.norm_linears(norm, &ops[1..])?,
        };
        let Some((few, count)) = few else { return Ok(None) };
        if reads_before_write(&ops[count..], norm.out) {
            return Ok(None);
        }
        let mut many = Vec::new();
        for op in &ops[..count] {
            let op = self.op(op)?;
            many.extend(if op.many.is_empty() { op.few } else { op.many });
        }
        Ok(Some((DraftOp { rows: RowMode::All, few_rows: gemv_rows(self.backend.gpu.summary.kind), few, many }, count)))
    }

    /// Norm, q, k and v projections, rotation and the way to the cache.
    fn norm_linear_rope(
        &mut self,
        norm: Norm,
        linear: &Op,
        qkv: BufferId,
        layer: u32,
        rope: Option<u32>,
    ) -> Result<Option<Draft>> {
        let shape = self.program.attention;
        let rotary_dim = if rope.is_some() { shape.rotary_dim } else { 0 };
        let Some((matrix, bias)) = self.whole_matrix(linear, norm.out, qkv)? else { return Ok(None) };
        if matrix.n != (shape.heads + 2 * shape.kv_heads) * shape.head_dim
            || self.width(qkv)? != matrix.n
            || !gemv_w4_rope::handles(shape.head_dim, rotary_dim)
        {
            return Ok(None);
        }
        let norm_weight = self.vector(norm.weight, norm.dim)?;
        let norm_bias = match bias {
            None => norm_weight,
            Some(bias) => {
                let bias = self.vector(bias, matrix.n)?;
                self.joined(&norm_weight, u64::from(norm.dim) * 4, &bias, u64::from(matrix.n) * 4)?
            }
        };
        let base = self.normed_params(norm, matrix, qkv, bias.is_some());
        let params = gemv_w4_rope::Params {
            n: base.n,
            k: base.k,
            chunks: base.chunks,
            group_size: base.group_size,
            groups: base.groups,
            x_stride: base.x_stride,
            out_stride: base.out_stride,
            flags: base.flags,
            eps: base.eps,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            rotary_dim,
            context: self.memory.context,
            ..Default::default()
        };
        let table = match rope {
            Some(table) => self.memory.rope(table)?.clone(),
            None => self.memory.dummy.clone(),
        };
        let (keys, values) = self.memory.cache(layer)?;
        let part = &matrix.parts[0];
        let storage = vec![
            self.buffer(norm.x),
            part.qweight.clone(),
            part.group_params.clone(),
            norm_bias,
            table,
            self.buffer(qkv),
            keys.clone(),
            values.clone(),
        ];
        let launch = move |step: &Step| Launch {
            grid: gemv_w4_rope::grid(&params, step.n_tokens),
            cost: gemv_w4_rope::cost(&params, step.n_tokens),
        };
        self.draft(&gemv_w4_rope::KERNEL, self.variant(), &params, storage, launch).map(Some)
    }

    /// Norm, gate and up projections, and their product.
    fn norm_linear_swiglu(&mut self, norm: Norm, linear: &Op, x: BufferId, out: BufferId) -> Result<Option<Draft>> {
        let Some((matrix, bias)) = self.whole_matrix(linear, norm.out, x)? else { return Ok(None) };
        if self.width(x)? != matrix.n || self.width(out)? != matrix.n / 2 || matrix.n % 2 != 0 {
            return Ok(None);
        }
        let params = self.normed_params(norm, matrix, out, bias.is_some());
        let bias = match bias {
            Some(bias) => self.vector(bias, matrix.n)?,
            None => self.memory.dummy.clone(),
        };
        let part = &matrix.parts[0];
        let norm_weight = self.vector(norm.weight, norm.dim)?;
        let storage = vec![
            self.buffer(norm.x),
            part.qweight.clone(),
            part.group_params.clone(),
            bias,
            norm_weight,
            self.buffer(out),
        ];
        let launch = move |step: &Step| Launch {
            grid: gemv_w4_swiglu::grid(&params, step.n_tokens),
            cost: gemv_w4_swiglu::cost(&params, step.n_tokens),
        };
        self.draft(&gemv_w4_swiglu::KERNEL, self.variant(), &params, storage, launch).map(Some)
    }

    /// Norm and the packed projections that follow it.
    fn norm_linears(&mut self, norm: Norm, ops: &[Op]) -> Result<Option<(Vec<Draft>, usize)>> {
        let mut few = Vec::new();
        let mut count = 1;
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
            let bias_buffer = match bias {
                Some(bias) => self.vector(bias, matrix.n)?,
                None => self.memory.dummy.clone(),
            };
            let norm_weight = self.vector(norm.weight, norm.dim)?;
            for part in &matrix.parts {
                let params = gemv_w4::Params {
                    n: part.rows,
                    out_offset: out.offset + part.first_row,
                    bias_offset: part.first_row,
                    ..self.normed_params(norm, matrix, out.buffer, bias.is_some())
                };
                let storage = vec![
                    self.buffer(norm.x),
                    part.qweight.clone(),
                    part.group_params.clone(),
                    bias_buffer.clone(),
                    norm_weight.clone(),
                    self.buffer(out.buffer),
                ];
                let launch = move |step: &Step| Launch {
                    grid: gemv_w4::grid(&params, step.n_tokens),
                    cost: gemv_w4::cost(&params, step.n_tokens),
                };
                few.push(self.draft(&gemv_w4::KERNEL, self.variant(), &params, storage, launch)?);
            }
            count += 1;
        }
        Ok((count > 1).then_some((few, count)))
    }

    /// The matrix in one part and the bias of a linear layer from `x` to the whole of `out`.
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

    fn normed_params(&self, norm: Norm, matrix: &GpuW4, out: BufferId, bias: bool) -> gemv_w4::Params {
        gemv_w4::Params {
            n: matrix.n,
            k: matrix.k,
            chunks: matrix.chunks,
            group_size: matrix.group_size,
            groups: matrix.groups,
            x_stride: self.stride(norm.x),
            out_stride: self.stride(out),
            out_offset: 0,
            bias_offset: 0,
            flags: matrix.flags | FLAG_NORM | if bias { FLAG_BIAS } else { 0 },
            row_mode: row_mode(Rows::All) as u32,
            eps: norm.eps,
        }
    }

    /// A buffer with the first bytes of two others, one behind the other.
    fn joined(&self, a: &wgpu::Buffer, a_bytes: u64, b: &wgpu::Buffer, b_bytes: u64) -> Result<wgpu::Buffer> {
        let gpu = &self.backend.gpu;
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
        let buffer = gpu.buffer("a norm with a bias", a_bytes + b_bytes, usage)?;
        let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("join") });
        encoder.copy_buffer_to_buffer(a, 0, &buffer, 0, a_bytes);
        encoder.copy_buffer_to_buffer(b, 0, &buffer, a_bytes, b_bytes);
        gpu.submit(Some(encoder.finish()));
        Ok(buffer)
    }
}

/// Whether one of `ops` reads `buffer` before another one writes it anew.
fn reads_before_write(ops: &[Op], buffer: BufferId) -> bool {
    for op in ops {
        let (reads, writes) = match *op {
            Op::Embed { out, .. } => (None, out),
            Op::RmsNorm { x, out, .. } => (Some(x.buffer), out.buffer),
            Op::Linear { x, out, .. } => (Some(x), out.buffer),
            Op::RopeAppend { qkv, .. } => (Some(qkv), qkv),
            Op::Attention { qkv, out, .. } => (Some(qkv), out),
            Op::SiluMul { x, out } => (Some(x), out),
        };
        if reads == Some(buffer) {
            return true;
        }
        if writes == buffer {
            return false;
        }
    }
    false
}
