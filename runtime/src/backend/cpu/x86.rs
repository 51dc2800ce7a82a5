//! x86-64 inner loops: AVX2 + FMA + F16C here, AVX-512 and AMX in [`wide`].
//!
//! A group of 4-bit codes holds at most 16 different weights, so both expand a group through a 16-entry table in
//! registers: the rounding to f16 is paid once a group, and a weight costs a shift and a permutation.

use std::arch::x86_64::*;

use super::integer::rows::{Codes, LANES, OCTET, Rows};
use super::integer::{Inputs, Panel, avx2};
use super::kernels::{Kernels, Portable, TILE};
use super::vector::{self, Outer};
use crate::tensor::{DenseType, Offset};

pub(super) use wide::Avx512;

mod wide;

/// AVX2 with FMA and F16C.
pub(super) struct Avx2 {
    /// Whether to use AVX-VNNI.
    vnni: bool,
}

impl Avx2 {
    pub(super) fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c"))
            .then_some(Self { vnni: false })
    }

    /// With AVX-VNNI too.
    pub(super) fn with_vnni() -> Option<Self> {
        is_x86_feature_detected!("avxvnni").then(Self::new).flatten().map(|_| Self { vnni: true })
    }
}

impl Kernels for Avx2 {
    fn name(&self) -> &'static str {
        if self.vnni { "avx-vnni" } else { "avx2" }
    }

    fn expand_w4(&self, words: &[u32], params: &[u32], group_size: usize, offset: Offset, out: &mut [f32]) {
        assert!(out.len() == words.len() * 8 && group_size.is_multiple_of(8));
        // SAFETY: `self` proves AVX2, FMA and F16C.
        unsafe { expand_w4_avx2(words, params, group_size, offset, out) }
    }

    fn expand_f16(&self, bytes: &[u8], out: &mut [f32]) {
        assert!(bytes.len() == 2 * out.len());
        // SAFETY: `self` proves F16C; the lengths were just checked.
        unsafe { expand_f16_f16c(bytes, out) }
    }

    fn narrow_f16(&self, values: &[f32], out: &mut [half::f16]) {
        assert!(values.len() == out.len());
        // SAFETY: `self` proves F16C; the lengths were just checked.
        unsafe { narrow_f16_f16c(values, out) }
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
        check_tile(w, stride_w, rows, x, stride_x, cols, k);
        for (r, acc) in acc.iter_mut().enumerate().take(rows) {
            let w = &w[r * stride_w..][..k];
            // SAFETY: `self` proves AVX2 and FMA; `check_tile` proved that `cols` rows of `k` lie in `x`.
            unsafe {
                match cols {
                    1 => dot_cols_avx2::<1>(w, x, stride_x, acc),
                    2 => dot_cols_avx2::<2>(w, x, stride_x, acc),
                    3 => dot_cols_avx2::<3>(w, x, stride_x, acc),
                    _ => dot_cols_avx2::<4>(w, x, stride_x, acc),
                }
            }
        }
    }

    fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        assert!(a.len() == b.len());
        let mut acc = [0.0; TILE];
        // SAFETY: `self` proves AVX2 and FMA; `b` is as long as `a`.
        unsafe { dot_cols_avx2::<1>(a, b, 0, &mut acc) };
        acc[0]
    }

    fn axpy(&self, a: f32, x: &[f32], y: &mut [f32]) {
        assert!(x.len() == y.len());
        // SAFETY: `self` proves AVX2 and FMA; the lengths were just checked.
        unsafe { axpy_avx2(a, x, y) }
    }

    fn exponentials(&self, x: &mut [f32]) -> (f32, f32) {
        // SAFETY: `self` proves AVX2 and FMA.
        unsafe { exponentials_avx2(x) }
    }

    fn expand_q8(&self, codes: &[i8], scales: &[f32], dim: usize, out: &mut [f32]) {
        // SAFETY: `self` proves AVX2 and FMA.
        unsafe { expand_q8_avx2(codes, scales, dim, out) }
    }

    fn expand_q8_lanes(&self, codes: &[i8], scales: &[f32], out: &mut [f32]) {
        // SAFETY: `self` proves AVX2 and FMA.
        unsafe { expand_q8_lanes_avx2(codes, scales, out) }
    }

    fn silu(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        // SAFETY: `self` proves AVX2 and FMA.
        unsafe { silu_avx2(gate, up, out) }
    }

    fn gelu_tanh(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        // SAFETY: `self` proves AVX2 and FMA.
        unsafe { gelu_tanh_avx2(gate, up, out) }
    }

    fn outer(&self, a: (&[f32], usize), b: (&[f32], usize), c: (&mut [f32], usize), extents: Outer) {
        check_outer(&extents, a, b, (c.0, c.1));
        // SAFETY: `self` proves AVX2 and FMA; the matrices were just checked.
        unsafe { outer_avx2(a, b, c, extents) }
    }

    fn round_span(&self, x: &[f32], codes: &mut [i16]) -> (f32, f32) {
        // SAFETY: `self` proves AVX2 and FMA.
        unsafe { avx2::round_span(x, codes) }
    }

    fn round_group(&self, values: &[f32], stride: usize, bytes: &mut [u8]) {
        // SAFETY: `self` proves AVX2 and F16C.
        unsafe { avx2::round_group(values, stride, bytes) }
    }

    fn expand_columns(&self, offset: Offset, params: &[u8], codes: &[u8], out: &mut [f32]) {
        // SAFETY: `self` proves AVX2 and F16C.
        unsafe { expand_columns_avx2(offset, params, codes, out) }
    }

    fn reads_apart(&self) -> bool {
        true
    }

    fn takes_bytes(&self, codes: Codes) -> bool {
        self.vnni && matches!(codes, Codes::Four(_))
    }

    fn split_row(&self, codes: &[i16], bytes: &mut [i8]) {
        // SAFETY: `self` proves AVX2.
        unsafe { avx2::split_row(codes, bytes) }
    }

    fn gemv(&self, w: &Rows<'_>, block: usize, apart: usize, x: &Inputs<'_>, out: &mut [[f32; LANES]]) {
        x.check_row(w.shape(), self.takes_bytes(w.shape().codes));
        // SAFETY: `self` proves AVX2, FMA and F16C, and `vnni` AVX-VNNI.
        unsafe {
            match self.vnni {
                true => avx2::vnni::gemv(w, block, apart, x, out),
                false => avx2::plain::gemv(w, block, apart, x, out),
            }
        }
    }

    fn unpack(&self, w: &Rows<'_>, block: usize, first: usize, panel: &mut Panel) {
        // SAFETY: `self` proves AVX2 and F16C.
        unsafe { avx2::unpack(w, block, first, panel) }
    }

    fn gemm(&self, panel: &Panel, first: usize, x: &Inputs<'_>, sums: &mut [[f32; LANES]]) {
        // SAFETY: `self` proves AVX2, FMA and F16C, and `vnni` AVX-VNNI.
        unsafe {
            match self.vnni {
                true => avx2::vnni::gemm(panel, first, x, sums),
                false => avx2::plain::gemm(panel, first, x, sums),
            }
        }
    }
}

