//! Which kernel computes the products of a matrix with one, few and many rows.

use awqua_shaders::cuda::{self, GemmArgs, GemvDenseArgs, GemvW4Args, TILE};
use awqua_shaders::{Cost, RowMode, Step};

use super::super::driver::{Function, Launch, Limits};
use super::super::weights::{CudaDense, CudaW4};
use super::{Call, Planner, Work, call, unsupported};
use crate::error::Result;

const TOO_LITTLE_SHARED: &str = "this device has too little shared memory for products of many rows";

/// Tera-operations a second that the kernels for many rows reach on a whole H100; only their ratios matter here.
mod rates {
    pub(super) const GROUPS_128: f64 = 520.0;
    pub(super) const GROUPS_64: f64 = 420.0;
    pub(super) const WARPS_8: f64 = 300.0;
    pub(super) const WARPS_2: f64 = 220.0;
}

/// A kernel for few rows of a packed matrix.
#[derive(Clone, Copy)]
pub(super) struct Gemv {
    pub(super) name: &'static str,
    pub(super) function: Function,
    pub(super) warps: u32,
    pub(super) shared: u32,
}

impl Gemv {
    /// The kernel for `tokens` (1, 8 or 16) rows at once.
    pub(super) fn choose(planner: &Planner<'_>, w: &CudaW4, tokens: u32) -> Result<Self> {
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
        Self::of(planner, w, name, (tokens, per_stage), w.pairs())
    }

    /// The kernel for experts of one token, or of up to 8 pairs of a token and an expert at once; `tiles` of them at a time.
    pub(super) fn of_experts(planner: &Planner<'_>, w: &CudaW4, tokens: u32, tiles: u32) -> Result<Self> {
        let any = w.flags & (cuda::OFFSET_IS_BIAS | cuda::FRACTIONS) != 0;
        let (name, per_stage) = match (tokens, any, w.group_shift) {
            (1, false, 2..) => ("gemv_w4_1_experts_128", 1),
            (1, false, _) => ("gemv_w4_1_experts_32", 4),
            (1, true, _) => ("gemv_w4_1_experts_any", 4),
            (_, false, 2..) => ("gemv_w4_8_experts_128", 1),
            (_, false, _) => ("gemv_w4_8_experts_32", 4),
            (_, true, _) => ("gemv_w4_8_experts_any", 4),
        };
        Self::of(planner, w, name, (tokens, per_stage), w.pairs().saturating_mul(tiles))
    }

    /// Kernel `name` in `blocks` blocks, with as many warps as there is memory for.
    fn of(
        planner: &Planner<'_>,
        w: &CudaW4,
        name: &'static str,
        (tokens, per_stage): (u32, u32),
        blocks: u32,
    ) -> Result<Self> {
        let gpu = &planner.backend.gpu;
        let most = Self::warps(tokens, blocks, w.stages(), gpu.limits);
        let shared = |warps: &u32| cuda::gemv_shared(tokens, per_stage, *warps, w.stages());
        let warps = (1..=most).rev().find(|warps| shared(warps) <= gpu.limits.shared);
        let warps = warps.ok_or_else(|| unsupported(&format!("packed matrices of {} inputs", w.k)))?;
        Ok(Self { name, function: gpu.function(name)?, warps, shared: shared(&warps) })
    }

