//! Which kernels a device is trusted with: each kind computes a small product, compared with the host's.

use std::sync::Arc;

use awqua_shaders::cuda::{self, CHUNK, GemmArgs, GemvW4Args, Product, STAGE, TILE};
use half::f16;

use super::CudaOptions;
use super::driver::{Gpu, Launch};
use super::loader::Loader;
use super::weights::{CudaW4, CudaWeight};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{Offset, W4Matrix, Weight};

/// Outputs, inputs and tokens of the product.
const N: usize = 96;
const K: usize = 256;
const TOKENS: usize = 70;
/// Bytes of the matrix on its way.
const ROOM: usize = 64 << 10;
/// Largest difference, relative to the largest product: half precision weights carry 11 bits.
const TOLERANCE: f32 = 1e-3;

/// What was decided.
#[derive(Debug, Clone)]
pub(super) struct Choice {
    /// Whether the kernels for the matrix units of compute capability 9.0 compute right.
    pub(super) group_products: bool,
    /// The choice and why, for people.
    pub(super) reason: String,
}

/// Tries the kernels of `gpu`.
///
/// # Errors
/// [`ErrorKind::Device`] if those that every device uses compute wrongly, or a device error.
pub(super) fn choose(gpu: &Arc<Gpu>, options: &CudaOptions) -> Result<Choice> {
    let trial = Trial::new(gpu)?;
    for (name, right) in [("rows one by one", trial.one()?), ("many rows", trial.many("gemm_w4_8", 8, 64)?)] {
        if !right {
            let message = format!("{}: products of {name} come out wrong", gpu.summary.name);
            return Err(Error::new(ErrorKind::Device, message));
        }
    }
    let (major, minor) = gpu.limits.capability;
    let has = (major, minor) == (9, 0);
    let group_products = has
        && !options.force_portable
        && trial.many("gemm_w4_coop_128", cuda::COOP_PAIRS, 128)?
        && trial.many("gemm_w4_coop_64", cuda::COOP_PAIRS, 64)?;
    let units = match (group_products, has, options.force_portable) {
        (true, ..) => "group products",
        (_, true, true) => "warp products (asked for)",
        (_, true, false) => "warp products (group products come out wrong)",
        _ => "warp products",
    };
    let graphs = if options.force_no_graphs { "no graphs (asked for)" } else { "graphs" };
    let driver = (gpu.summary.driver / 1000, gpu.summary.driver % 1000 / 10);
    let reason = format!("sm_{major}{minor}, {units}, {graphs}, driver for CUDA {}.{}", driver.0, driver.1);
    Ok(Choice { group_products, reason })
}

struct Trial {
    loader: Loader,
    gpu: Arc<Gpu>,
    matrix: CudaWeight,
    /// (TOKENS, K), half precision, and the right products (TOKENS, N).
    x: Vec<f16>,
    products: Vec<f32>,
}

