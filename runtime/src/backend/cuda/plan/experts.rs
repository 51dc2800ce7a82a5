//! Mixtures of experts: the choice, the products with the chosen experts' matrices, and their sum.
//!
//! One token's experts are read where its routes say. Rows of several tokens are brought together by expert first, so that
//! every chosen expert's weights are read once for many of them.

use awqua_shaders::cuda::{
    self, CombineArgs, Experts, GateArgs, GemmArgs, GemmExpertsArgs, GemvDenseExpertsArgs, GemvW4Args,
    GemvW4ExpertsArgs, GroupArgs, Product, RouteArgs, SLOTS_OF_TILES, STAGE, StageArgs, TILE, WIDE, expert_tiles,
};
use awqua_shaders::{Cost, RowMode, Step};

use super::super::memory::{FEW, Form, Staged};
use super::super::weights::{CudaDense, CudaW4, CudaWeight};
use super::fuse::reads_before_write;
use super::kernels::{Gemm, Gemv, GemvDense};
use super::linear::{Input, Site, Target};
use super::{Call, PlannedOp, Planner, call, unsupported};
use crate::backend::{BufferId, Op};
use crate::error::{Error, ErrorKind, Result};

/// What an operation over experts reads, and where it looks for its experts.
#[derive(Clone, Copy)]
struct Chosen {
    x: BufferId,
    count: u32,
    top_k: u32,
    /// Rows of x a token: 1, or `top_k`.
    rows: u32,
    routes: u64,
    routes_stride: u32,
}

impl Chosen {
    /// Pairs of a token and an expert that share a row of inputs.
    fn share(&self) -> u32 {
        self.top_k / self.rows
    }

    fn slots(&self) -> Form {
        Form::Slots { experts: self.count, top_k: self.top_k }
    }

    /// Tiles of `of` slots in a step.
    fn tiles(&self, of: u32, step: &Step) -> u32 {
        expert_tiles(of, self.count, self.top_k, step.n_tokens)
    }

    /// What products in a step move and compute at least, of matrices (n, k) of `bytes` an expert.
    fn cost(&self, step: &Step, (n, k): (u32, u32), bytes: u64) -> Cost {
        let (n, k, pairs) = (u64::from(n), u64::from(k), u64::from(step.n_tokens) * u64::from(self.top_k));
        Cost { bytes: bytes * pairs.min(u64::from(self.count)) + pairs * (2 * k + 4 * n), flops: 2 * n * k * pairs }
    }
}

/// Refuses choices that the kernels do not make.
///
/// # Errors
/// [`ErrorKind::Unsupported`].
pub(super) fn check_route(experts: u32, top_k: u32) -> Result<()> {
    if experts > cuda::EXPERTS_MAX || top_k > cuda::TOP_K_MAX.min(experts) || top_k == 0 {
        let message = format!(
            "{top_k} of {experts} experts; the CUDA backend knows {} of {}",
            cuda::TOP_K_MAX,
            cuda::EXPERTS_MAX
        );
        return Err(unsupported(&message));
    }
    Ok(())
}

