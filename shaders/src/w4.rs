//! The 4-bit layout of the device, twin of `prelude/w4.wgsl`: tiles of 32 outputs, in a tile chunks of 32 inputs, and
//! of a chunk four words an output, so that neighbouring invocations that take an output each read neighbouring bytes.

use std::sync::OnceLock;

use crate::{Cost, FLAG_BIAS, FLAG_OFFSET_IS_BIAS, FLAG_SUMS, Rng, trial};

/// Outputs of a tile.
pub const TILE_N: usize = 32;
/// Inputs of a chunk.
pub const CHUNK_K: usize = 32;
/// Words that an output has of a chunk.
pub const CHUNK_WORDS: usize = CHUNK_K / 8;

/// A matrix of N outputs and K inputs in groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Outputs.
    pub n: usize,
    /// Inputs; a multiple of 8.
    pub k: usize,
    /// Inputs of a group; a multiple of 8 that divides k.
    pub group_size: usize,
}

impl Shape {
    /// Chunks of an output; the last one is padded.
    pub fn chunks(&self) -> usize {
        self.k.div_ceil(CHUNK_K)
    }

    /// Groups of an output.
    pub fn groups(&self) -> usize {
        self.k / self.group_size
    }

    /// Words of `rows` outputs, the padding of the last tile included.
    pub fn words(&self, rows: usize) -> usize {
        rows.next_multiple_of(TILE_N) * self.chunks() * CHUNK_WORDS
    }

    /// Group parameters of `rows` outputs, the padding of the last tile included.
    pub fn params(&self, rows: usize) -> usize {
        rows.next_multiple_of(TILE_N) * self.groups()
    }

    /// Index of the word that holds the codes of output `n` for inputs `8 * column..`.
    pub fn word_index(&self, n: usize, column: usize) -> usize {
        let (chunk, word) = (column / CHUNK_WORDS, column % CHUNK_WORDS);
        ((n / TILE_N * self.chunks() + chunk) * TILE_N + n % TILE_N) * CHUNK_WORDS + word
    }

    /// Index of the parameters of group `group` of output `n`.
    pub fn group_index(&self, n: usize, group: usize) -> usize {
        (n / TILE_N * self.groups() + group) * TILE_N + n % TILE_N
    }

    /// Lays out whole tiles: `codes` are (rows, k / 8) words and `group_params` (rows, groups), both row-major, for
    /// any number of rows from the start of a tile. Padding is 0.
    pub fn tile(&self, codes: &[u32], group_params: &[u32]) -> (Vec<u32>, Vec<u32>) {
        let columns = self.k / 8;
        let rows = codes.len() / columns.max(1);
        let mut words = vec![0; self.words(rows)];
        for (n, row) in codes.chunks_exact(columns.max(1)).enumerate() {
            for (chunk, part) in row.chunks(CHUNK_WORDS).enumerate() {
                let at = self.word_index(n, chunk * CHUNK_WORDS);
                words[at..at + part.len()].copy_from_slice(part);
            }
        }
        let mut params = vec![0; self.params(rows)];
        for (n, row) in group_params.chunks_exact(self.groups().max(1)).enumerate() {
            for (group, &word) in row.iter().enumerate() {
                params[self.group_index(n, group)] = word;
            }
        }
        (words, params)
    }
}

/// Largest relative error of a weight: it is rounded to half precision in the reference, not on the device.
pub(crate) const WEIGHT_ROUNDING: f32 = 6e-4;
/// Half precision products of inputs in [-1, 1] with codes of at most 15 in magnitude, summed four deep, relative to
/// the sum of 15 * |s * x|.
pub(crate) const F16_PRODUCTS: f32 = 2.5e-3;
/// Rounding of a long sum in single precision, relative to the same sum.
pub(crate) const F32_PRODUCTS: f32 = 1e-5;
/// What half precision may cost in the mean, so that a whole model stays within a hundredth of its largest logit.
pub(crate) const F16_RMS: f32 = 1e-3;

/// A matrix in the device layout with the meaning of its groups.
#[derive(Debug, Clone)]
pub struct Matrix {
    /// Its shape.
    pub shape: Shape,
    /// Codes.
    pub words: Vec<u32>,
    /// Scales and offsets.
    pub params: Vec<u32>,
    /// Bits [`FLAG_OFFSET_IS_BIAS`] and [`FLAG_SUMS`] of the kernels.
    pub flags: u32,
    /// (n, k), once somebody asked: products with many rows need them often, and so does the start-up test.
    decoded: OnceLock<Vec<Decoded>>,
}

