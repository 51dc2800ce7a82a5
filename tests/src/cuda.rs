//! CUDA kernels called one by one, for their tests and benchmarks.
#![allow(missing_docs, reason = "names of test data")]

use std::sync::Arc;

use awqua::backend::cuda::driver::{Buffer, CudaChoice, Function, Gpu, Launch, Stream};
use awqua::tensor::{Offset, W4Matrix};
use awqua_shaders::Rng;
pub use awqua_shaders::cuda::tile_offset;
use awqua_shaders::cuda::{self, CHUNK, Product, STAGE, TILE, W4Args};
use bytemuck::Pod;
use half::f16;

/// A device and a stream on it.
pub struct Device {
    pub gpu: Arc<Gpu>,
    pub stream: Stream,
}

impl Device {
    /// Opens the first device.
    ///
    /// # Panics
    /// If that fails.
    pub fn open() -> Self {
        let gpu = Gpu::open(&CudaChoice::Best, false).expect("the device opens");
        let stream = gpu.stream().expect("a stream");
        Self { gpu, stream }
    }

    pub fn upload<T: Pod>(&self, data: &[T]) -> Buffer {
        let buffer = self.gpu.buffer("test data", size_of_val(data) as u64).expect("memory");
        self.stream.upload(&buffer, 0, bytemuck::cast_slice(data)).expect("an upload");
        buffer
    }

    /// Memory that holds `n` values that no result equals.
    pub fn poisoned<T: Pod>(&self, n: usize) -> Buffer {
        self.upload(&vec![0x7fc0_dead_u32; (n * size_of::<T>()).div_ceil(4)])
    }

    pub fn zeros(&self, bytes: usize) -> Buffer {
        self.upload(&vec![0u8; bytes])
    }

    pub fn download<T: Pod>(&self, buffer: &Buffer, n: usize) -> Vec<T> {
        let mut out = vec![T::zeroed(); n];
        self.stream.download(buffer, 0, bytemuck::cast_slice_mut(&mut out)).expect("a download");
        out
    }

    pub fn function(&self, name: &'static str) -> Function {
        self.gpu.function(name).expect("the kernel exists")
    }

