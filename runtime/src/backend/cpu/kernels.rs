//! The inner loops of the CPU backend behind one trait, one implementation per instruction set.
//!
//! Holding a value of an implementation proves that the processor supports it.

use super::integer::rows::{self, Codes, LANES, Rows};
use super::integer::{Inputs, Panel, portable};
use super::vector::{self, Outer};
use crate::tensor::{DenseType, Offset};

/// Rows and columns of a [`Kernels::dot_tile`].
pub(super) const TILE: usize = 4;

/// Inner loops. All slices are f32 in natural order.
pub(super) trait Kernels: Send + Sync {
    /// Instruction set, for people.
    fn name(&self) -> &'static str;

    /// Expands consecutive groups of one row: `words` holds 8 codes each, `params` one entry a group of
    /// `group_size` codes, both starting at the same group; `out.len() == words.len() * 8`.
    fn expand_w4(&self, words: &[u32], params: &[u32], group_size: usize, offset: Offset, out: &mut [f32]);

    /// Widens little-endian f16 values; `bytes.len() == 2 * out.len()`.
    fn expand_f16(&self, bytes: &[u8], out: &mut [f32]);

    /// Narrows to f16, round to nearest even.
    fn narrow_f16(&self, values: &[f32], out: &mut [half::f16]);

    /// acc[r][c] += sum_k w[r * stride_w + k] * x[c * stride_x + k] for r < rows and c < cols, both at most [`TILE`].
    #[allow(clippy::too_many_arguments, reason = "a tile is two strided matrices and three extents")]
    fn dot_tile(
        &self,
        w: &[f32],
        stride_w: usize,
        rows: usize,
        x: &[f32],
        stride_x: usize,
        cols: usize,
        k: usize,
        acc: &mut [[f32; TILE]; TILE],
    );

    /// sum_i a[i] * b[i]
    fn dot(&self, a: &[f32], b: &[f32]) -> f32;

    /// y[i] += a * x[i]
    fn axpy(&self, a: f32, x: &[f32], y: &mut [f32]);

    /// Replaces numbers by e^(x - m), m the largest; returns m and the sum of what they became.
    fn exponentials(&self, x: &mut [f32]) -> (f32, f32);

    /// Widens rows of `dim` codes, see [`vector::expand_q8`].
    fn expand_q8(&self, codes: &[i8], scales: &[f32], dim: usize, out: &mut [f32]);

    /// Widens rows of sixteen codes, see [`vector::expand_q8_lanes`].
    fn expand_q8_lanes(&self, codes: &[i8], scales: &[f32], out: &mut [f32]);

    /// out[i] = silu(gate[i]) * up[i]
    fn silu(&self, gate: &[f32], up: &[f32], out: &mut [f32]);

    /// out[i] = gelu(gate[i]) * up[i], by the formula with tanh.
    fn gelu_tanh(&self, gate: &[f32], up: &[f32], out: &mut [f32]);

    /// c[r, j] = sum_i a[r, i] * b[i, j], see [`vector::outer`]; every matrix with the distance of its rows.
    ///
    /// # Panics
    /// If a matrix is too short.
    fn outer(&self, a: (&[f32], usize), b: (&[f32], usize), c: (&mut [f32], usize), extents: Outer);

    /// Rounds the columns of one span; returns their scale and the sum of what they became. Every implementation
    /// computes the same numbers, in an order of its own.
    fn round_span(&self, x: &[f32], codes: &mut [i16]) -> (f32, f32);

    /// Whether products of `together` rows with one matrix are faster with [`Inputs::planes`].
    fn takes_planes(&self, together: usize) -> bool {
        let _ = together;
        false
    }

    /// Makes planes of the rounded columns of one span, where [`Self::takes_planes`].
    ///
    /// # Panics
    /// Unless their number is a multiple of 32.
    fn split(&self, codes: &mut [i16]) {
        let _ = codes;
    }

    /// Whether [`Self::gemv`] takes [`Inputs::bytes`] for matrices of such codes.
    fn takes_bytes(&self, codes: Codes) -> bool {
        let _ = codes;
        false
    }

    /// Makes bytes of a row of rounded activations, twice as many, where [`Self::takes_bytes`]: of an octet the low bytes of
    /// columns 0, 2, 4 and 6, those of 1, 3, 5 and 7, and the high bytes of both, so that `256 * high + low` is the code.
    ///
    /// # Panics
    /// If there are not as many bytes, or no whole groups of 32 columns.
    fn split_row(&self, codes: &[i16], bytes: &mut [i8]) {
        let _ = (codes, bytes);
    }

    /// Rounded activations in the order of [`portable`], for tests.
    #[cfg(test)]
    fn natural(&self, codes: &[i16]) -> Vec<i16> {
        codes.to_vec()
    }