impl Trial {
    fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        // xorshift: any numbers will do.
        let mut state = 0x2545_f491_u32;
        let mut next = move || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state
        };
        let qweight = (0..N * K / 8).map(|_| next()).collect();
        let params = (0..N * K / 128).map(|_| {
            u32::from(f16::from_f32(0.01).to_bits()) | u32::from(f16::from_f32((next() % 16) as f32).to_bits()) << 16
        });
        let host = W4Matrix::new((N, K), 128, qweight, params.collect(), Offset::Zero)?;
        let x: Vec<f16> = (0..TOKENS * K).map(|_| f16::from_f32((next() % 2001) as f32 * 1e-3 - 1.0)).collect();
        let mut products = vec![0.0; TOKENS * N];
        let mut row = vec![0.0; K];
        for n in 0..N {
            host.dequantize_row(n, &mut row);
            for (t, x) in x.chunks_exact(K).enumerate() {
                products[t * N + n] = row.iter().zip(x).map(|(w, x)| w * x.to_f32()).sum();
            }
        }
        let mut loader = Loader::new(gpu, ROOM)?;
        let rows = Weight::W4(host);
        let mut matrix = CudaWeight::reserve(gpu, &loader.stream, "the self-test", &rows.shape())?;
        matrix.fill(&mut loader, &rows)?;
        Ok(Self { loader, gpu: gpu.clone(), matrix, x, products })
    }

    fn w4(&self) -> Result<&CudaW4> {
        match &self.matrix {
            CudaWeight::W4(w) => Ok(w),
            _ => Err(Error::new(ErrorKind::Device, "the self-test has no matrix")),
        }
    }

    /// Runs the kernel that `launch` makes over inputs `x` for the first `tokens` tokens, and compares.
    fn compare(&self, x: &[f16], tokens: usize, launch: impl FnOnce(Product, u64) -> Result<Launch>) -> Result<bool> {
        let stream = &self.loader.stream;
        let w = self.w4()?;
        let inputs = self.gpu.buffer("the self-test", x.len() as u64 * 2)?;
        let out = self.gpu.buffer("the self-test", (tokens * N * 4) as u64)?;
        stream.upload(&inputs, 0, bytemuck::cast_slice(x))?;
        stream.clear(&out)?;
        let product = Product {
            codes: w.codes.address(),
            params: w.params.address(),
            out: out.address(),
            n: N as u32,
            stages: w.stages(),
            groups: w.groups,
            group_shift: w.group_shift,
            target: cuda::TO_ROWS,
            pairs: w.pairs(),
            out_stride: N as u32,
            scale: 1.0,
            ..Product::default()
        };
        let launch = launch(product, inputs.address())?;
        // SAFETY: the arguments are those of the kernel, over buffers made for them, which live until it has ended.
        unsafe { stream.launch(&launch) }?;
        let mut found = vec![0.0f32; tokens * N];
        stream.download(&out, 0, bytemuck::cast_slice_mut(&mut found))?;
        let largest = self.products.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        // NaN is not near anything.
        Ok(found.iter().zip(&self.products).all(|(f, e)| (f - e).abs() <= TOLERANCE * largest))
    }

    fn one(&self) -> Result<bool> {
        let warps = 4;
        let shared = cuda::gemv_shared(1, 1, warps, self.w4()?.stages());
        let function = self.gpu.function("gemv_w4_1_128")?;
        self.compare(&self.x[..K], 1, |product, half_x| {
            let arguments = GemvW4Args { product, half_x, k: K as u32, tokens: 1, ..Default::default() };
            Ok(Launch::new(function, [product.pairs, 1, 1], warps * 32, shared, &arguments))
        })
    }

    fn many(&self, name: &'static str, pairs: u32, at_once: u32) -> Result<bool> {
        let (shared, threads) = match name.contains("coop") {
            true => (cuda::gemm_coop_shared(at_once), cuda::COOP_THREADS),
            false => (cuda::gemm_shared(pairs), cuda::GEMM_WARPS * 32),
        };
        let function = self.gpu.function(name)?;
        let chunks = K / CHUNK as usize;
        let mut tiles = vec![f16::ZERO; TOKENS.next_multiple_of(cuda::COOP_TOKENS as usize) * K];
        for (at, x) in self.x.iter().enumerate() {
            tiles[cuda::tile_offset(at / K, at % K, chunks)] = *x;
        }
        self.compare(&tiles, TOKENS, |product, x| {
            let arguments = GemmArgs { product, x, dense: 0, tokens: TOKENS as u32, pad: 0 };
            let grid = [(TOKENS as u32).div_ceil(at_once), product.pairs.div_ceil(pairs), 1];
            Ok(Launch::new(function, grid, threads, shared, &arguments))
        })
    }
}

const _: () = assert!(K.is_multiple_of(STAGE as usize) && N.is_multiple_of(2 * TILE as usize));