impl Planner<'_> {
    /// `rest` are the operations that follow.
    pub(super) fn route(
        &mut self,
        logits: BufferId,
        routes: BufferId,
        top_k: u32,
        renormalise: bool,
        rest: &[Op],
    ) -> Result<PlannedOp> {
        let experts = self.width(logits)?;
        check_route(experts, top_k)?;
        self.fits(routes.into(), 2 * top_k)?;
        let ((logits, logits_stride), (routes, routes_stride)) = (self.rows(logits)?, self.rows(routes)?);
        let arguments = RouteArgs {
            logits,
            routes,
            tokens: 0,
            logits_stride,
            routes_stride,
            experts,
            top_k,
            renormalise: u32::from(renormalise),
        };
        let function = self.backend.gpu.function("route")?;
        let choice = || {
            call("route", function, cuda::ROUTE_WARPS * 32, cuda::route_shared(experts), move |step| {
                let elements = u64::from(step.n_tokens) * u64::from(experts);
                let cost = Cost { bytes: elements * 4, flops: elements * (4 + u64::from(top_k)) };
                let grid = [step.n_tokens.div_ceil(cuda::ROUTE_WARPS), 1, 1];
                (grid, RouteArgs { tokens: step.n_tokens, ..arguments }, cost)
            })
        };
        let slots = self.memory.slots(self.stream, experts, top_k)?;
        let function = self.backend.gpu.function("group")?;
        let grouping = |tile: u32| {
            call("group", function, 512, cuda::group_shared(experts), move |step| {
                let all_tiles = expert_tiles(tile, experts, top_k, step.n_tokens);
                let arguments = GroupArgs {
                    routes,
                    tiles: slots.tiles,
                    slots: slots.slots,
                    tokens: step.n_tokens,
                    top_k,
                    experts,
                    tile,
                    all_tiles,
                    routes_stride,
                };
                let pairs = u64::from(step.n_tokens) * u64::from(top_k);
                let cost = Cost { bytes: pairs * 12 + u64::from(all_tiles) * u64::from(tile + 1) * 4, flops: 0 };
                ([1, 1, 1], arguments, cost)
            })
        };
        let mut few = vec![choice()];
        // Dense experts of few tokens go pair by pair.
        let mut weights = rest.iter().filter_map(|op| match op {
            Op::Experts { weight, .. } => Some(*weight),
            _ => None,
        });
        if weights.any(|weight| matches!(self.weight(weight), Ok(CudaWeight::W4(_)))) {
            few.push(grouping(SLOTS_OF_TILES[0]));
        }
        let many = vec![choice(), grouping(SLOTS_OF_TILES[1])];
        Ok(PlannedOp { rows: RowMode::All, levels: vec![(1, vec![choice()]), (FEW, few), (u32::MAX, many)] })
    }

    /// Gate and up of packed experts and their product as one, for the packed experts that follow; `None` where the
    /// operations at the start of `ops` are others.
    pub(super) fn experts_glu(&mut self, ops: &[Op]) -> Result<Option<(PlannedOp, usize)>> {
        let [
            Op::Experts { x, weight, out, .. },
            Op::Glu { x: gate_up, out: product, activation },
            Op::Experts { x: next, weight: down, .. },
            rest @ ..,
        ] = ops
        else {
            return Ok(None);
        };
        let (CudaWeight::W4(matrix), CudaWeight::W4(_)) = (self.weight(*weight)?, self.weight(*down)?) else {
            return Ok(None);
        };
        let width = self.width(*product)?;
        let whole = out.buffer == *gate_up && out.offset == 0 && self.width(*gate_up)? == matrix.n;
        let halves = width.is_multiple_of(TILE) && width.checked_mul(2) == Some(matrix.n);
        let alone = next == product && self.per_token(*x) == 1 && self.per_token(*product) > 1;
        if !whole || !halves || !alone || reads_before_write(rest, *product) || reads_before_write(rest, *gate_up) {
            return Ok(None);
        }
        let target = Target::Glu { out: *product, activation: *activation };
        let input = Input::Rows { buffer: *x, norm: None };
        let planned = self.experts_to(&ops[0], input, target)?;
        self.ready = Some((*product, WIDE));
        Ok(Some((planned, 2)))
    }

    pub(super) fn experts(&mut self, op: &Op, input: Input) -> Result<PlannedOp> {
        let Op::Experts { out, .. } = *op else { return Err(unsupported("this operation has no experts")) };
        self.experts_to(op, input, Target::Rows { out, accumulate: false })
    }

    fn experts_to(&mut self, op: &Op, input: Input, target: Target) -> Result<PlannedOp> {
        let Op::Experts { x, weight, count, routes, out } = *op else {
            return Err(unsupported("this operation has no experts"));
        };
        let (top_k, rows) = (self.width(routes)? / 2, self.per_token(x));
        if top_k == 0 || self.per_token(out.buffer) != top_k || (rows != 1 && rows != top_k) {
            return Err(unsupported("experts read a row of a token, or one each"));
        }
        let chooses = |op: &Op| matches!(*op, Op::Route { logits, routes: of, .. } if of == routes && self.width(logits).ok() == Some(count));
        if !self.program.ops.iter().any(chooses) {
            return Err(unsupported(&format!("{count} experts that no operation chooses among")));
        }
        let (address, routes_stride) = self.rows(routes)?;
        let chosen = Chosen { x, count, top_k, rows, routes: address, routes_stride };
        let weight_of = self.weight(weight)?;
        let (n, k, experts) = match weight_of {
            CudaWeight::W4(w) => (w.n, w.k, w.experts),
            CudaWeight::Dense(w) => (w.n, w.k, w.experts),
            CudaWeight::Vector { .. } | CudaWeight::Expert { .. } => return Err(unsupported("experts of this form")),
        };
        if experts != count {
            return Err(unsupported(&format!("{count} experts, of which {experts} were reserved together")));
        }
        self.fits(out, n)?;
        if self.width(x)? != k {
            let message = format!("expected {} input features, found {k}", self.width(x)?);
            return Err(Error::new(ErrorKind::InvalidTensor, message));
        }
        let site = Site { weight, bias: None, target };
        let (one, few, many) = match weight_of {
            CudaWeight::W4(w) => (
                self.packed_one(w, &site, &chosen, input)?,
                self.packed_few(w, &site, &chosen, input)?,
                self.packed_many(w, &site, &chosen, input)?,
            ),
            CudaWeight::Dense(w) => {
                let few = self.dense_experts_few(w, &site, &chosen, input)?;
                (
                    few,
                    self.dense_experts_few(w, &site, &chosen, input)?,
                    self.dense_experts_many(w, &site, &chosen, input)?,
                )
            }
            _ => return Err(unsupported("experts of this form")),
        };
        Ok(PlannedOp { rows: RowMode::All, levels: vec![(1, one), (FEW, few), (u32::MAX, many)] })
    }

    /// What the kernels have to know of the choice.
    fn chosen_experts(&mut self, chosen: &Chosen, row_tiles: u32) -> Result<Experts> {
        let slots = self.memory.slots(self.stream, chosen.count, chosen.top_k)?;
        Ok(Experts {
            routes: chosen.routes,
            tiles: slots.tiles,
            slots: slots.slots,
            row_tiles,
            top_k: chosen.top_k,
            share: chosen.share(),
            routes_stride: chosen.routes_stride,
        })
    }

    /// Half precision inputs in `form` and what they are divided by; adds the call that makes them, if one has to.
    fn expert_inputs(
        &mut self,
        chosen: &Chosen,
        input: Input,
        form: Form,
        calls: &mut Vec<Call>,
    ) -> Result<(Staged, f32)> {
        let staged = self.memory.staged(self.stream, self.program, chosen.x, form)?;
        let buffer = match input {
            Input::Ready { scale, .. } => return Ok((staged, scale)),
            Input::Rows { buffer, .. } => buffer,
        };
        let (x, x_stride) = self.rows(buffer)?;
        let k = self.width(buffer)?;
        let by_slot = form.is_tiled();
        let slots = if by_slot { self.memory.slots(self.stream, chosen.count, chosen.top_k)?.slots } else { 0 };
        let arguments = StageArgs {
            x,
            norm: 0,
            out: staged.address,
            slots,
            eps: 0.0,
            k,
            x_stride,
            first_row: 0,
            out_stride: staged.stride,
            out_tiled: u32::from(staged.tiled),
            share: chosen.share(),
            pad: 0,
        };
        let function = self.backend.gpu.function("stage")?;
        let chosen = *chosen;
        calls.push(call("stage", function, 256, cuda::BLOCK_SUM_SHARED, move |step| {
            let (tile, pairs) = (SLOTS_OF_TILES[1], step.n_tokens * chosen.top_k);
            let blocks = if by_slot { chosen.tiles(tile, step) * tile } else { step.n_tokens * chosen.rows };
            let rows = if by_slot { pairs } else { blocks };
            ([blocks, 1, 1], arguments, Cost { bytes: u64::from(rows) * u64::from(k) * 6, flops: 0 })
        }));
        Ok((staged, WIDE))
    }

    /// The experts of one token, from f32 rows where they are.
    fn packed_one(&mut self, w: &CudaW4, site: &Site, chosen: &Chosen, input: Input) -> Result<Vec<Call>> {
        let (x, half_x, scale, x_stride) = match input {
            Input::Rows { buffer, .. } => {
                let (x, stride) = self.rows(buffer)?;
                (x, 0, 1.0, stride)
            }
            Input::Ready { buffer, scale } => {
                let staged = self.memory.staged(self.stream, self.program, buffer, Form::Rows)?;
                (0, staged.address, scale, staged.stride)
            }
        };
        let product = self.product(w, site, 0, scale, Form::Rows)?;
        let gemv = GemvW4Args { product, x, half_x, norm: 0, eps: 0.0, k: w.k, x_stride, tokens: 1 };
        let arguments = GemvW4ExpertsArgs { gemv, experts: self.chosen_experts(chosen, 2 * w.pairs())? };
        let kernel = Gemv::of_experts(self, w, 1, chosen.top_k)?;
        let (grid, shape, bytes, chosen) = ([w.pairs(), chosen.top_k, 1], (w.n, w.k), w.expert_bytes(), *chosen);
        let call = call(kernel.name, kernel.function, kernel.warps * 32, kernel.shared, move |step| {
            (grid, arguments, chosen.cost(step, shape, bytes))
        });
        Ok(vec![call])
    }

    /// The experts of 2 to 16 tokens, up to eight rows of each at once.
    fn packed_few(&mut self, w: &CudaW4, site: &Site, chosen: &Chosen, input: Input) -> Result<Vec<Call>> {
        let mut calls = Vec::new();
        let (inputs, scale) = self.expert_inputs(chosen, input, Form::Rows, &mut calls)?;
        let product = self.product(w, site, 0, scale, Form::Rows)?;
        let gemv = GemvW4Args {
            product,
            x: 0,
            half_x: inputs.address,
            norm: 0,
            eps: 0.0,
            k: w.k,
            x_stride: inputs.stride,
            tokens: 0,
        };
        let arguments = GemvW4ExpertsArgs { gemv, experts: self.chosen_experts(chosen, 2 * w.pairs())? };
        // Of the tiles that there can be, few have rows.
        let kernel = Gemv::of_experts(self, w, 8, chosen.top_k)?;
        let (pairs, shape, bytes, chosen) = (w.pairs(), (w.n, w.k), w.expert_bytes(), *chosen);
        calls.push(call(kernel.name, kernel.function, kernel.warps * 32, kernel.shared, move |step| {
            let grid = [pairs, chosen.tiles(SLOTS_OF_TILES[0], step), 1];
            (grid, arguments, chosen.cost(step, shape, bytes))
        }));
        Ok(calls)
    }

    fn packed_many(&mut self, w: &CudaW4, site: &Site, chosen: &Chosen, input: Input) -> Result<Vec<Call>> {
        let mut calls = Vec::new();
        let (inputs, scale) = self.expert_inputs(chosen, input, chosen.slots(), &mut calls)?;
        let product = self.product(w, site, 0, scale, chosen.slots())?;
        let kernel = Gemm::of_experts(self, Some(w))?;
        let experts = self.chosen_experts(chosen, 2 * w.pairs())?;
        let gemm = GemmArgs { product, x: inputs.address, dense: 0, tokens: 0, pad: 0 };
        calls.push(experts_gemm(kernel, GemmExpertsArgs { gemm, experts }, *chosen, w.k, w.expert_bytes()));
        Ok(calls)
    }

    /// Dense experts of up to 16 tokens, pair by pair from f32 rows.
    fn dense_experts_few(&mut self, w: &CudaDense, site: &Site, chosen: &Chosen, input: Input) -> Result<Vec<Call>> {
        let Input::Rows { buffer, norm: None } = input else {
            return Err(unsupported("dense experts read f32 rows"));
        };
        let (x, x_stride) = self.rows(buffer)?;
        let gemv = cuda::GemvDenseArgs { x, x_stride, tokens: 1, scale: 1.0, ..self.dense_arguments(w, site, 0)? };
        let arguments = GemvDenseExpertsArgs { gemv, experts: self.chosen_experts(chosen, w.row_tiles())? };
        let kernel = GemvDense::of_experts(self, w)?;
        let chosen = *chosen;
        let call = call(kernel.name, kernel.function, 256, kernel.shared, move |step| {
            let pairs = step.n_tokens * chosen.top_k;
            let cost = Cost { bytes: kernel.bytes * u64::from(pairs), flops: kernel.flops * u64::from(pairs) };
            ([kernel.blocks, pairs, 1], arguments, cost)
        });
        Ok(vec![call])
    }

    fn dense_experts_many(&mut self, w: &CudaDense, site: &Site, chosen: &Chosen, input: Input) -> Result<Vec<Call>> {
        let mut calls = Vec::new();
        let (inputs, scale) = self.expert_inputs(chosen, input, chosen.slots(), &mut calls)?;
        let base = self.dense_arguments(w, site, 0)?;
        let product = Product {
            out: base.out,
            out_stride: base.out_stride,
            out_offset: base.out_offset,
            n: w.n,
            stages: w.stride / STAGE,
            target: cuda::TO_ROWS,
            pairs: w.row_tiles() / 2,
            scale,
            ..Default::default()
        };
        let kernel = Gemm::of_experts(self, None)?;
        let experts = self.chosen_experts(chosen, w.row_tiles())?;
        let gemm = GemmArgs { product, x: inputs.address, dense: w.rows.address(), tokens: 0, pad: 0 };
        calls.push(experts_gemm(kernel, GemmExpertsArgs { gemm, experts }, *chosen, w.k, w.expert_bytes()));
        Ok(calls)
    }

    pub(super) fn combine(&mut self, x: BufferId, routes: BufferId, out: BufferId) -> Result<PlannedOp> {
        let (width, top_k) = (self.width(out)?, self.width(routes)? / 2);
        self.fits(x.into(), width)?;
        if self.per_token(x) != top_k {
            return Err(unsupported("a sum over other experts than those of the routes"));
        }
        let ((x, x_stride), (routes, routes_stride), (out, out_stride)) =
            (self.rows(x)?, self.rows(routes)?, self.rows(out)?);
        let arguments = CombineArgs { x, routes, out, width, top_k, x_stride, routes_stride, out_stride, pad: 0 };
        let function = self.backend.gpu.function("combine")?;
        let call = call("combine", function, 256, 0, move |step| {
            let elements = u64::from(step.n_tokens) * u64::from(width);
            let top_k = u64::from(top_k);
            let cost = Cost { bytes: elements * 4 * (top_k + 2), flops: 2 * elements * top_k };
            ([width.div_ceil(256), step.n_tokens, 1], arguments, cost)
        });
        Ok(PlannedOp::always(RowMode::All, vec![call]))
    }

    pub(super) fn gate(&mut self, x: BufferId, gate: BufferId) -> Result<PlannedOp> {
        let width = self.width(x)?;
        let ((x, x_stride), (gate, gate_stride)) = (self.rows(x)?, self.rows(gate)?);
        let arguments = GateArgs { x, gate, width, x_stride, gate_stride, pad: 0 };
        let function = self.backend.gpu.function("gate")?;
        let call = call("gate", function, 256, 0, move |step| {
            let elements = u64::from(step.n_tokens) * u64::from(width);
            let cost = Cost { bytes: elements * 8, flops: elements * 4 };
            ([width.div_ceil(256), step.n_tokens, 1], arguments, cost)
        });
        Ok(PlannedOp::always(RowMode::All, vec![call]))
    }
}

/// The product of every tile of slots with its expert's matrix.
fn experts_gemm(kernel: Gemm, arguments: GemmExpertsArgs, chosen: Chosen, k: u32, bytes: u64) -> Call {
    let product = arguments.gemm.product;
    call(kernel.name, kernel.function, kernel.threads, kernel.shared, move |step| {
        let grid = [chosen.tiles(SLOTS_OF_TILES[1], step), product.pairs.div_ceil(kernel.pairs), 1];
        (grid, arguments, chosen.cost(step, (product.n, k), bytes))
    })
}