    /// Rounds the 32 columns of a group of sixteen rows, the first of which are `values`, `stride` numbers from row to row,
    /// to 8 bits: `bytes` become the group of a block. Every implementation rounds numbers in the same way, and what is
    /// none to anything.
    ///
    /// # Panics
    /// If there are not as many values or bytes.
    fn round_group(&self, values: &[f32], stride: usize, bytes: &mut [u8]) {
        rows::round_group(values, stride, bytes);
    }

    /// The weights of some columns of a group of 4-bit codes of a block, (columns, 16), from the group's numbers and the
    /// codes of the columns: those of the definition, rounded as it rounds.
    ///
    /// # Panics
    /// If there are not as many numbers, codes and weights.
    fn expand_columns(&self, offset: Offset, params: &[u8], codes: &[u8], out: &mut [f32]) {
        portable::expand_columns(offset, params, codes, out);
    }

    /// Whether one row of activations meets the blocks of a matrix faster where those that are read side by side are far
    /// apart.
    fn reads_apart(&self) -> bool {
        false
    }

    /// The products of blocks of rows, `apart` from one to the next from `block` on and as many as `out` has, with one row
    /// of activations.
    ///
    /// # Panics
    /// If `x` is not one row for matrices of this shape, with bytes where it [`Self::takes_bytes`], or there are not so many
    /// blocks.
    fn gemv(&self, w: &Rows<'_>, block: usize, apart: usize, x: &Inputs<'_>, out: &mut [[f32; LANES]]);

    /// Brings out the codes of as many spans of as many blocks as the panel says, from `first` and `block` on, in the form
    /// that it says.
    fn unpack(&self, w: &Rows<'_>, block: usize, first: usize, panel: &mut Panel);

    /// Adds to every row's sums its products with the panel, which holds the spans from `first` on: the same as
    /// [`Self::gemv`], to the bit, once all spans were added in their order.
    fn gemm(&self, panel: &Panel, first: usize, x: &Inputs<'_>, sums: &mut [[f32; LANES]]);
}

/// The best implementation for this processor.
pub(super) fn best() -> Box<dyn Kernels> {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(kernels) = super::x86::Avx512::with_amx().or_else(super::x86::Avx512::new) {
            return Box::new(kernels);
        }
        if let Some(kernels) = super::x86::Avx2::with_vnni().or_else(super::x86::Avx2::new) {
            return Box::new(kernels);
        }
    }
    #[cfg(target_arch = "aarch64")]
    if let Some(kernels) = super::arm::Neon::with_i8mm().or_else(super::arm::Neon::new) {
        return Box::new(kernels);
    }
    Box::new(Portable)
}

/// Every implementation this processor supports, for tests and measurements.
pub(super) fn all() -> Vec<Box<dyn Kernels>> {
    let mut all: Vec<Box<dyn Kernels>> = vec![Box::new(Portable)];
    #[cfg(target_arch = "x86_64")]
    {
        all.extend(super::x86::Avx2::new().map(|k| Box::new(k) as _));
        all.extend(super::x86::Avx2::with_vnni().map(|k| Box::new(k) as _));
        all.extend(super::x86::Avx512::new().map(|k| Box::new(k) as _));
        all.extend(super::x86::Avx512::with_amx().map(|k| Box::new(k) as _));
    }
    #[cfg(target_arch = "aarch64")]
    {
        all.extend(super::arm::Neon::new().map(|k| Box::new(k) as _));
        all.extend(super::arm::Neon::with_i8mm().map(|k| Box::new(k) as _));
    }
    all
}

/// Plain Rust; the oracle of the other implementations and the fallback of processors without one.
pub(super) struct Portable;

impl Kernels for Portable {
    fn name(&self) -> &'static str {
        "portable"
    }

    fn expand_w4(&self, words: &[u32], params: &[u32], group_size: usize, offset: Offset, out: &mut [f32]) {
        for ((words, &params), out) in words.chunks(group_size / 8).zip(params).zip(out.chunks_mut(group_size)) {
            let table = offset.weights(params);
            for (&word, out) in words.iter().zip(out.chunks_exact_mut(8)) {
                for (t, out) in out.iter_mut().enumerate() {
                    *out = table[(word >> (4 * t)) as usize & 15];
                }
            }
        }
    }

    fn expand_f16(&self, bytes: &[u8], out: &mut [f32]) {
        DenseType::F16.widen(bytes, out);
    }

    fn narrow_f16(&self, values: &[f32], out: &mut [half::f16]) {
        for (&value, out) in values.iter().zip(out) {
            *out = half::f16::from_f32(value);
        }
    }

