//! Matrices for one, few and many rows: where their inputs come from, and where their products go.

use awqua_shaders::cuda::{self, GemmArgs, GemvDenseArgs, GemvW4Args, Product, STAGE, StageArgs, TILE, WIDE};
use awqua_shaders::{Cost, RowMode};

use super::super::memory::{FEW, Form, Staged};
use super::super::weights::{CudaDense, CudaW4, CudaWeight};
use super::kernels::{Gemm, Gemv, GemvDense};
use super::{Call, PlannedOp, Planner, call, number, unsupported};
use crate::backend::{Activation, BufferId, Op, Span, WeightId};
use crate::error::{Error, ErrorKind, Result};

/// Where the inputs of a matrix come from.
#[derive(Clone, Copy)]
pub(super) enum Input {
    /// f32 rows, through a norm in front.
    Rows { buffer: BufferId, norm: Option<Norm> },
    /// Inputs that the operation before left, divided by `scale`.
    Ready { buffer: BufferId, scale: f32 },
}

/// A norm of whole rows on the way to a matrix.
#[derive(Clone, Copy)]
pub(super) struct Norm {
    /// Address of the weights.
    pub(super) weight: u64,
    pub(super) eps: f32,
    /// The buffer that it would write, which names the staged inputs.
    pub(super) out: BufferId,
}

/// A matrix and what becomes of its products.
#[derive(Clone, Copy)]
pub(super) struct Site {
    pub(super) weight: WeightId,
    pub(super) bias: Option<WeightId>,
    pub(super) target: Target,
}

#[derive(Clone, Copy)]
pub(super) enum Target {
    Rows {
        out: Span,
        accumulate: bool,
    },
    /// The inputs that stand for this buffer, divided by [`WIDE`].
    Glu {
        out: BufferId,
        activation: Activation,
    },
    /// Queries and the cache of `layer`.
    Rope {
        layer: u32,
        rope: Option<u32>,
    },
}

impl<'a> Planner<'a> {
    /// The matrix of a linear operation with f32 rows as its target, after checks of its shape.
    pub(super) fn site(&self, op: &Op) -> Result<Site> {
        let Op::Linear { x, weight, bias, out, accumulate, .. } = *op else {
            return Err(unsupported("this operation is no matrix"));
        };
        if x == out.buffer {
            return Err(unsupported("a linear layer can not write to its input"));
        }
        let (n, k) = match self.weight(weight)? {
            CudaWeight::W4(w) if w.experts == 1 => (w.n, w.k),
            CudaWeight::Dense(w) if w.experts == 1 => (w.n, w.k),
            _ => return Err(unsupported("a linear layer needs a matrix")),
        };
        self.fits(out, n)?;
        if self.width(x)? != k {
            let message = format!("expected {} input features, found {k}", self.width(x)?);
            return Err(Error::new(ErrorKind::InvalidTensor, message));
        }
        Ok(Site { weight, bias, target: Target::Rows { out, accumulate } })
    }

    /// Matrices with the same inputs.
    pub(super) fn linears(&mut self, input: Input, rows: RowMode, sites: &[Site]) -> Result<PlannedOp> {
        let (mut one, mut few, mut many) = (Vec::new(), Vec::new(), Vec::new());
        let narrow = self.narrow_rows(input, sites)?;
        let few_inputs = match narrow {
            Some(_) => None,
            None => Some(self.inputs(input, rows, Form::Rows, &mut few)?),
        };
        let many_inputs = self.inputs(input, rows, Form::Tiles, &mut many)?;
        for site in sites {
            let bias = match site.bias {
                Some(bias) => self.vector(bias, self.outputs(site.weight)?)?,
                None => 0,
            };
            match (self.weight(site.weight)?, few_inputs, narrow) {
                (CudaWeight::W4(matrix), Some(few_inputs), _) => {
                    one.push(self.gemv_one(matrix, site, bias, input, rows)?);
                    few.push(self.gemv_few(matrix, site, bias, few_inputs, rows)?);
                    many.push(self.gemm(matrix, site, bias, many_inputs, rows)?);
                }
                (CudaWeight::Dense(matrix), Some(few_inputs), _) => {
                    one.push(self.dense_one(matrix, site, bias, input, few_inputs, rows)?);
                    few.push(self.dense_few(matrix, site, bias, few_inputs, rows)?);
                    many.push(self.dense_many(matrix, site, bias, many_inputs, rows)?);
                }
                (CudaWeight::Dense(matrix), _, Some(from)) => {
                    one.push(self.dense_narrow(matrix, site, bias, from, rows)?);
                    few.push(self.dense_narrow(matrix, site, bias, from, rows)?);
                    many.push(self.dense_many(matrix, site, bias, many_inputs, rows)?);
                }
                _ => return Err(unsupported("a linear layer needs a matrix")),
            }
        }
        Ok(PlannedOp { rows, levels: vec![(1, one), (FEW, few), (u32::MAX, many)] })
    }