    /// Queues a kernel.
    pub fn run<A: Pod>(&self, name: &'static str, grid: [u32; 3], threads: u32, shared: u32, arguments: &A) {
        let launch = Launch::new(self.function(name), grid, threads, shared, arguments);
        // SAFETY: tests and benchmarks give the arguments of the kernel that they name, over buffers they keep.
        unsafe { self.stream.launch(&launch) }.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

/// A packed matrix on the host and on the device.
pub struct Packed {
    pub matrix: W4Matrix,
    pub codes: Buffer,
    pub params: Buffer,
    pub group_shift: u32,
    pub flags: u32,
}

/// Random codes; zero points with fractions where `fractions`.
pub fn random_matrix(
    n: usize,
    k: usize,
    group_size: usize,
    offset: Offset,
    fractions: bool,
    rng: &mut Rng,
) -> W4Matrix {
    let qweight = (0..n * k / 8).map(|_| rng.next_u32()).collect();
    let scale = 1.5 / (k as f32).sqrt() / 4.0;
    let params = (0..n * (k / group_size))
        .map(|_| {
            let s = f16::from_f32(scale * rng.range(0.5, 1.5));
            let o = match offset {
                Offset::Zero if fractions => f16::from_f32(rng.below(31) as f32 * 0.5),
                Offset::Zero => f16::from_f32(rng.below(16) as f32),
                _ => f16::from_f32(-s.to_f32() * rng.range(6.0, 9.0)),
            };
            u32::from(s.to_bits()) | u32::from(o.to_bits()) << 16
        })
        .collect();
    W4Matrix { n, k, group_size, qweight, group_params: params, offset }
}

impl Packed {
    /// Lays the matrix out on the device.
    pub fn new(device: &Device, matrix: W4Matrix) -> Self {
        let (n, k, groups) = (matrix.n as u32, matrix.k as u32, matrix.groups() as u32);
        let (rows, stages) = (n.next_multiple_of(2 * TILE), k.div_ceil(STAGE));
        let codes = device.poisoned::<u32>((rows * stages * STAGE / 8) as usize);
        let params = device.poisoned::<u32>((rows * groups) as usize);
        let (from, numbers) = (device.upload(&matrix.qweight), device.upload(&matrix.group_params));
        let tiles = rows / TILE;
        let arguments = W4Args {
            codes: from.address(),
            params: numbers.address(),
            out: codes.address(),
            out_params: params.address(),
            n,
            k,
            groups,
            stages,
            tiles,
            ..Default::default()
        };
        device.run("w4_rows", [2 * stages, tiles.div_ceil(8), 1], 256, 0, &arguments);
        device.run("w4_rows_params", [groups, tiles.div_ceil(32), 1], 256, 0, &arguments);
        device.stream.wait().expect("the matrix is laid out");
        let is_code = |params: &u32| {
            let zero = f16::from_bits((params >> 16) as u16).to_f32();
            (0.0..=15.0).contains(&zero) && zero.fract() == 0.0
        };
        let flags = match matrix.offset {
            Offset::Zero if matrix.group_params.iter().all(is_code) => 0,
            Offset::Zero => cuda::FRACTIONS,
            _ => cuda::OFFSET_IS_BIAS,
        };
        let group_shift = if groups == 1 { 31 } else { (matrix.group_size as u32).ilog2() - 5 };
        Self { matrix, codes, params, group_shift, flags }
    }

    /// What kernels have to know of it; the target is left open.
    pub fn product(&self) -> Product {
        Product {
            codes: self.codes.address(),
            params: self.params.address(),
            n: self.matrix.n as u32,
            stages: (self.matrix.k as u32).div_ceil(STAGE),
            groups: self.matrix.groups() as u32,
            group_shift: self.group_shift,
            flags: self.flags,
            pairs: (self.matrix.n as u32).div_ceil(2 * TILE),
            scale: 1.0,
            ..Default::default()
        }
    }

    /// Groups of a stage that the kernels for few rows copy.
    pub fn per_stage(&self) -> u32 {
        match self.group_shift {
            2.. => 1,
            1 => 2,
            _ => 4,
        }
    }

    /// Weights (n, k): exact, or rounded to half precision.
    pub fn weights(&self, rounded: bool) -> Vec<f32> {
        let m = &self.matrix;
        let mut out = Vec::with_capacity(m.n * m.k);
        for row in 0..m.n {
            for column in 0..m.k {
                let q = f32::from(m.code(row, column));
                let (s, o) = m.group(row, column / m.group_size);
                let (s, o) = (s.to_f32(), o.to_f32());
                let exact = if m.offset == Offset::Bias { q * s + o } else { (q - o) * s };
                out.push(if rounded { f16::from_f32(exact).to_f32() } else { exact });
            }
        }
        out
    }
}

/// Inputs as rows of `stride` elements or tiles; zeros where nothing is.
pub fn inputs(x: &[Vec<f32>], tiled: bool) -> Vec<u16> {
    let k = x[0].len();
    let stride = k.next_multiple_of(STAGE as usize);
    let chunks = stride / CHUNK as usize;
    let rows = x.len().next_multiple_of(128);
    let mut out = vec![0; if tiled { rows * stride } else { x.len() * stride }];
    for (token, row) in x.iter().enumerate() {
        for (i, v) in row.iter().enumerate() {
            let at = if tiled { tile_offset(token, i, chunks) } else { token * stride + i };
            out[at] = f16::from_f32(*v).to_bits();
        }
    }
    out
}

/// The inputs as half precision has them.
pub fn rounded(x: &[Vec<f32>]) -> Vec<Vec<f32>> {
    x.iter().map(|row| row.iter().map(|v| f16::from_f32(*v).to_f32()).collect()).collect()
}

/// `w` (n, k) times every row of x, in f64, and the sums of magnitudes.
pub fn multiply(w: &[f32], x: &[Vec<f32>]) -> Vec<Vec<(f64, f64)>> {
    let product = |w: &[f32], x: &[f32]| {
        w.iter().zip(x).fold((0.0, 0.0), |(sum, most), (w, x)| {
            let p = f64::from(*w) * f64::from(*x);
            (sum + p, most + p.abs())
        })
    };
    x.iter().map(|x| w.chunks(x.len()).map(|w| product(w, x)).collect()).collect()
}