    fn dot_tile(
        &self,
        w: &[f32],
        stride_w: usize,
        rows: usize,
        x: &[f32],
        stride_x: usize,
        cols: usize,
        k: usize,
        acc: &mut [[f32; TILE]; TILE],
    ) {
        for (r, acc) in acc.iter_mut().enumerate().take(rows) {
            for (c, acc) in acc.iter_mut().enumerate().take(cols) {
                *acc += self.dot(&w[r * stride_w..][..k], &x[c * stride_x..][..k]);
            }
        }
    }

    fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        // Eight partial sums let the compiler use whatever vectors the target has.
        let mut sums = [0.0f32; 8];
        let (a8, a_rest) = a.as_chunks::<8>();
        let (b8, b_rest) = b.as_chunks::<8>();
        for (a, b) in a8.iter().zip(b8) {
            for i in 0..8 {
                sums[i] += a[i] * b[i];
            }
        }
        sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
    }

    fn axpy(&self, a: f32, x: &[f32], y: &mut [f32]) {
        for (x, y) in x.iter().zip(y) {
            *y += a * x;
        }
    }

    fn exponentials(&self, x: &mut [f32]) -> (f32, f32) {
        vector::exponentials(x)
    }

    fn expand_q8(&self, codes: &[i8], scales: &[f32], dim: usize, out: &mut [f32]) {
        vector::expand_q8(codes, scales, dim, out);
    }

    fn expand_q8_lanes(&self, codes: &[i8], scales: &[f32], out: &mut [f32]) {
        vector::expand_q8_lanes(codes, scales, out);
    }

    fn silu(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        vector::silu(gate, up, out);
    }

    fn gelu_tanh(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        vector::gelu_tanh(gate, up, out);
    }

    fn outer(&self, a: (&[f32], usize), b: (&[f32], usize), c: (&mut [f32], usize), extents: Outer) {
        vector::outer(a.0, a.1, b.0, b.1, c.0, c.1, extents);
    }

    fn round_span(&self, x: &[f32], codes: &mut [i16]) -> (f32, f32) {
        portable::round_span(x, codes)
    }

    fn gemv(&self, w: &Rows<'_>, block: usize, apart: usize, x: &Inputs<'_>, out: &mut [[f32; LANES]]) {
        x.check_row(w.shape(), false);
        portable::gemv(w, block, apart, x, out);
    }

    fn unpack(&self, w: &Rows<'_>, block: usize, first: usize, panel: &mut Panel) {
        portable::unpack(w, block, first, panel);
    }

    fn gemm(&self, panel: &Panel, first: usize, x: &Inputs<'_>, sums: &mut [[f32; LANES]]) {
        portable::gemm(panel, first, x, sums);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(seed: &mut u64) -> u32 {
        *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (*seed >> 32) as u32
    }

    fn floats(n: usize, seed: &mut u64) -> Vec<f32> {
        (0..n).map(|_| random(seed) as f32 / u32::MAX as f32 - 0.5).collect()
    }

    #[test]
    fn expansions_are_bit_equal_to_portable() {
        let mut seed = 7;
        for kernels in all() {
            for (k, group_size) in
                [(32, 32), (64, 32), (64, 64), (576, 64), (128, 128), (344, 344), (1536, 128), (8, 8), (72, 24)]
            {
                for offset in [
                    Offset::Zero,
                    Offset::Bias,
                    Offset::RoundedBias,
                    Offset::ZeroBf16,
                    Offset::BiasBf16,
                    Offset::RoundedBiasBf16,
                ] {
                    let words: Vec<u32> = (0..k / 8).map(|_| random(&mut seed)).collect();
                    let params: Vec<u32> = (0..k / group_size)
                        .map(|_| {
                            let s = half::f16::from_f32(random(&mut seed) as f32 / 4e9 * 0.1);
                            let o = half::f16::from_f32(
                                (random(&mut seed) % 16) as f32 * if offset.is_bias() { -0.01 } else { 1.0 },
                            );
                            u32::from(s.to_bits()) | u32::from(o.to_bits()) << 16
                        })
                        .collect();
                    let (mut expected, mut found) = (vec![f32::NAN; k], vec![f32::NAN; k]);
                    Portable.expand_w4(&words, &params, group_size, offset, &mut expected);
                    kernels.expand_w4(&words, &params, group_size, offset, &mut found);
                    assert_eq!(expected, found, "{} k {k} g {group_size} {offset:?}", kernels.name());
                }
            }
            let halves: Vec<u8> = (0..2 * 77).map(|_| random(&mut seed) as u8 & 0x7b).collect();
            let (mut expected, mut found) = (vec![f32::NAN; 77], vec![f32::NAN; 77]);
            Portable.expand_f16(&halves, &mut expected);
            kernels.expand_f16(&halves, &mut found);
            assert_eq!(expected, found, "{}", kernels.name());
            for (dim, groups) in [(8, 1), (32, 1), (80, 3), (128, 4)] {
                let codes: Vec<i8> = (0..16 * dim).map(|_| random(&mut seed) as i8).collect();
                let scales = floats(16 * groups, &mut seed);
                let (mut expected, mut found) = (vec![f32::NAN; 16 * dim], vec![f32::NAN; 16 * dim]);
                for (i, out) in expected.iter_mut().enumerate() {
                    *out = f32::from(codes[i]) * scales[i / dim * groups + i % dim / 32];
                }
                kernels.expand_q8(&codes, &scales, dim, &mut found);
                assert_eq!(expected, found, "{}", kernels.name());
                for (i, out) in expected.iter_mut().enumerate() {
                    *out = f32::from(codes[i]) * scales[i / 16 / 32 * 16 + i % 16];
                }
                kernels.expand_q8_lanes(&codes, &scales, &mut found);
                assert_eq!(expected, found, "{}", kernels.name());
            }
            let values = floats(53, &mut seed);
            let (mut expected, mut found) = (vec![half::f16::NAN; 53], vec![half::f16::NAN; 53]);
            Portable.narrow_f16(&values, &mut expected);
            kernels.narrow_f16(&values, &mut found);
            assert_eq!(expected, found, "{}", kernels.name());
        }
    }

    #[test]
    fn outer_products_match_f64_and_do_not_depend_on_their_neighbours() {
        let mut seed = 13;
        for kernels in all() {
            for (rows, depth, columns) in
                [(1, 1, 1), (1, 64, 16), (3, 64, 16), (24, 40, 64), (7, 5, 80), (13, 33, 24), (2, 9, 100)]
            {
                let (lda, ldb, ldc) = (depth + 2, columns + 3, columns + 1);
                let (a, b) = (floats(rows * lda, &mut seed), floats(depth * ldb, &mut seed));
                for add in [false, true] {
                    let given = floats(rows * ldc, &mut seed);
                    let mut found = given.clone();
                    kernels.outer((&a, lda), (&b, ldb), (&mut found, ldc), Outer { rows, depth, columns, add });
                    for r in 0..rows {
                        let mut alone = given[r * ldc..][..columns].to_vec();
                        let extents = Outer { rows: 1, depth, columns, add };
                        kernels.outer((&a[r * lda..], lda), (&b, ldb), (&mut alone, ldc), extents);
                        for j in 0..columns {
                            let before = if add { f64::from(given[r * ldc + j]) } else { 0.0 };
                            let product = |i: usize| f64::from(a[r * lda + i]) * f64::from(b[i * ldb + j]);
                            let expected = before + (0..depth).map(product).sum::<f64>();
                            assert!((f64::from(found[r * ldc + j]) - expected).abs() < 1e-5, "{}", kernels.name());
                            assert_eq!(found[r * ldc + j], alone[j], "{}", kernels.name());
                        }
                        assert_eq!(found[r * ldc + columns], given[r * ldc + columns]);
                    }
                }
            }
        }
    }

    #[test]
    fn dots_match_f64() {
        let mut seed = 11;
        for kernels in all() {
            for k in [1, 7, 8, 15, 16, 17, 64, 100, 576] {
                let w = floats(TILE * (k + 3), &mut seed);
                let x = floats(TILE * (k + 5), &mut seed);
                for rows in 1..=TILE {
                    for cols in 1..=TILE {
                        let mut acc = [[1.0f32; TILE]; TILE];
                        kernels.dot_tile(&w, k + 3, rows, &x, k + 5, cols, k, &mut acc);
                        for r in 0..TILE {
                            for c in 0..TILE {
                                let expected = if r < rows && c < cols {
                                    1.0 + (0..k)
                                        .map(|i| f64::from(w[r * (k + 3) + i]) * f64::from(x[c * (k + 5) + i]))
                                        .sum::<f64>()
                                } else {
                                    1.0
                                };
                                assert!((f64::from(acc[r][c]) - expected).abs() < 1e-5, "{} k {k}", kernels.name());
                            }
                        }
                    }
                }
                let mut y = x[..k].to_vec();
                kernels.axpy(0.5, &w[..k], &mut y);
                for i in 0..k {
                    assert!((y[i] - (x[i] + 0.5 * w[i])).abs() < 1e-6);
                }
                let expected: f64 = (0..k).map(|i| f64::from(w[i]) * f64::from(x[i])).sum();
                assert!((f64::from(kernels.dot(&w[..k], &x[..k])) - expected).abs() < 1e-5);
            }
        }
    }
}
