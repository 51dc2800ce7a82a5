//! Measures the kernels themselves, for benchmarks.

use std::hint::black_box;
use std::sync::Mutex;

use half::f16;

use super::integer::rows::{self, LANES, Rows, Shape};
use super::integer::{self, Activations, Group, Target, Worker};
use super::kernels::{self, Kernels, Portable};
use super::pool::Pool;
use super::weights::huge_pages;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{Offset, W4Matrix};

/// A matrix to measure products with.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Rows.
    pub n: usize,
    /// Columns, a multiple of the group size.
    pub k: usize,
    /// Columns of a group of 4-bit codes, a multiple of 32; `None` for 8-bit codes.
    pub group_size: Option<usize>,
}

/// What the kernels of one instruction set do.
#[derive(Debug, Clone)]
pub struct Measurement {
    /// Instruction set.
    pub isa: &'static str,
    /// 10^9 bytes of weights a second that products with one row of activations read from memory.
    pub memory: f64,
    /// The same where the weights stay in a cache.
    pub cache: f64,
    /// 10^9 operations a second, two a weight, of products with [`TOKENS`] rows.
    pub operations: f64,
}

/// Rows of activations in products with many.
pub const TOKENS: usize = 240;
/// Bytes of weights that no cache holds.
const LARGE: usize = 256 << 20;
/// Bytes that one does.
const SMALL: usize = 256 << 10;
const REPEAT: usize = 5;
/// Seconds of a measurement: clocks of processors may tick every 4 ms.
const LEAST: f64 = 0.1;

/// Products of a random matrix on `threads` threads with every instruction set of this processor, the best of five;
/// `clock` tells seconds. Each set is compared with plain code first.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for sizes that have no kernels, [`ErrorKind::Device`] if a kernel computes something else.
pub fn measure(case: Case, threads: usize, clock: &dyn Fn() -> f64) -> Result<Vec<Measurement>> {
    let Case { n, k, group_size } = case;
    let shape = match group_size {
        Some(group_size) => Shape::of_w4(n, k, group_size, Offset::Zero),
        None => Shape::of_bytes(n, k),
    };
    let (Some(shape), true) = (shape, n > 0) else {
        return Err(Error::new(ErrorKind::InvalidInput, format!("no kernel multiplies {case:?}")));
    };
    let bytes = shape.bytes().unwrap_or(usize::MAX);
    let copies = LARGE.div_ceil(bytes);
    let mut pages = huge_pages(bytes.checked_mul(copies), "matrices to measure with")?;
    let (first, others) = pages.split_at_mut(bytes);
    fill(&shape, first);
    others.chunks_exact_mut(bytes).for_each(|copy| copy.copy_from_slice(first));
    let x: Vec<f32> = (0..TOKENS * k).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
    let mut pool = Pool::new(threads);
    let workers: Vec<_> = (0..pool.threads()).map(|_| Worker::new(k).map(Mutex::new)).collect::<Result<_>>()?;
    let mut out = vec![0.0; TOKENS * n];
    let mut found = Vec::new();
    for kernels in kernels::all() {
        check(&*kernels, &Rows::new(shape, &pages[..bytes]), &x)?;
        let mut activations = Activations::with(x.len(), x.len() / rows::BYTE_GROUP)?;
        // Seconds that products with `tokens` rows of all of `matrices` take.
        let mut seconds = |matrices: &[Rows<'_>], tokens: usize, blocks: usize| -> Result<f64> {
            activations.round(&mut pool, &*kernels, &shape, &x[..tokens * k], tokens)?;
            let mut best = f64::INFINITY;
            for _ in 0..REPEAT {
                let start = clock();
                let mut passes = 0.0;
                while clock() - start < LEAST {
                    for matrix in matrices {
                        let out = &mut out[..tokens * n];
                        let target = Target { out, stride: n, bias: None, accumulate: false, order: None };
                        let groups = [Group { expert: 0, rows: 0..tokens }];
                        let x = activations.inputs();
                        integer::matmul(&mut pool, &workers, &*kernels, &x, &[*matrix], &groups, 0..blocks, target)?;
                    }
                    passes += 1.0;
                }
                black_box(&out);
                best = best.min((clock() - start) / passes);
            }
            Ok(best)
        };
        let all: Vec<_> = pages.chunks_exact(bytes).map(|bytes| Rows::new(shape, bytes)).collect();
        let memory = (copies * bytes) as f64 / seconds(&all, 1, shape.blocks())?;
        let blocks = (SMALL / shape.block_bytes()).clamp(1, shape.blocks());
        let repeated = vec![all[0]; 16];
        let cached = (repeated.len() * blocks * shape.block_bytes()) as f64;
        let cache = cached / seconds(&repeated, 1, blocks)?;
        let blocks = shape.blocks().min(36);
        let operations = (2 * TOKENS * k * n.min(blocks * LANES)) as f64 / seconds(&all[..1], TOKENS, blocks)?;
        found.push(Measurement {
            isa: kernels.name(),
            memory: memory * 1e-9,
            cache: cache * 1e-9,
            operations: operations * 1e-9,
        });
    }
    Ok(found)
}