/// # Panics
/// If a matrix is shorter than `extents`, each with the distance of its rows.
fn check_outer(extents: &Outer, a: (&[f32], usize), b: (&[f32], usize), c: (&[f32], usize)) {
    let fits = |(m, stride): (&[f32], usize), rows: usize, columns: usize| {
        rows == 0 || columns == 0 || (rows - 1) * stride + columns <= m.len()
    };
    let Outer { rows, depth, columns, .. } = *extents;
    assert!(fits(a, rows, depth) && fits(b, depth, columns) && fits(c, rows, columns));
}

fn check_tile(w: &[f32], stride_w: usize, rows: usize, x: &[f32], stride_x: usize, cols: usize, k: usize) {
    assert!((1..=TILE).contains(&rows) && (1..=TILE).contains(&cols));
    assert!((rows - 1) * stride_w + k <= w.len() && (cols - 1) * stride_x + k <= x.len());
}

/// Weights of the codes `q` with the numbers s and o of their groups, as [`Offset`] defines them.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn weights_avx2(q: __m256, s: __m256, o: __m256, offset: Offset) -> __m256 {
    let bf16 = offset.rounding() == DenseType::BF16;
    let round = |w: __m256| {
        if !bf16 {
            return _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(w));
        }
        // To nearest, ties to even: add half of the last place kept, less one if that is even. Weights are finite.
        let bits = _mm256_castps_si256(w);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        _mm256_castsi256_ps(_mm256_and_si256(sum, _mm256_set1_epi32(-0x1_0000)))
    };
    // Multiply and add stay apart: a fused one would round differently from the definition.
    round(match offset {
        Offset::Zero | Offset::ZeroBf16 => _mm256_mul_ps(_mm256_sub_ps(q, o), s),
        Offset::Bias | Offset::BiasBf16 => _mm256_add_ps(_mm256_mul_ps(q, s), o),
        Offset::RoundedBias | Offset::RoundedBiasBf16 => _mm256_add_ps(round(_mm256_mul_ps(q, s)), o),
    })
}

