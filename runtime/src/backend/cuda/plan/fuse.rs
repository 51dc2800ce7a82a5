//! Runs of operations that one kernel computes.

use awqua_shaders::cuda::{TILE, WIDE};

use super::super::weights::CudaWeight;
use super::linear::{Input, Norm, Site, Target};
use super::{PlannedOp, Planner, RowMode, row_mode};
use crate::backend::{BufferId, KvType, NormKind, Op, Rows, WeightId};
use crate::error::Result;

impl Planner<'_> {
    /// The operations at the start of `ops` as one, and how many they are; `None` where there is nothing to gain.
    pub(super) fn fused(&mut self, ops: &[Op]) -> Result<Option<(PlannedOp, usize)>> {
        match ops {
            [Op::Norm { x, .. }, ..] if self.is_of_heads(ops) => {
                let qkv = x.buffer;
                self.norms_and_rope(qkv, ops).map(Some)
            }
            [norm @ Op::Norm { .. }, linear @ Op::Linear { .. }, rest @ ..] => {
                let Some((input, rows)) = self.norm_input(norm)? else { return Ok(None) };
                let Op::Norm { out, .. } = *norm else { return Ok(None) };
                if !reads_before_write(rest, out.buffer) {
                    if let Some(planned) = self.rope_behind(input, linear, rest)? {
                        return Ok(Some((planned, 3)));
                    }
                    if let Some(planned) = self.glu_behind(input, linear, rest)? {
                        return Ok(Some((planned, 3)));
                    }
                }
                self.behind_norm(norm, input, rows, &ops[1..])
            }
            [Op::Experts { .. }, Op::Glu { .. }, ..] => self.experts_glu(ops),
            _ => Ok(None),
        }
    }

    /// A norm of whole rows as the input of a matrix.
    fn norm_input(&self, norm: &Op) -> Result<Option<(Input, RowMode)>> {
        let Op::Norm {
            kind: NormKind::Rms,
            x,
            weight,
            bias: None,
            out,
            dim,
            segments: 1,
            eps,
            accumulate: false,
            rows,
        } = *norm
        else {
            return Ok(None);
        };
        let whole = x.offset == 0 && out.offset == 0 && x.buffer != out.buffer;
        if !whole || self.width(x.buffer)? != dim || self.width(out.buffer)? != dim {
            return Ok(None);
        }
        let norm = Norm { weight: self.vector(weight, dim)?, eps, out: out.buffer };
        Ok(Some((Input::Rows { buffer: x.buffer, norm: Some(norm) }, row_mode(rows))))
    }

    /// Matrices that follow a norm and are the only ones to read it.
    fn behind_norm(
        &mut self,
        norm: &Op,
        input: Input,
        rows: RowMode,
        ops: &[Op],
    ) -> Result<Option<(PlannedOp, usize)>> {
        let Op::Norm { out, rows: norm_rows, .. } = *norm else { return Ok(None) };
        // Rows of logits are compacted by the norm.
        let expected = if norm_rows == Rows::All { Rows::All } else { Rows::Compacted };
        let reads = |op: &&Op| matches!(op, Op::Linear { x, rows, .. } if *x == out.buffer && *rows == expected);
        let count = ops.iter().take_while(reads).count();
        if count == 0 || reads_before_write(&ops[count..], out.buffer) {
            return Ok(None);
        }
        let sites = ops[..count].iter().map(|op| self.site(op)).collect::<Result<Vec<_>>>()?;
        let planned = self.linears(input, rows, &sites)?;
        if self.program.last_hidden().is_ok_and(|last| last == out.buffer) {
            self.hidden = Some(self.norm(norm)?);
        }
        Ok(Some((planned, 1 + count)))
    }

    /// Projection, rotation and the cache.
    fn rope_behind(&mut self, input: Input, linear: &Op, rest: &[Op]) -> Result<Option<PlannedOp>> {
        let [Op::RopeAppend { qkv, layer, rope }, Op::Attention { qkv: attended, out, .. }, ref behind @ ..] = *rest
        else {
            return Ok(None);
        };
        let Some((weight, bias)) = self.packed(linear, input, qkv)? else { return Ok(None) };
        let shape = self.program.attention;
        let rotary = if rope.is_some() { shape.rotary_dim } else { 0 };
        let fits = shape.head_dim.is_multiple_of(2 * TILE) && rotary.is_multiple_of(2 * TILE);
        let width = (shape.heads + 2 * shape.kv_heads).checked_mul(shape.head_dim);
        let whole = width == Some(self.width(qkv)?) && attended == qkv && !reads_before_write(behind, qkv);
        // A product knows parts of heads, and a cache of 8 bits wants the largest element of a group.
        let rounded = self.memory.kv_type == KvType::Q8;
        if !fits || !whole || rounded || !self.is_fast(out, behind) {
            return Ok(None);
        }
        let site = Site { weight, bias, target: Target::Rope { layer, rope } };
        self.linears(input, RowMode::All, &[site]).map(Some)
    }

    /// Gate and up projections and their product.
    fn glu_behind(&mut self, input: Input, linear: &Op, rest: &[Op]) -> Result<Option<PlannedOp>> {
        let [Op::Glu { x, out, activation }, ref behind @ ..] = *rest else { return Ok(None) };
        let Some((weight, bias)) = self.packed(linear, input, x)? else { return Ok(None) };
        let width = self.width(out)?;
        let fits = width.is_multiple_of(TILE) && self.width(x)? == 2 * width && !reads_before_write(behind, x);
        if !fits || !feeds_matrix(out, behind) {
            return Ok(None);
        }
        let site = Site { weight, bias, target: Target::Glu { out, activation } };
        let planned = self.linears(input, RowMode::All, &[site])?;
        self.ready = Some((out, WIDE));
        Ok(Some(planned))
    }

    /// The packed matrix and bias of a linear layer from `input` to the whole of `to`.
    fn packed(&self, linear: &Op, input: Input, to: BufferId) -> Result<Option<(WeightId, Option<WeightId>)>> {
        let Input::Rows { norm: Some(norm), .. } = input else { return Ok(None) };
        match *linear {
            Op::Linear { x, weight, bias, out, accumulate: false, rows: Rows::All }
                if x == norm.out && out.buffer == to && out.offset == 0 =>
            {
                match self.weight(weight)? {
                    CudaWeight::W4(w) if w.n == self.width(to)? && w.k == self.width(x)? => Ok(Some((weight, bias))),
                    _ => Ok(None),
                }
            }
            _ => Ok(None),
        }
    }

    /// Whether `ops` begin with the norms of each head of q, k or both, which the rotation follows.
    fn is_of_heads(&self, ops: &[Op]) -> bool {
        let shape = self.program.attention;
        let norms = ops.iter().take_while(|op| matches!(op, Op::Norm { .. })).count();
        let Some(Op::RopeAppend { qkv, .. }) = ops.get(norms) else { return false };
        let of = |op: &Op, offset: u32, heads: u32| match *op {
            Op::Norm {
                kind: NormKind::Rms,
                x,
                weight,
                bias: None,
                out,
                dim,
                segments,
                accumulate: false,
                rows: Rows::All,
                ..
            } => {
                let place = x == out && x.buffer == *qkv && x.offset == offset;
                place && dim == shape.head_dim && segments == heads && self.vector(weight, dim).is_ok()
            }
            _ => false,
        };
        let q = |op: &Op| of(op, 0, shape.heads);
        let k = |op: &Op| of(op, shape.heads * shape.head_dim, shape.kv_heads);
        match &ops[..norms] {
            [a] => q(a) || k(a),
            [a, b] => {
                let eps = |op: &Op| if let Op::Norm { eps, .. } = op { eps.to_bits() } else { 0 };
                ((q(a) && k(b)) || (k(a) && q(b))) && eps(a) == eps(b)
            }
            _ => false,
        }
    }

    fn norms_and_rope(&mut self, qkv: BufferId, ops: &[Op]) -> Result<(PlannedOp, usize)> {
        let mut norms = [None, None];
        for (count, op) in ops.iter().enumerate() {
            match *op {
                Op::Norm { x, weight, eps, .. } => norms[usize::from(x.offset > 0)] = Some((weight, eps)),
                Op::RopeAppend { layer, rope, .. } => {
                    let planned = self.rope_append(qkv, layer, rope, norms, &ops[count + 1..])?;
                    return Ok((planned, count + 1));
                }
                _ => break,
            }
        }
        Err(super::unsupported("norms of heads without a rotation"))
    }
}