/// A weight, and what half precision products with its code may be off by, of 15 in magnitude.
#[derive(Debug, Clone, Copy)]
struct Decoded {
    weight: f32,
    bound: f32,
}

impl Matrix {
    /// Random codes; of `flags`, [`FLAG_OFFSET_IS_BIAS`] makes biases instead of zero points and [`FLAG_SUMS`] without
    /// it zero points between the codes.
    pub(crate) fn random(shape: Shape, flags: u32, rng: &mut Rng) -> Self {
        let codes: Vec<u32> = (0..shape.n * shape.k / 8).map(|_| rng.next_u32()).collect();
        let bias = flags & FLAG_OFFSET_IS_BIAS != 0;
        let flags = flags & FLAG_SUMS | if bias { FLAG_OFFSET_IS_BIAS | FLAG_SUMS } else { 0 };
        let group_params: Vec<u32> = (0..shape.n * shape.groups())
            .map(|_| {
                let s = rng.range(-0.02, 0.02);
                let o = match (bias, flags & FLAG_SUMS != 0) {
                    (true, _) => rng.range(-0.2, 0.2),
                    (false, true) => rng.range(0.0, 15.0),
                    (false, false) => rng.below(16) as f32,
                };
                trial::pack_halves(&[s, o])[0]
            })
            .collect();
        let (words, params) = shape.tile(&codes, &group_params);
        Self { shape, words, params, flags, decoded: OnceLock::new() }
    }

    /// Scale and offset of the group of input `k` of output `n`.
    fn scale_offset(&self, n: usize, k: usize) -> (f32, f32) {
        let word = self.params[self.shape.group_index(n, k / self.shape.group_size)];
        let half = |bits: u32| half::f16::from_bits(bits as u16).to_f32();
        (half(word), half(word >> 16))
    }

    /// Weight of output `n` and input `k`, rounded to half precision as the formats define it.
    pub fn weight(&self, n: usize, k: usize) -> f32 {
        let q = ((self.words[self.shape.word_index(n, k / 8)] >> (4 * (k % 8))) & 15) as f32;
        let (s, o) = self.scale_offset(n, k);
        let exact = if self.flags & FLAG_OFFSET_IS_BIAS != 0 { q * s + o } else { (q - o) * s };
        half::f16::from_f32(exact).to_f32()
    }

    /// The weights of output `n`.
    fn row(&self, n: usize) -> &[Decoded] {
        let k = self.shape.k;
        let decode = |n, k| {
            let (s, o) = self.scale_offset(n, k);
            let bias = if self.flags & FLAG_OFFSET_IS_BIAS != 0 { o.abs() } else { 0.0 };
            Decoded { weight: self.weight(n, k), bound: 15.0 * s.abs() + bias }
        };
        let all = || (0..self.shape.n).flat_map(|n| (0..k).map(move |k| decode(n, k))).collect();
        &self.decoded.get_or_init(all)[n * k..][..k]
    }

    /// Product of output `n` with `x` in f64.
    pub fn product(&self, n: usize, x: &[f32]) -> f64 {
        self.row(n).iter().zip(x).map(|(decoded, &x)| f64::from(x) * f64::from(decoded.weight)).sum()
    }

    /// How far the product of output `n` with `x` may be off; `f16` for half precision products.
    pub(crate) fn tolerance(&self, n: usize, x: &[f32], f16: bool) -> f32 {
        let (mut weights, mut codes) = (0.0, 0.0);
        for (decoded, x) in self.row(n).iter().zip(x) {
            weights += x.abs() * decoded.weight.abs();
            codes += x.abs() * decoded.bound;
        }
        WEIGHT_ROUNDING * weights + if f16 { F16_PRODUCTS } else { F32_PRODUCTS } * codes
    }
}

/// `x / sqrt(mean(x^2) + eps) * norm`.
pub fn normed(x: &[f32], norm: &[f32], eps: f32) -> Vec<f32> {
    let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (mean + f64::from(eps)).sqrt();
    x.iter().zip(norm).map(|(v, w)| (f64::from(*v) * factor * f64::from(*w)) as f32).collect()
}

/// The bias of output `n` under these flags.
pub(crate) fn bias_of(flags: u32, bias: &[f32], n: usize) -> f64 {
    if flags & FLAG_BIAS != 0 { f64::from(bias[n]) } else { 0.0 }
}

/// Weights and f32 activations once, two operations a weight and row.
pub(crate) fn cost(n: u32, k: u32, groups: u32, rows: u32) -> Cost {
    let (n, k, rows) = (u64::from(n), u64::from(k), u64::from(rows));
    Cost { bytes: n * (k / 2 + 4 * u64::from(groups)) + 4 * rows * (k + n), flops: 2 * n * k * rows }
}