/// The table of `Offset::weights` in two registers: codes 0..8 and 8..16.
#[target_feature(enable = "avx2,f16c")]
fn table_avx2(params: u32, offset: Offset) -> (__m256, __m256) {
    let both = _mm_cvtph_ps(_mm_cvtsi32_si128(params as i32));
    let scale = _mm256_broadcastss_ps(both);
    let o = _mm256_broadcastss_ps(_mm_movehdup_ps(both));
    let half = |base: f32| {
        let q = _mm256_add_ps(_mm256_set1_ps(base), _mm256_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0));
        weights_avx2(q, scale, o, offset)
    };
    (half(0.0), half(8.0))
}

/// See [`Kernels::expand_columns`].
#[target_feature(enable = "avx2,f16c")]
fn expand_columns_avx2(offset: Offset, params: &[u8], codes: &[u8], out: &mut [f32]) {
    match offset {
        Offset::Zero => expand_columns_of(Offset::Zero, params, codes, out),
        offset => expand_columns_of(offset, params, codes, out),
    }
}

/// Inlined, so that the common kind of offsets has a loop of its own.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn expand_columns_of(offset: Offset, params: &[u8], codes: &[u8], out: &mut [f32]) {
    assert!(params.len() == 4 * LANES && 2 * codes.len() == out.len() && out.len().is_multiple_of(OCTET * LANES));
    // SAFETY: four vectors of eight numbers, as was just checked.
    let numbers: [__m256; 4] =
        std::array::from_fn(|i| unsafe { _mm256_cvtph_ps(_mm_loadu_si128(params.as_ptr().cast::<__m128i>().add(i))) });
    let low = _mm256_set1_epi32(15);
    for (bytes, out) in codes.chunks_exact(4 * LANES).zip(out.chunks_exact_mut(OCTET * LANES)) {
        for h in 0..2 {
            // SAFETY: words of sixteen rows, whose eight columns have sixteen weights each.
            unsafe {
                let mut words = _mm256_loadu_si256(bytes.as_ptr().cast::<__m256i>().add(h));
                for t in 0..OCTET {
                    let q = _mm256_cvtepi32_ps(_mm256_and_si256(words, low));
                    let w = weights_avx2(q, numbers[h], numbers[2 + h], offset);
                    _mm256_storeu_ps(out.as_mut_ptr().add(LANES * t + 8 * h), w);
                    words = _mm256_srli_epi32::<4>(words);
                }
            }
        }
    }
}

