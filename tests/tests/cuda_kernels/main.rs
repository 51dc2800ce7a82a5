//! Every CUDA kernel by itself, with ragged shapes and fresh random data, against sums in f64: on the machine of
//! tests/cuda, or on this one's own driver with `AWQUA_CUDA_DEVICE=1`.
#![cfg(all(feature = "cuda", target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::print_stderr, reason = "a failure must name its seed")]

mod attention;
mod experts;
#[path = "../machine/mod.rs"]
mod machine;
mod products;
mod routing;
mod rows;

use awqua::backend::cuda::driver::Buffer;
use awqua::tensor::Offset;
use awqua_shaders::Rng;
use awqua_shaders::cuda::{
    self, AttentionAnyArgs, AttentionArgs, AttentionCoopArgs, CHUNK, EmbedArgs, GemmArgs, GemvDenseArgs, GemvW4Args,
    GluArgs, NormArgs, Place, Product, RopeAppendArgs, Row, RowsArgs, STAGE, ScaleArgs, StageArgs, TILE, W4Args, WIDE,
};
use awqua_tests::cuda::{Device, Packed, inputs, multiply, random_matrix, rounded, tile_offset};
use half::{bf16, f16};
use machine::{ALL_CAPABILITIES, is_on_machine};

fn rng(test: &str) -> Rng {
    let seed = std::env::var("AWQUA_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |now| now.as_nanos() as u64)
    });
    eprintln!("{test}: AWQUA_SEED={seed}");
    Rng::new(seed)
}

/// Whether this is the real thing, where larger shapes take no time; `AWQUA_SMALL=1` for checkers of memory, which do.
fn is_fast() -> bool {
    std::env::var_os("AWQUA_CUDA_DEVICE").is_some() && std::env::var_os("AWQUA_SMALL").is_none()
}

/// What a product of `k` inputs on the matrix units may be off, as a share of the sum of magnitudes: roundings of single
/// precision, and what the units cut off. They truncate each sum of 16 products and the sum before to 24 bits, always
/// towards zero, so that errors add up: at most 2^-23 of what was added up so far, which is half of all on average.
fn truncated(k: usize) -> f64 {
    3e-6 + k.div_ceil(16) as f64 * 0.5f64.powi(24)
}

#[track_caller]
fn assert_near(label: &str, found: &[f32], expected: &[(f64, f64)], relative: f64) {
    assert_eq!(found.len(), expected.len(), "{label}");
    for (i, (f, (e, magnitude))) in found.iter().zip(expected).enumerate() {
        let allowed = relative * magnitude + 1e-6;
        assert!((f64::from(*f) - e).abs() <= allowed, "{label}: value {i} is {f}, expected {e} within {allowed}");
    }
}

/// A matrix of a kernel's test.
#[derive(Debug, Clone, Copy)]
struct Shape {
    n: usize,
    k: usize,
    group_size: usize,
    offset: Offset,
    fractions: bool,
}

fn shapes() -> Vec<Shape> {
    let shape = |n, k, group_size, offset, fractions| Shape { n, k, group_size, offset, fractions };
    let zero = Offset::Zero;
    let mut all = vec![
        shape(1, 8, 8, zero, false),
        shape(33, 128, 128, zero, false),
        shape(80, 200, 200, zero, false),
        shape(96, 640, 128, zero, false),
        shape(64, 192, 64, zero, false),
        shape(48, 320, 64, zero, false),
        shape(40, 96, 32, zero, false),
        shape(70, 1056, 32, zero, false),
        shape(64, 256, 128, zero, true),
        shape(37, 192, 64, Offset::Bias, false),
        shape(32, 160, 32, Offset::Bias, false),
        shape(50, 72, 72, Offset::Bias, false),
    ];
    if is_fast() {
        all.extend([
            shape(4096, 4096, 128, zero, false),
            shape(500, 11008, 128, zero, false),
            shape(1000, 2048, 64, zero, false),
            shape(528, 2048, 32, Offset::Bias, false),
        ]);
    }
    all
}

fn packed(device: &Device, shape: Shape, rng: &mut Rng) -> Packed {
    let Shape { n, k, group_size, offset, fractions } = shape;
    Packed::new(device, random_matrix(n, k, group_size, offset, fractions, rng))
}

fn random_rows(tokens: usize, k: usize, rng: &mut Rng) -> Vec<Vec<f32>> {
    (0..tokens).map(|_| rng.activations(k)).collect()
}

/// f32 rows of `width` columns from column 4 on, 8 wider than that; poisoned or, for sums, random.
struct Out {
    buffer: Buffer,
    before: Vec<f32>,
    stride: usize,
}

impl Out {
    fn new(device: &Device, tokens: usize, width: usize, add: bool, rng: &mut Rng) -> Self {
        let stride = width.next_multiple_of(4) + 8;
        let before = match add {
            true => rng.values(tokens * stride, 1.0),
            false => vec![f32::from_bits(0x7fc0_dead); tokens * stride],
        };
        Self { buffer: device.upload(&before), before, stride }
    }

    fn target(&self, product: Product) -> Product {
        let target = cuda::TO_ROWS;
        Product { out: self.buffer.address(), out_stride: self.stride as u32, out_offset: 4, target, ..product }
    }

    /// Compares every column, those around the result too.
    fn check(&self, device: &Device, label: &str, expected: &[Vec<(f64, f64)>], add: bool, relative: f64) {
        let found: Vec<f32> = device.download(&self.buffer, self.before.len());
        for (token, expected) in expected.iter().enumerate() {
            let row = token * self.stride..(token + 1) * self.stride;
            let (found, before) = (&found[row.clone()], &self.before[row]);
            let inside = 4..4 + expected.len();
            for i in (0..self.stride).filter(|i| !inside.contains(i)) {
                assert_eq!(found[i].to_bits(), before[i].to_bits(), "{label}: token {token}, column {i} was touched");
            }
            let old = |i: usize| if add { f64::from(before[4 + i]) } else { 0.0 };
            let expected: Vec<_> =
                expected.iter().enumerate().map(|(i, (v, m))| (v + old(i), m + old(i).abs())).collect();
            assert_near(&format!("{label}: token {token}"), &found[inside], &expected, relative);
        }
    }
}

fn with_bias(products: &mut [Vec<(f64, f64)>], bias: &[f32]) {
    for row in products {
        row.iter_mut().zip(bias).for_each(|(v, b)| *v = (v.0 + f64::from(*b), v.1 + f64::from(b.abs())));
    }
}

/// Biases padded to whole pairs of tiles.
fn bias_of(device: &Device, n: usize, rng: &mut Rng) -> (Vec<f32>, Buffer) {
    let bias = rng.values(n, 1.0);
    let mut padded = bias.clone();
    padded.resize(n.next_multiple_of(2 * TILE as usize), 0.0);
    let buffer = device.upload(&padded);
    (bias, buffer)
}