    /// The f32 rows that go through `sites` if those are dense and have too few outputs for the kernels that give a warp
    /// 16 of them.
    fn narrow_rows(&mut self, input: Input, sites: &[Site]) -> Result<Option<(u64, u32)>> {
        let most = TILE * self.backend.gpu.limits.multiprocessors / 8;
        for site in sites {
            match self.weight(site.weight)? {
                CudaWeight::Dense(matrix) if matrix.n <= most => {}
                _ => return Ok(None),
            }
        }
        match input {
            Input::Rows { buffer, norm: None } => self.rows(buffer).map(Some),
            _ => Ok(None),
        }
    }

    /// Up to 16 rows of a dense matrix of few outputs, from f32 rows where they are.
    fn dense_narrow(
        &mut self,
        w: &CudaDense,
        site: &Site,
        bias: u64,
        (x, x_stride): (u64, u32),
        rows: RowMode,
    ) -> Result<Call> {
        let arguments = GemvDenseArgs { x, x_stride, scale: 1.0, ..self.dense_arguments(w, site, bias)? };
        let function = self.backend.gpu.function("gemv_dense_narrow")?;
        let (n, flops, bytes) = (w.n, 2 * u64::from(w.n) * u64::from(w.k), w.expert_bytes());
        Ok(call("gemv_dense_narrow", function, 256, cuda::BLOCK_SUM_SHARED, move |step| {
            let first = if rows == RowMode::Logits { step.logits_start } else { 0 };
            let tokens = rows.count(step);
            let x = x + u64::from(first) * u64::from(x_stride) * 4;
            let cost = Cost { bytes, flops: flops * u64::from(tokens) };
            ([n, tokens, 1], GemvDenseArgs { x, tokens, ..arguments }, cost)
        }))
    }

    fn outputs(&self, weight: WeightId) -> Result<u32> {
        match self.weight(weight)? {
            CudaWeight::W4(w) => Ok(w.n),
            CudaWeight::Dense(w) => Ok(w.n),
            CudaWeight::Vector { len, .. } => Ok(*len),
            CudaWeight::Expert { .. } => Err(unsupported("a linear layer needs a matrix")),
        }
    }

    /// Half precision inputs and what they are divided by; adds the call that makes them, if one has to.
    fn inputs(&mut self, input: Input, rows: RowMode, form: Form, calls: &mut Vec<Call>) -> Result<(Staged, f32)> {
        match input {
            Input::Ready { buffer, scale } => Ok((self.memory.staged(self.stream, self.program, buffer, form)?, scale)),
            Input::Rows { buffer, norm } => {
                let of = norm.map_or(buffer, |norm| norm.out);
                let staged = self.memory.staged(self.stream, self.program, of, form)?;
                let (x, x_stride) = self.rows(buffer)?;
                let k = self.width(buffer)?;
                let arguments = StageArgs {
                    x,
                    norm: norm.map_or(0, |norm| norm.weight),
                    out: staged.address,
                    slots: 0,
                    eps: norm.map_or(0.0, |norm| norm.eps),
                    k,
                    x_stride,
                    first_row: 0,
                    out_stride: staged.stride,
                    out_tiled: u32::from(staged.tiled),
                    share: 0,
                    pad: 0,
                };
                let function = self.backend.gpu.function("stage")?;
                calls.push(call("stage", function, 256, cuda::BLOCK_SUM_SHARED, move |step| {
                    let n = rows.count(step);
                    let first_row = if rows == RowMode::Logits { step.logits_start } else { 0 };
                    let cost = Cost { bytes: u64::from(n) * u64::from(k) * 6, flops: 0 };
                    ([n, 1, 1], StageArgs { first_row, ..arguments }, cost)
                }));
                Ok((staged, if norm.is_some() { 1.0 } else { WIDE }))
            }
        }
    }