#[target_feature(enable = "avx2,f16c")]
fn expand_w4_avx2(words: &[u32], params: &[u32], group_size: usize, offset: Offset, out: &mut [f32]) {
    let shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    for ((words, &params), out) in words.chunks(group_size / 8).zip(params).zip(out.chunks_mut(group_size)) {
        let (low, high) = table_avx2(params, offset);
        for (&word, out) in words.iter().zip(out.as_chunks_mut::<8>().0) {
            let codes = _mm256_srlv_epi32(_mm256_set1_epi32(word as i32), shifts);
            // The permutation reads bits 0..3 of each index; bit 3 becomes the sign that selects the half.
            let select = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
            let w =
                _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), select);
            // SAFETY: `out` is 8 floats.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), w) };
        }
    }
}

#[target_feature(enable = "f16c")]
fn expand_f16_f16c(bytes: &[u8], out: &mut [f32]) {
    let (blocks, rest) = bytes.as_chunks::<16>();
    let (out_blocks, out_rest) = out.as_chunks_mut::<8>();
    for (block, out) in blocks.iter().zip(out_blocks) {
        // SAFETY: unaligned load of 16 bytes and store of 8 floats, both inside their arrays.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(block.as_ptr().cast()))) };
    }
    Portable.expand_f16(rest, out_rest);
}

#[target_feature(enable = "f16c")]
fn narrow_f16_f16c(values: &[f32], out: &mut [half::f16]) {
    let (blocks, rest) = values.as_chunks::<8>();
    let (out_blocks, out_rest) = out.as_chunks_mut::<8>();
    for (block, out) in blocks.iter().zip(out_blocks) {
        // SAFETY: unaligned load of 8 floats and store of 8 halves (`f16` is a transparent u16), inside their arrays.
        unsafe {
            let half = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(block.as_ptr()));
            _mm_storeu_si128(out.as_mut_ptr().cast(), half);
        }
    }
    Portable.narrow_f16(rest, out_rest);
}

#[target_feature(enable = "avx")]
pub(super) fn sum_avx(v: __m256) -> f32 {
    let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
}

/// acc[c] += w . x[c * stride ..] for c < C.
///
/// # Safety
/// `(C - 1) * stride + w.len() <= x.len()`.
#[target_feature(enable = "avx2,fma")]
unsafe fn dot_cols_avx2<const C: usize>(w: &[f32], x: &[f32], stride: usize, acc: &mut [f32; TILE]) {
    let k = w.len();
    // Two sums a column hide the latency of the fused multiply-add.
    let mut sums = [[_mm256_setzero_ps(); 2]; C];
    let mut i = 0;
    while i + 16 <= k {
        for half in 0..2 {
            let at = i + 8 * half;
            // SAFETY: `at + 8 <= k`, and the caller promises `C` rows of `k` elements in `x`.
            unsafe {
                let w = _mm256_loadu_ps(w.as_ptr().add(at));
                for c in 0..C {
                    sums[c][half] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x.as_ptr().add(c * stride + at)), sums[c][half]);
                }
            }
        }
        i += 16;
    }
    for c in 0..C {
        let tail: f32 = w[i..].iter().zip(&x[c * stride + i..]).map(|(w, x)| w * x).sum();
        acc[c] += sum_avx(_mm256_add_ps(sums[c][0], sums[c][1])) + tail;
    }
}

#[target_feature(enable = "avx2,fma")]
fn axpy_avx2(a: f32, x: &[f32], y: &mut [f32]) {
    let va = _mm256_set1_ps(a);
    let (x8, x_rest) = x.as_chunks::<8>();
    let (y8, y_rest) = y.as_chunks_mut::<8>();
    for (x, y) in x8.iter().zip(y8) {
        // SAFETY: both are arrays of 8 floats.
        unsafe {
            let sum = _mm256_fmadd_ps(va, _mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(y.as_ptr()));
            _mm256_storeu_ps(y.as_mut_ptr(), sum);
        }
    }
    for (x, y) in x_rest.iter().zip(y_rest) {
        *y += a * x;
    }
}