/// Whether the first of `rest` is a matrix that reads `buffer`, and nothing else does.
pub(super) fn feeds_matrix(buffer: BufferId, rest: &[Op]) -> bool {
    match rest {
        [Op::Linear { x, rows: Rows::All, .. }, behind @ ..] => *x == buffer && !reads_before_write(behind, buffer),
        _ => false,
    }
}

/// Whether one of `ops` reads `buffer` before another one writes it anew.
pub(super) fn reads_before_write(ops: &[Op], buffer: BufferId) -> bool {
    for op in ops {
        let (reads, writes) = match *op {
            Op::Embed { out, .. } => ([None; 2], out),
            Op::Norm { x, out, accumulate, .. } => ([Some(x.buffer), accumulate.then_some(out.buffer)], out.buffer),
            Op::Linear { x, out, accumulate, .. } => ([Some(x), accumulate.then_some(out.buffer)], out.buffer),
            Op::RopeAppend { qkv, .. } => ([Some(qkv), None], qkv),
            Op::Attention { qkv, out, .. } => ([Some(qkv), None], out),
            Op::Glu { x, out, .. } => ([Some(x), None], out),
            Op::Scale { x, .. } => ([Some(x), None], x),
            Op::Route { logits, routes, .. } => ([Some(logits), None], routes),
            Op::Experts { x, routes, out, .. } => ([Some(x), Some(routes)], out.buffer),
            Op::Combine { x, routes, .. } => ([Some(x), Some(routes)], routes),
            Op::Arrange { x, out, .. } => ([Some(x), None], out),
            Op::Gate { x, gate } => ([Some(x), Some(gate)], x),
        };
        if reads.contains(&Some(buffer)) {
            return true;
        }
        if writes == buffer {
            return false;
        }
    }
    false
}
