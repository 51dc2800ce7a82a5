//! Matrices for one, few and many rows: which kernel computes them from which inputs.

use awqua_shaders::cuda::{self, GemmArgs, GemvDenseArgs, GemvW4Args, Product, STAGE, StageArgs, TILE, WIDE};
use awqua_shaders::{Cost, RowMode, Step};

use super::super::driver::{Function, Launch, Limits};
use super::super::memory::{FEW, Staged};
use super::super::weights::{CudaDense, CudaW4, CudaWeight};
use super::{Call, PlannedOp, Planner, Work, call, number, unsupported};
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

/// Tera-operations a second that the kernels for many rows reach on a whole H100; only their ratios matter here.
mod rates {
    pub(super) const GROUPS_128: f64 = 520.0;
    pub(super) const GROUPS_64: f64 = 420.0;
    pub(super) const WARPS_8: f64 = 300.0;
    pub(super) const WARPS_2: f64 = 220.0;
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
            CudaWeight::W4(w) => (w.n, w.k),
            CudaWeight::Dense(w) => (w.n, w.k),
            CudaWeight::Vector { .. } => return Err(unsupported("a linear layer needs a matrix")),
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
        let few_inputs = self.inputs(input, rows, false, &mut few)?;
        let many_inputs = self.inputs(input, rows, true, &mut many)?;
        for site in sites {
            let bias = match site.bias {
                Some(bias) => self.vector(bias, self.outputs(site.weight)?)?,
                None => 0,
            };
            match self.weight(site.weight)? {
                CudaWeight::W4(matrix) => {
                    one.push(self.gemv_one(matrix, site, bias, input, rows)?);
                    few.push(self.gemv_few(matrix, site, bias, few_inputs, rows)?);
                    many.push(self.gemm(matrix, site, bias, many_inputs, rows)?);
                }
                CudaWeight::Dense(matrix) => {
                    one.push(self.dense_one(matrix, site, bias, input, few_inputs, rows)?);
                    few.push(self.dense_few(matrix, site, bias, few_inputs, rows)?);
                    many.push(self.dense_many(matrix, site, bias, many_inputs, rows)?);
                }
                CudaWeight::Vector { .. } => return Err(unsupported("a linear layer needs a matrix")),
            }
        }
        Ok(PlannedOp { rows, levels: vec![(1, one), (FEW, few), (u32::MAX, many)] })
    }

    fn outputs(&self, weight: WeightId) -> Result<u32> {
        match self.weight(weight)? {
            CudaWeight::W4(w) => Ok(w.n),
            CudaWeight::Dense(w) => Ok(w.n),
            CudaWeight::Vector { len, .. } => Ok(*len),
        }
    }

    /// Half precision inputs and what they are divided by; adds the call that makes them, if one has to.
    fn inputs(&mut self, input: Input, rows: RowMode, tiled: bool, calls: &mut Vec<Call>) -> Result<(Staged, f32)> {
        match input {
            Input::Ready { buffer, scale } => {
                Ok((self.memory.staged(self.stream, self.program, buffer, tiled)?, scale))
            }
            Input::Rows { buffer, norm } => {
                let of = norm.map_or(buffer, |norm| norm.out);
                let staged = self.memory.staged(self.stream, self.program, of, tiled)?;
                let (x, x_stride) = self.rows(buffer)?;
                let k = self.width(buffer)?;
                let arguments = StageArgs {
                    x,
                    norm: norm.map_or(0, |norm| norm.weight),
                    out: staged.address,
                    eps: norm.map_or(0.0, |norm| norm.eps),
                    k,
                    x_stride,
                    first_row: 0,
                    out_stride: staged.stride,
                    out_tiled: u32::from(staged.tiled),
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
    fn product(&mut self, w: &CudaW4, site: &Site, bias: u64, scale: f32, tiled: bool) -> Result<Product> {
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
                let staged = self.memory.staged(self.stream, self.program, out, tiled)?;
                (product.half_out, product.out_stride) = (staged.address, staged.stride);
                product.out_tiled = u32::from(tiled);
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
                (0, self.memory.staged(self.stream, self.program, buffer, false)?.address, 0, 0.0, scale, 0)
            }
        };
        let product = self.product(w, site, bias, scale, false)?;
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
        let product = self.product(w, site, bias, scale, false)?;
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
        let product = self.product(w, site, bias, scale, true)?;
        let halves = w.group_shift == 0;
        let gpu = &self.backend.gpu;
        let name = |plain: &'static str, with_halves: &'static str| if halves { with_halves } else { plain };
        let mut kernels = Vec::new();
        if self.backend.has_group_products() {
            let names = [
                (128, name("gemm_w4_coop_128", "gemm_w4_coop_128_halves"), rates::GROUPS_128),
                (64, name("gemm_w4_coop_64", "gemm_w4_coop_64_halves"), rates::GROUPS_64),
            ];
            for (tokens, name, rate) in names {
                let shared = cuda::gemm_coop_shared(tokens);
                let (pairs, threads) = (cuda::COOP_PAIRS, cuda::COOP_THREADS);
                kernels.push(Gemm { name, function: gpu.function(name)?, pairs, tokens, threads, shared, rate });
            }
        }
        let names = [
            (8, name("gemm_w4_8", "gemm_w4_8_halves"), rates::WARPS_8),
            (2, name("gemm_w4_2", "gemm_w4_2_halves"), rates::WARPS_2),
        ];
        for (pairs, name, rate) in names {
            kernels.extend(Gemm::of_warps(gpu.limits, name, gpu.function(name)?, pairs, rate));
        }
        let arguments = GemmArgs { product, x: inputs.address, dense: 0, tokens: 0, pad: 0 };
        let weight_bytes = w.codes.bytes() + w.params.bytes();
        Gemm::call(kernels, gpu.limits, (w.n, w.k), weight_bytes, arguments, rows)
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
                let kernel = self.dense_kernel(w, 1)?;
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
        let kernel = self.dense_kernel(w, 8)?;
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
        let gpu = &self.backend.gpu;
        let mut kernels = Vec::new();
        for (pairs, name, rate) in [(8, "gemm_dense_8", rates::WARPS_8), (2, "gemm_dense_2", rates::WARPS_2)] {
            kernels.extend(Gemm::of_warps(gpu.limits, name, gpu.function(name)?, pairs, rate));
        }
        let arguments = GemmArgs { product, x: inputs.address, dense: w.rows.address(), tokens: 0, pad: 0 };
        Gemm::call(kernels, gpu.limits, (w.n, w.k), w.rows.bytes(), arguments, rows)
    }

    fn dense_arguments(&mut self, w: &CudaDense, site: &Site, bias: u64) -> Result<GemvDenseArgs> {
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

    fn dense_kernel(&self, w: &CudaDense, tokens: u32) -> Result<GemvDense> {
        let gpu = &self.backend.gpu;
        let fits = |tokens: &u32| cuda::gemv_dense_shared(*tokens, w.stride) <= gpu.limits.shared;
        let (name, tokens) = match tokens {
            1 => ("gemv_dense_1", Some(1).filter(fits)),
            _ => ("gemv_dense_8", [8, 4, 2].into_iter().find(fits)),
        };
        let tokens = tokens.ok_or_else(|| unsupported(&format!("dense matrices of {} inputs", w.k)))?;
        // Two blocks a multiprocessor, where that many warps have something to do.
        let blocks = w.n.div_ceil(TILE).div_ceil(8).min(2 * gpu.limits.multiprocessors);
        let shared = cuda::gemv_dense_shared(tokens, w.stride);
        let bytes = w.rows.bytes();
        Ok(GemvDense {
            name,
            function: gpu.function(name)?,
            tokens,
            blocks,
            shared,
            bytes,
            flops: 2 * u64::from(w.n) * u64::from(w.k),
        })
    }
}

/// A kernel for few rows of a packed matrix.
#[derive(Clone, Copy)]
struct Gemv {
    name: &'static str,
    function: Function,
    warps: u32,
    shared: u32,
}

impl Gemv {
    /// The kernel for `tokens` (1, 8 or 16) rows at once.
    fn choose(planner: &Planner<'_>, w: &CudaW4, tokens: u32) -> Result<Self> {
        let gpu = &planner.backend.gpu;
        let any = w.flags & (cuda::OFFSET_IS_BIAS | cuda::FRACTIONS) != 0;
        let (name, per_stage) = match (tokens, any, w.group_shift) {
            (1, false, 2..) => ("gemv_w4_1_128", 1),
            (1, false, 1) => ("gemv_w4_1_64", 2),
            (1, false, _) => ("gemv_w4_1_32", 4),
            (1, true, _) => ("gemv_w4_1_any", 4),
            (8, false, 2..) => ("gemv_w4_8_128", 1),
            (8, false, _) => ("gemv_w4_8_32", 4),
            (8, true, _) => ("gemv_w4_8_any", 4),
            (_, false, 2..) => ("gemv_w4_16_128", 1),
            (..) => ("gemv_w4_16_any", 4),
        };
        let most = Self::warps(tokens, w, gpu.limits);
        let shared = |warps: &u32| cuda::gemv_shared(tokens, per_stage, *warps, w.stages());
        let warps = (1..=most).rev().find(|warps| shared(warps) <= gpu.limits.shared);
        let warps = warps.ok_or_else(|| unsupported(&format!("packed matrices of {} inputs", w.k)))?;
        Ok(Self { name, function: gpu.function(name)?, warps, shared: shared(&warps) })
    }

    /// Warps that share a pair of tiles, as measured on an H100.
    fn warps(tokens: u32, w: &CudaW4, limits: Limits) -> u32 {
        let (pairs, stages) = (w.pairs(), w.stages());
        if tokens == 1 {
            // As many on a multiprocessor as their copies keep the memory busy with and its shared memory holds, and a
            // few stages for each.
            const RESIDENT: u32 = 24;
            let blocks = pairs.div_ceil(limits.multiprocessors).max(1);
            return (RESIDENT / blocks).clamp(4, 16).min((stages * 3 / 8).max(4));
        }
        // More share the inputs where there are few pairs and many inputs.
        match pairs < 2 * limits.multiprocessors {
            true if tokens <= 8 && stages >= 64 => 16,
            true => 8,
            false => 4,
        }
    }

    fn call(self, w: &CudaW4, make: impl Fn(&Step) -> GemvW4Args + Send + Sync + 'static) -> Call {
        let (pairs, n, k) = (w.pairs(), u64::from(w.n), u64::from(w.k));
        let bytes = w.codes.bytes() + w.params.bytes();
        call(self.name, self.function, self.warps * 32, self.shared, move |step| {
            let arguments = make(step);
            let tokens = u64::from(arguments.tokens);
            let cost = Cost { bytes: bytes + tokens * (2 * k + 4 * n), flops: 2 * n * k * tokens };
            ([pairs, 1, 1], arguments, cost)
        })
    }
}

/// A kernel for few rows of a dense matrix.
#[derive(Clone, Copy)]
struct GemvDense {
    name: &'static str,
    function: Function,
    tokens: u32,
    blocks: u32,
    shared: u32,
    bytes: u64,
    flops: u64,
}

impl GemvDense {
    fn call(self, make: impl Fn(&Step) -> GemvDenseArgs + Send + Sync + 'static) -> Call {
        call(self.name, self.function, 256, self.shared, move |step| {
            let arguments = make(step);
            let cost = Cost { bytes: self.bytes, flops: self.flops * u64::from(arguments.tokens) };
            ([self.blocks, 1, 1], arguments, cost)
        })
    }
}

/// A kernel for many rows.
#[derive(Clone, Copy)]
struct Gemm {
    name: &'static str,
    function: Function,
    /// Pairs of row tiles and tokens of a block.
    pairs: u32,
    tokens: u32,
    threads: u32,
    shared: u32,
    /// Tera-operations a second when every multiprocessor is busy.
    rate: f64,
}

impl Gemm {
    /// The kernel on warp products with blocks of `pairs` pairs, where its shared memory is there.
    fn of_warps(limits: Limits, name: &'static str, function: Function, pairs: u32, rate: f64) -> Option<Self> {
        let shared = cuda::gemm_shared(pairs);
        let (tokens, threads) = (cuda::GEMM_TOKENS, cuda::GEMM_WARPS * 32);
        (shared <= limits.shared).then_some(Self { name, function, pairs, tokens, threads, shared, rate })
    }

    fn grid(&self, pairs: u32, tokens: u32) -> [u32; 3] {
        [tokens.div_ceil(self.tokens), pairs.div_ceil(self.pairs), 1]
    }

    /// Time of a product, in a unit of its own: rounds of blocks on all multiprocessors.
    fn time(&self, limits: Limits, pairs: u32, tokens: u32) -> f64 {
        let [x, y, _] = self.grid(pairs, tokens);
        let rounds = (u64::from(x) * u64::from(y)).div_ceil(u64::from(limits.multiprocessors));
        rounds as f64 * f64::from(self.pairs * self.tokens) / self.rate
    }

    /// A call of the fastest of `kernels` for the number of rows.
    fn call(
        kernels: Vec<Self>,
        limits: Limits,
        (n, k): (u32, u32),
        weight_bytes: u64,
        arguments: GemmArgs,
        rows: RowMode,
    ) -> Result<Call> {
        if kernels.is_empty() {
            return Err(unsupported("this device has too little shared memory for products of many rows"));
        }
        let pairs = arguments.product.pairs;
        Ok(Box::new(move |step, work| {
            let tokens = rows.count(step);
            let time = |kernel: &&Self| kernel.time(limits, pairs, tokens);
            let Some(kernel) = kernels.iter().min_by(|a, b| time(a).total_cmp(&time(b))) else { return };
            let arguments = GemmArgs { tokens, ..arguments };
            let cost = Cost {
                bytes: weight_bytes + u64::from(tokens) * (2 * u64::from(k) + 4 * u64::from(n)),
                flops: 2 * u64::from(n) * u64::from(k) * u64::from(tokens),
            };
            let launch =
                Launch::new(kernel.function, kernel.grid(pairs, tokens), kernel.threads, kernel.shared, &arguments);
            work.push(Work { name: kernel.name, launch, cost });
        }))
    }
}