#[target_feature(enable = "avx2,fma")]
fn exponentials_avx2(x: &mut [f32]) -> (f32, f32) {
    vector::exponentials(x)
}

#[target_feature(enable = "avx2,fma")]
fn expand_q8_avx2(codes: &[i8], scales: &[f32], dim: usize, out: &mut [f32]) {
    vector::expand_q8(codes, scales, dim, out);
}

#[target_feature(enable = "avx2,fma")]
fn expand_q8_lanes_avx2(codes: &[i8], scales: &[f32], out: &mut [f32]) {
    vector::expand_q8_lanes(codes, scales, out);
}

#[target_feature(enable = "avx2,fma")]
fn silu_avx2(gate: &[f32], up: &[f32], out: &mut [f32]) {
    vector::silu(gate, up, out);
}

#[target_feature(enable = "avx2,fma")]
fn gelu_tanh_avx2(gate: &[f32], up: &[f32], out: &mut [f32]) {
    vector::gelu_tanh(gate, up, out);
}

/// See [`vector::outer`]: tiles of 6 rows and 16 columns.
///
/// # Safety
/// The matrices have these extents.
#[target_feature(enable = "avx2,fma")]
unsafe fn outer_avx2(a: (&[f32], usize), b: (&[f32], usize), c: (&mut [f32], usize), extents: Outer) {
    const ROWS: usize = 6;
    let whole = extents.columns / 16 * 16;
    for first in (0..extents.rows).step_by(ROWS) {
        let extents = Outer { rows: ROWS.min(extents.rows - first), ..extents };
        for column in (0..whole).step_by(16) {
            // SAFETY: these rows and sixteen columns lie in the matrices by the caller's promise.
            unsafe {
                let a = (a.0.as_ptr().add(first * a.1), a.1);
                let b = (b.0.as_ptr().add(column), b.1);
                let c = (c.0.as_mut_ptr().add(first * c.1 + column), c.1);
                match extents.rows {
                    1 => outer_tile_avx2::<1>(a, b, c, &extents),
                    2 => outer_tile_avx2::<2>(a, b, c, &extents),
                    3 => outer_tile_avx2::<3>(a, b, c, &extents),
                    4 => outer_tile_avx2::<4>(a, b, c, &extents),
                    5 => outer_tile_avx2::<5>(a, b, c, &extents),
                    _ => outer_tile_avx2::<ROWS>(a, b, c, &extents),
                }
            }
        }
    }
    if whole < extents.columns && extents.depth > 0 {
        let extents = Outer { columns: extents.columns - whole, ..extents };
        vector::outer(a.0, a.1, &b.0[whole..], b.1, &mut c.0[whole..], c.1, extents);
    }
}

/// # Safety
/// R rows of `a` and `c`, `extents.depth` columns of `a` and rows of `b`, 16 columns of `b` and `c`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn outer_tile_avx2<const R: usize>(
    a: (*const f32, usize),
    b: (*const f32, usize),
    c: (*mut f32, usize),
    extents: &Outer,
) {
    // SAFETY: every access is to a row and column of the caller's promise.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        if extents.add {
            for (r, sums) in sums.iter_mut().enumerate() {
                *sums = [_mm256_loadu_ps(c.0.add(r * c.1)), _mm256_loadu_ps(c.0.add(r * c.1 + 8))];
            }
        }
        for i in 0..extents.depth {
            let at = b.0.add(i * b.1);
            let b = [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))];
            for (r, sums) in sums.iter_mut().enumerate() {
                let a = _mm256_set1_ps(*a.0.add(r * a.1 + i));
                *sums = [_mm256_fmadd_ps(a, b[0], sums[0]), _mm256_fmadd_ps(a, b[1], sums[1])];
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            _mm256_storeu_ps(c.0.add(r * c.1), sums[0]);
            _mm256_storeu_ps(c.0.add(r * c.1 + 8), sums[1]);
        }
    }
}