/// 10^9 bytes a second that `threads` threads read from memory, the best of five; `clock` tells seconds.
///
/// # Errors
/// [`ErrorKind::OutOfMemory`].
pub fn read_bandwidth(threads: usize, clock: &dyn Fn() -> f64) -> Result<f64> {
    let mut pages = huge_pages(Some(2 * LARGE), "memory to read")?;
    pages.fill(1);
    let mut pool = Pool::new(threads);
    let tasks = 8 * pool.threads();
    let mut best = f64::INFINITY;
    for _ in 0..REPEAT {
        let start = clock();
        pool.run(tasks, &|task, _| {
            let words: &[u64] = bytemuck::cast_slice(&pages);
            let words = &words[words.len() / tasks * task..][..words.len() / tasks];
            let mut sums = [0u64; 16];
            for words in words.as_chunks::<16>().0 {
                sums.iter_mut().zip(words).for_each(|(sum, word)| *sum ^= word);
            }
            black_box(sums);
        });
        best = best.min(clock() - start);
    }
    Ok(pages.len() as f64 / best * 1e-9)
}

/// Random codes and plausible scales.
fn fill(shape: &Shape, bytes: &mut [u8]) {
    let mut seed = 1u64;
    let mut random = || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 32) as u32
    };
    if !shape.has_offsets() {
        rows::round(&Portable, shape, 0, bytes, |_, row| {
            row.iter_mut().for_each(|v| *v = random() as f32 / u32::MAX as f32 - 0.5);
        });
        return;
    }
    let numbers = u32::from(f16::from_f32(0.01).to_bits()) | u32::from(f16::from_f32(7.0).to_bits()) << 16;
    let matrix = W4Matrix {
        n: shape.n,
        k: shape.k,
        group_size: shape.group_size,
        qweight: (0..shape.n * shape.k / rows::OCTET).map(|_| random()).collect(),
        group_params: vec![numbers; shape.n * shape.groups()],
        offset: Offset::Zero,
    };
    rows::interleave(&matrix, 0, shape, bytes);
}

/// Compares a block's products with those of plain code.
fn check(kernels: &dyn Kernels, matrix: &Rows<'_>, x: &[f32]) -> Result<()> {
    let mut products = [[[0.0; LANES]]; 2];
    for (kernels, products) in [kernels, &Portable as &dyn Kernels].into_iter().zip(&mut products) {
        let mut activations = Activations::with(x.len(), x.len() / rows::BYTE_GROUP)?;
        activations.round(&mut Pool::new(1), kernels, matrix.shape(), &x[..matrix.shape().k], 1)?;
        let mut worker = Worker::new(matrix.shape().k)?;
        kernels.gemv(matrix, 0, 1, &worker.row(kernels, matrix.shape().codes, activations.inputs()), products);
    }
    let [[found], [expected]] = products;
    let close = |(found, expected): (&f32, &f32)| (found - expected).abs() <= 1e-4 * (1.0 + expected.abs());
    match found.iter().zip(&expected).all(close) {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Device, format!("{} computes {found:?}, not {expected:?}", kernels.name()))),
    }
}