    /// What the kernels have to know of a matrix and its target.
    pub(super) fn product(&mut self, w: &CudaW4, site: &Site, bias: u64, scale: f32, form: Form) -> Result<Product> {
        let mut product = Product {
            codes: w.codes.address(),
            params: w.params.address(),
            bias,
            n: w.n,
            stages: w.stages(),
            groups: w.groups,
            group_shift: w.group_shift,
            flags: w.flags | if bias == 0 { 0 } else { cuda::HAS_BIAS },
            pairs: w.pairs(),
            scale,
            ..Default::default()
        };
        match site.target {
            Target::Rows { out, accumulate } => {
                let (address, stride) = self.rows(out.buffer)?;
                (product.out, product.out_stride, product.out_offset) = (address, stride, out.offset);
                product.target = cuda::TO_ROWS;
                product.flags |= if accumulate { cuda::ADD } else { 0 };
            }
            Target::Glu { out, activation } => {
                let staged = self.memory.staged(self.stream, self.program, out, form)?;
                (product.half_out, product.out_stride) = (staged.address, staged.stride);
                product.out_tiled = u32::from(staged.tiled);
                product.activation = number(activation);
                product.target = cuda::TO_GLU;
            }
            Target::Rope { layer, rope } => {
                let shape = self.program.attention;
                product.half_out = self.memory.queries(self.stream, self.program)?;
                product.out_stride = shape.heads * shape.head_dim;
                product.rows = self.memory.address(self.memory.rows);
                product.table = self.table(rope)?;
                (product.heads, product.kv_heads, product.head_dim) = (shape.heads, shape.kv_heads, shape.head_dim);
                product.rotary_dim = if rope.is_some() { shape.rotary_dim } else { 0 };
                product.layer = layer;
                product.target = cuda::TO_ROPE;
            }
        }
        Ok(product)
    }

    /// One row, straight from f32 rows where they are.
    fn gemv_one(&mut self, w: &CudaW4, site: &Site, bias: u64, input: Input, rows: RowMode) -> Result<Call> {
        let (x, half_x, norm, eps, scale, stride) = match input {
            Input::Rows { buffer, norm } => {
                let (address, stride) = self.rows(buffer)?;
                let (weight, eps) = norm.map_or((0, 0.0), |norm| (norm.weight, norm.eps));
                (address, 0, weight, eps, 1.0, stride)
            }
            Input::Ready { buffer, scale } => {
                (0, self.memory.staged(self.stream, self.program, buffer, Form::Rows)?.address, 0, 0.0, scale, 0)
            }
        };
        let product = self.product(w, site, bias, scale, Form::Rows)?;
        let arguments = GemvW4Args { product, x, half_x, norm, eps, k: w.k, x_stride: 0, tokens: 1 };
        let kernel = Gemv::choose(self, w, 1)?;
        Ok(kernel.call(w, move |step| {
            let row = if rows == RowMode::Logits { step.logits_start } else { 0 };
            let x = if x == 0 { 0 } else { x + u64::from(row) * u64::from(stride) * 4 };
            GemvW4Args { x, ..arguments }
        }))
    }

    /// 2 to 16 rows.
    fn gemv_few(
        &mut self,
        w: &CudaW4,
        site: &Site,
        bias: u64,
        (inputs, scale): (Staged, f32),
        rows: RowMode,
    ) -> Result<Call> {
        let product = self.product(w, site, bias, scale, Form::Rows)?;
        let arguments = GemvW4Args {
            product,
            x: 0,
            half_x: inputs.address,
            norm: 0,
            eps: 0.0,
            k: w.k,
            x_stride: inputs.stride,
            tokens: 0,
        };
        let kernels = [Gemv::choose(self, w, 8)?, Gemv::choose(self, w, 16)?];
        let calls =
            kernels.map(|kernel| kernel.call(w, move |step| GemvW4Args { tokens: rows.count(step), ..arguments }));
        Ok(Box::new(move |step, work| calls[usize::from(rows.count(step) > 8)](step, work)))
    }

