//! Rotation, the cache and attention.

use awqua_shaders::cuda::{self, AttentionAnyArgs, AttentionArgs, AttentionCoopArgs, RopeAppendArgs};
use awqua_shaders::{Cost, RowMode, Step};

use super::super::memory::{FEW, Form};
use super::fuse::feeds_matrix;
use super::{PlannedOp, Planner, call, unsupported};
use crate::backend::{BufferId, KvType, Op, WeightId};
use crate::error::Result;

/// Base 2 exponentials are what the hardware has.
const LOG2_E: f32 = std::f32::consts::LOG2_E;

impl Planner<'_> {
    /// Whether attention with output `out`, in front of `rest`, runs on the matrix units: from half precision queries,
    /// to the inputs of the matrix that follows.
    pub(super) fn is_fast(&self, out: BufferId, rest: &[Op]) -> bool {
        let shape = self.program.attention;
        let q8 = self.memory.kv_type == KvType::Q8;
        let shared = cuda::attention_shared(shape.head_dim, q8).max(cuda::attention_coop_shared(shape.head_dim));
        self.memory.kv_type != KvType::F32
            && cuda::HEAD_DIMS.contains(&shape.head_dim)
            && shared <= self.backend.gpu.limits.shared
            && feeds_matrix(out, rest)
    }

    /// `norms` are those of each head of q and k; `rest` are the operations that follow.
    pub(super) fn rope_append(
        &mut self,
        qkv: BufferId,
        layer: u32,
        rope: Option<u32>,
        norms: [Option<(WeightId, f32)>; 2],
        rest: &[Op],
    ) -> Result<PlannedOp> {
        let shape = self.program.attention;
        let heads = shape.heads + 2 * shape.kv_heads;
        self.fits(qkv.into(), heads.saturating_mul(shape.head_dim))?;
        let (address, qkv_stride) = self.rows(qkv)?;
        // Attention follows, and reads queries where this leaves them.
        let fast = match *rest {
            [Op::Attention { out, .. }, ref behind @ ..] => self.is_fast(out, behind),
            _ => false,
        };
        let norm = |norm: Option<(WeightId, f32)>| match norm {
            Some((weight, _)) => self.vector(weight, shape.head_dim),
            None => Ok(0),
        };
        let (q_norm, k_norm) = (norm(norms[0])?, norm(norms[1])?);
        let arguments = RopeAppendArgs {
            qkv: address,
            q: if fast { self.memory.queries(self.stream, self.program)? } else { 0 },
            q_norm,
            k_norm,
            rows: self.memory.address(self.memory.rows),
            qkv_stride,
            q_stride: shape.heads * shape.head_dim,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            rotary_dim: if rope.is_some() { shape.rotary_dim } else { 0 },
            layer,
            kv: self.kv_number(),
            eps: norms.iter().flatten().next().map_or(0.0, |(_, eps)| *eps),
            table: self.table(rope)?,
            layers: self.program.layers,
            pad: 0,
        };
        let shared = cuda::rope_append_shared(shape.head_dim, self.memory.kv_type == KvType::Q8);
        if shared > self.backend.gpu.limits.shared {
            return Err(unsupported(&format!("a KV cache of 8 bits with heads of {} elements", shape.head_dim)));
        }
        let function = self.backend.gpu.function("rope_append")?;
        let width = u64::from(heads) * u64::from(shape.head_dim);
        let call = call("rope_append", function, 256, shared, move |step| {
            let elements = u64::from(step.n_tokens) * width;
            let cost = Cost { bytes: elements * 6, flops: elements * 3 };
            ([heads.div_ceil(8), step.n_tokens, 1], arguments, cost)
        });
        Ok(PlannedOp::always(RowMode::All, vec![call]))
    }

    /// The kernels' number of the cache's type.
    fn kv_number(&self) -> u32 {
        match self.memory.kv_type {
            KvType::F16 => cuda::KV_F16,
            KvType::F32 => cuda::KV_F32,
            KvType::Q8 => cuda::KV_Q8,
        }
    }

    /// `rest` are the operations that follow.
    pub(super) fn attention(&mut self, op: &Op, rest: &[Op]) -> Result<PlannedOp> {
        let Op::Attention { qkv, out, layer, scale, softcap, window } = *op else {
            return Err(unsupported("this operation is no attention"));
        };
        let shape = self.program.attention;
        if shape.head_dim > 512 {
            return Err(unsupported(&format!("heads of {} elements, more than 512", shape.head_dim)));
        }
        let heads = shape.heads * shape.head_dim;
        self.fits(qkv.into(), heads + 2 * shape.kv_heads * shape.head_dim)?;
        self.fits(out.into(), heads)?;
        let window = window.unwrap_or(0);
        // Scores are in units of log2(e) behind the bound.
        let (scale, cap) = softcap.map_or((scale * LOG2_E, 0.0), |cap| (scale / cap, cap * LOG2_E));
        let kv_row = self.memory.kv_type.row_bytes(shape.head_dim);
        let cost = move |step: &Step, again: u64| {
            let n = u64::from(step.n_tokens);
            let most = if window == 0 { u64::MAX } else { u64::from(window) };
            let seen = (u64::from(step.position) + n.div_ceil(2)).min(most);
            let kv = u64::from(shape.kv_heads) * 2 * kv_row;
            Cost { bytes: seen * kv * again + n * u64::from(heads) * 4, flops: 4 * n * seen * u64::from(heads) }
        };
        let rows = self.memory.address(self.memory.rows);
        if !self.is_fast(out, rest) {
            let ((qkv, qkv_stride), (out, out_stride)) = (self.rows(qkv)?, self.rows(out)?);
            let arguments = AttentionAnyArgs {
                qkv,
                rows,
                out,
                qkv_stride,
                out_stride,
                heads: shape.heads,
                kv_heads: shape.kv_heads,
                head_dim: shape.head_dim,
                layer,
                window,
                kv: self.kv_number(),
                scale,
                cap,
                layers: self.program.layers,
                pad: 0,
            };
            let function = self.backend.gpu.function("attention_any")?;
            let call = call("attention_any", function, 256, 0, move |step| {
                let n = u64::from(step.n_tokens);
                ([shape.heads.div_ceil(8), step.n_tokens, 1], arguments, cost(step, n))
            });
            return Ok(PlannedOp::always(RowMode::All, vec![call]));
        }

        let q = self.memory.queries(self.stream, self.program)?;
        let (few, many) = (
            self.memory.staged(self.stream, self.program, out, Form::Rows)?,
            self.memory.staged(self.stream, self.program, out, Form::Tiles)?,
        );
        let splits = self.memory.splits(self.stream, self.program)?;
        let q8 = self.memory.kv_type == KvType::Q8;
        let [name, many_name] = cuda::attention_names(shape.head_dim, q8)
            .ok_or_else(|| unsupported(&format!("heads of {} elements on the matrix units", shape.head_dim)))?;
        let arguments = AttentionArgs {
            q,
            rows,
            out: few.address,
            partial: splits.partial,
            weights: splits.weights,
            arrived: splits.arrived,
            q_stride: heads,
            out_stride: few.stride,
            out_tiled: 0,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            layer,
            window,
            scale,
            cap,
            layers: self.program.layers,
        };
        let head_blocks = (shape.heads / shape.kv_heads).div_ceil(cuda::MANY_HEADS);
        let threads = cuda::ATTENTION_WARPS * 32;
        let function = self.backend.gpu.function(name)?;
        let few_call = call(name, function, threads, cuda::attention_shared(shape.head_dim, q8), move |step| {
            let grid = [splits.number, shape.kv_heads * head_blocks, step.n_tokens];
            (grid, arguments, cost(step, u64::from(step.n_tokens)))
        });
        let arguments = AttentionCoopArgs {
            q,
            rows,
            out: many.address,
            tokens: 0,
            q_stride: heads,
            out_stride: many.stride,
            out_tiled: 1,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            layer,
            window,
            scale,
            cap,
            layers: self.program.layers,
            pad: 0,
        };
        let function = self.backend.gpu.function(many_name)?;
        let shared = cuda::attention_coop_shared(shape.head_dim);
        let many_call = call(many_name, function, 256, shared, move |step| {
            let blocks = step.n_tokens.div_ceil(cuda::COOP_TOKENS);
            let arguments = AttentionCoopArgs { tokens: step.n_tokens, ..arguments };
            ([blocks, shape.heads, 1], arguments, cost(step, u64::from(blocks)))
        });
        self.ready = Some((out, 1.0));
        Ok(PlannedOp { rows: RowMode::All, levels: vec![(FEW, vec![few_call]), (u32::MAX, vec![many_call])] })
    }
}