    /// Warps that share a pair of tiles, of which there are `pairs`, as measured on an H100.
    fn warps(tokens: u32, pairs: u32, stages: u32, limits: Limits) -> u32 {
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

    pub(super) fn call(self, w: &CudaW4, make: impl Fn(&Step) -> GemvW4Args + Send + Sync + 'static) -> Call {
        let (pairs, n, k) = (w.pairs(), u64::from(w.n), u64::from(w.k));
        let bytes = w.expert_bytes();
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
pub(super) struct GemvDense {
    pub(super) name: &'static str,
    pub(super) function: Function,
    pub(super) tokens: u32,
    pub(super) blocks: u32,
    pub(super) shared: u32,
    pub(super) bytes: u64,
    pub(super) flops: u64,
}

impl GemvDense {
    /// The kernel for one row, or up to `tokens` at once.
    pub(super) fn choose(planner: &Planner<'_>, w: &CudaDense, tokens: u32) -> Result<Self> {
        let gpu = &planner.backend.gpu;
        let fits = |tokens: &u32| cuda::gemv_dense_shared(*tokens, w.stride) <= gpu.limits.shared;
        let (name, tokens) = match tokens {
            1 => ("gemv_dense_1", Some(1).filter(fits)),
            _ => ("gemv_dense_8", [8, 4, 2].into_iter().find(fits)),
        };
        let tokens = tokens.ok_or_else(|| unsupported(&format!("dense matrices of {} inputs", w.k)))?;
        // Two blocks a multiprocessor, where that many warps have something to do.
        let blocks = w.n.div_ceil(TILE).div_ceil(8).min(2 * gpu.limits.multiprocessors);
        let shared = cuda::gemv_dense_shared(tokens, w.stride);
        let bytes = w.expert_bytes();
        Ok(Self {
            name,
            function: gpu.function(name)?,
            tokens,
            blocks,
            shared,
            bytes,
            flops: 2 * u64::from(w.n) * u64::from(w.k),
        })
    }

    /// The kernel for a row and an expert's matrix.
    pub(super) fn of_experts(planner: &Planner<'_>, w: &CudaDense) -> Result<Self> {
        let name = "gemv_dense_1_experts";
        Ok(Self { name, function: planner.backend.gpu.function(name)?, ..Self::choose(planner, w, 1)? })
    }

    pub(super) fn call(self, make: impl Fn(&Step) -> GemvDenseArgs + Send + Sync + 'static) -> Call {
        call(self.name, self.function, 256, self.shared, move |step| {
            let arguments = make(step);
            let cost = Cost { bytes: self.bytes, flops: self.flops * u64::from(arguments.tokens) };
            ([self.blocks, 1, 1], arguments, cost)
        })
    }
}

/// A kernel for many rows.
#[derive(Clone, Copy)]
pub(super) struct Gemm {
    pub(super) name: &'static str,
    pub(super) function: Function,
    /// Pairs of row tiles and tokens of a block.
    pub(super) pairs: u32,
    pub(super) tokens: u32,
    pub(super) threads: u32,
    pub(super) shared: u32,
    /// Tera-operations a second when every multiprocessor is busy.
    pub(super) rate: f64,
}

impl Gemm {
    /// The kernels for a packed matrix.
    pub(super) fn of_packed(planner: &Planner<'_>, w: &CudaW4) -> Result<Vec<Self>> {
        let (halves, gpu) = (w.group_shift == 0, &planner.backend.gpu);
        let name = |plain: &'static str, with_halves: &'static str| if halves { with_halves } else { plain };
        let mut kernels = Vec::new();
        if planner.backend.has_group_products() {
            let names = [
                (128, name("gemm_w4_coop_128", "gemm_w4_coop_128_halves"), rates::GROUPS_128),
                (64, name("gemm_w4_coop_64", "gemm_w4_coop_64_halves"), rates::GROUPS_64),
            ];
            for (tokens, name, rate) in names {
                kernels.push(Self::of_groups(name, gpu.function(name)?, tokens, rate));
            }
        }
        let names = [
            (8, name("gemm_w4_8", "gemm_w4_8_halves"), rates::WARPS_8),
            (2, name("gemm_w4_2", "gemm_w4_2_halves"), rates::WARPS_2),
        ];
        for (pairs, name, rate) in names {
            kernels.extend(Self::of_warps(gpu.limits, name, gpu.function(name)?, pairs, rate));
        }
        Ok(kernels)
    }

    /// The kernels for a dense matrix.
    pub(super) fn of_dense(planner: &Planner<'_>) -> Result<Vec<Self>> {
        let (mut kernels, gpu) = (Vec::new(), &planner.backend.gpu);
        for (pairs, name, rate) in [(8, "gemm_dense_8", rates::WARPS_8), (2, "gemm_dense_2", rates::WARPS_2)] {
            kernels.extend(Self::of_warps(gpu.limits, name, gpu.function(name)?, pairs, rate));
        }
        Ok(kernels)
    }

    /// The kernel for the matrices of experts, packed ones or dense ones.
    pub(super) fn of_experts(planner: &Planner<'_>, packed: Option<&CudaW4>) -> Result<Self> {
        let gpu = &planner.backend.gpu;
        let group_products = planner.backend.has_group_products();
        let name = match (packed.map(|w| w.group_shift == 0), group_products) {
            (Some(false), true) => "gemm_w4_coop_experts",
            (Some(true), true) => "gemm_w4_coop_experts_halves",
            (Some(false), false) => "gemm_w4_8_experts",
            (Some(true), false) => "gemm_w4_8_experts_halves",
            (None, _) => "gemm_dense_8_experts",
        };
        let function = gpu.function(name)?;
        let kernel = match packed.is_some() && group_products {
            true => Some(Self::of_groups(name, function, cuda::GEMM_TOKENS, rates::GROUPS_64)),
            false => Self::of_warps(gpu.limits, name, function, cuda::GEMM_WARPS, rates::WARPS_8),
        };
        kernel.ok_or_else(|| unsupported(TOO_LITTLE_SHARED))
    }

    /// The kernel on products of groups of warps with blocks of `tokens` tokens.
    fn of_groups(name: &'static str, function: Function, tokens: u32, rate: f64) -> Self {
        let (pairs, threads, shared) = (cuda::COOP_PAIRS, cuda::COOP_THREADS, cuda::gemm_coop_shared(tokens));
        Self { name, function, pairs, tokens, threads, shared, rate }
    }

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
    pub(super) fn call(
        kernels: Vec<Self>,
        limits: Limits,
        (n, k): (u32, u32),
        weight_bytes: u64,
        arguments: GemmArgs,
        rows: RowMode,
    ) -> Result<Call> {
        if kernels.is_empty() {
            return Err(unsupported(TOO_LITTLE_SHARED));
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