    /// Many rows.
    fn gemm(
        &mut self,
        w: &CudaW4,
        site: &Site,
        bias: u64,
        (inputs, scale): (Staged, f32),
        rows: RowMode,
    ) -> Result<Call> {
        let product = self.product(w, site, bias, scale, Form::Tiles)?;
        let kernels = Gemm::of_packed(self, w)?;
        let arguments = GemmArgs { product, x: inputs.address, dense: 0, tokens: 0, pad: 0 };
        let weight_bytes = w.codes.bytes() + w.params.bytes();
        Gemm::call(kernels, self.backend.gpu.limits, (w.n, w.k), weight_bytes, arguments, rows)
    }

    /// One row of a dense matrix.
    fn dense_one(
        &mut self,
        w: &CudaDense,
        site: &Site,
        bias: u64,
        input: Input,
        few: (Staged, f32),
        rows: RowMode,
    ) -> Result<Call> {
        match input {
            Input::Ready { .. } => self.dense_few(w, site, bias, few, rows),
            Input::Rows { buffer, norm } => {
                let (x, stride) = self.rows(buffer)?;
                let base = self.dense_arguments(w, site, bias)?;
                let (norm, eps) = norm.map_or((0, 0.0), |norm| (norm.weight, norm.eps));
                let arguments = GemvDenseArgs { x, norm, eps, tokens: 1, scale: 1.0, ..base };
                let kernel = GemvDense::choose(self, w, 1)?;
                Ok(kernel.call(move |step| {
                    let row = if rows == RowMode::Logits { step.logits_start } else { 0 };
                    GemvDenseArgs { x: x + u64::from(row) * u64::from(stride) * 4, ..arguments }
                }))
            }
        }
    }

    /// A few rows of a dense matrix, eight at a time.
    fn dense_few(
        &mut self,
        w: &CudaDense,
        site: &Site,
        bias: u64,
        (inputs, scale): (Staged, f32),
        rows: RowMode,
    ) -> Result<Call> {
        let arguments = GemvDenseArgs {
            half_x: inputs.address,
            x_stride: inputs.stride,
            scale,
            ..self.dense_arguments(w, site, bias)?
        };
        let kernel = GemvDense::choose(self, w, 8)?;
        let at_once = kernel.tokens;
        let calls: Vec<_> = (0..FEW.div_ceil(at_once))
            .map(|i| {
                let first = i * at_once;
                kernel.call(move |step| GemvDenseArgs {
                    half_x: arguments.half_x + u64::from(first) * u64::from(arguments.x_stride) * 2,
                    out: arguments.out + u64::from(first) * u64::from(arguments.out_stride) * 4,
                    tokens: (rows.count(step) - first).min(at_once),
                    ..arguments
                })
            })
            .collect();
        Ok(Box::new(move |step, work| {
            let needed = rows.count(step).div_ceil(at_once) as usize;
            calls.iter().take(needed).for_each(|call| call(step, work));
        }))
    }

    /// Many rows of a dense matrix.
    fn dense_many(
        &mut self,
        w: &CudaDense,
        site: &Site,
        bias: u64,
        (inputs, scale): (Staged, f32),
        rows: RowMode,
    ) -> Result<Call> {
        let base = self.dense_arguments(w, site, bias)?;
        let product = Product {
            bias,
            out: base.out,
            out_stride: base.out_stride,
            out_offset: base.out_offset,
            n: w.n,
            stages: w.stride / STAGE,
            flags: base.flags,
            target: cuda::TO_ROWS,
            pairs: w.n.div_ceil(2 * TILE),
            scale,
            ..Default::default()
        };
        let kernels = Gemm::of_dense(self)?;
        let arguments = GemmArgs { product, x: inputs.address, dense: w.rows.address(), tokens: 0, pad: 0 };
        Gemm::call(kernels, self.backend.gpu.limits, (w.n, w.k), w.rows.bytes(), arguments, rows)
    }

    pub(super) fn dense_arguments(&mut self, w: &CudaDense, site: &Site, bias: u64) -> Result<GemvDenseArgs> {
        let Target::Rows { out, accumulate } = site.target else {
            return Err(unsupported("a dense matrix writes rows"));
        };
        let (address, out_stride) = self.rows(out.buffer)?;
        Ok(GemvDenseArgs {
            w: w.rows.address(),
            bias,
            out: address,
            n: w.n,
            k: w.k,
            stride: w.stride,
            out_stride,
            out_offset: out.offset,
            flags: if accumulate { cuda::ADD } else { 0 } | if bias == 0 { 0 } else { cuda::HAS_BIAS },
            ..Default::default()
        })
    }
}
