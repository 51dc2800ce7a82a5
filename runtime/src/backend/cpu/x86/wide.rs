//! AVX-512, with its products of 16-bit numbers and with AMX where there are any.

use std::arch::x86_64::*;

use super::{Avx2, check_outer, check_tile, table_avx2};
use crate::backend::cpu::integer::rows::{Codes, LANES, Rows};
use crate::backend::cpu::integer::{Inputs, Panel, amx, avx512};
use crate::backend::cpu::kernels::{Kernels, TILE};
use crate::backend::cpu::vector::{self, Outer};
use crate::tensor::Offset;

/// AVX-512F, which implies everything [`Avx2`] needs on every processor that has it; checked all the same.
pub(in crate::backend::cpu) struct Avx512 {
    avx2: Avx2,
    /// Whether there are products of 16-bit numbers (AVX-512 BW and VNNI).
    vnni: bool,
    /// Whether to use tiles (AMX); implies `vnni`.
    amx: bool,
}

impl Avx512 {
    pub(in crate::backend::cpu) fn new() -> Option<Self> {
        let vnni = is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vnni");
        is_x86_feature_detected!("avx512f").then(Avx2::new).flatten().map(|avx2| Self { avx2, vnni, amx: false })
    }

    /// With tiles too.
    pub(in crate::backend::cpu) fn with_amx() -> Option<Self> {
        Self::new().filter(|kernels| kernels.vnni && amx::available()).map(|kernels| Self { amx: true, ..kernels })
    }
}

impl Kernels for Avx512 {
    fn name(&self) -> &'static str {
        match (self.amx, self.vnni) {
            (true, _) => "amx",
            (_, true) => "avx512-vnni",
            _ => "avx512",
        }
    }

    fn expand_w4(&self, words: &[u32], params: &[u32], group_size: usize, offset: Offset, out: &mut [f32]) {
        assert!(out.len() == words.len() * 8 && group_size.is_multiple_of(8));
        if !group_size.is_multiple_of(16) {
            return self.avx2.expand_w4(words, params, group_size, offset, out);
        }
        // SAFETY: `self` proves AVX-512F and F16C.
        unsafe { expand_w4(words, params, group_size, offset, out) }
    }

    fn expand_f16(&self, bytes: &[u8], out: &mut [f32]) {
        self.avx2.expand_f16(bytes, out);
    }

    fn narrow_f16(&self, values: &[f32], out: &mut [half::f16]) {
        self.avx2.narrow_f16(values, out);
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
        // SAFETY: `self` proves AVX-512F; `check_tile` proved that all rows of `k` lie in the slices.
        unsafe {
            match (rows, cols) {
                (4, 4) => dot_tile::<4, 4>(w, stride_w, x, stride_x, k, acc),
                (4, 1) => dot_tile::<4, 1>(w, stride_w, x, stride_x, k, acc),
                (4, 2) => dot_tile::<4, 2>(w, stride_w, x, stride_x, k, acc),
                (4, 3) => dot_tile::<4, 3>(w, stride_w, x, stride_x, k, acc),
                _ => {
                    for (r, acc) in acc.chunks_mut(1).enumerate().take(rows) {
                        let w = &w[r * stride_w..];
                        match cols {
                            1 => dot_tile::<1, 1>(w, 0, x, stride_x, k, acc),
                            2 => dot_tile::<1, 2>(w, 0, x, stride_x, k, acc),
                            3 => dot_tile::<1, 3>(w, 0, x, stride_x, k, acc),
                            _ => dot_tile::<1, 4>(w, 0, x, stride_x, k, acc),
                        }
                    }
                }
            }
        }
    }

    fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        assert!(a.len() == b.len());
        let mut acc = [[0.0; TILE]];
        // SAFETY: `self` proves AVX-512F; both slices hold `a.len()` elements.
        unsafe { dot_tile::<1, 1>(a, 0, b, 0, a.len(), &mut acc) };
        acc[0][0]
    }

    fn axpy(&self, a: f32, x: &[f32], y: &mut [f32]) {
        self.avx2.axpy(a, x, y);
    }

    fn exponentials(&self, x: &mut [f32]) -> (f32, f32) {
        // SAFETY: `self` proves AVX-512F and FMA.
        unsafe { exponentials(x) }
    }

    fn expand_q8(&self, codes: &[i8], scales: &[f32], dim: usize, out: &mut [f32]) {
        self.avx2.expand_q8(codes, scales, dim, out);
    }

    fn expand_q8_lanes(&self, codes: &[i8], scales: &[f32], out: &mut [f32]) {
        self.avx2.expand_q8_lanes(codes, scales, out);
    }

    fn silu(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        // SAFETY: `self` proves AVX-512F and FMA.
        unsafe { silu(gate, up, out) };
    }

    fn gelu_tanh(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        // SAFETY: `self` proves AVX-512F and FMA.
        unsafe { gelu_tanh(gate, up, out) };
    }

    fn outer(&self, a: (&[f32], usize), b: (&[f32], usize), c: (&mut [f32], usize), extents: Outer) {
        check_outer(&extents, a, b, (c.0, c.1));
        // SAFETY: `self` proves AVX-512F; the matrices were just checked.
        unsafe { outer(a, b, c, extents) }
    }

    fn round_span(&self, x: &[f32], codes: &mut [i16]) -> (f32, f32) {
        self.avx2.round_span(x, codes)
    }

    fn round_group(&self, values: &[f32], stride: usize, bytes: &mut [u8]) {
        self.avx2.round_group(values, stride, bytes);
    }

    fn expand_columns(&self, offset: Offset, params: &[u8], codes: &[u8], out: &mut [f32]) {
        self.avx2.expand_columns(offset, params, codes, out);
    }

    fn takes_planes(&self, together: usize) -> bool {
        self.amx && amx::takes(together)
    }

    fn split(&self, codes: &mut [i16]) {
        if self.vnni {
            // SAFETY: `vnni` proves AVX-512 F and BW.
            unsafe { amx::split(codes) }
        }
    }

    fn takes_bytes(&self, codes: Codes) -> bool {
        if self.vnni { matches!(codes, Codes::Four(_)) } else { self.avx2.takes_bytes(codes) }
    }

    fn split_row(&self, codes: &[i16], bytes: &mut [i8]) {
        self.avx2.split_row(codes, bytes);
    }

    fn reads_apart(&self) -> bool {
        !self.vnni
    }

    fn gemv(&self, w: &Rows<'_>, block: usize, apart: usize, x: &Inputs<'_>, out: &mut [[f32; LANES]]) {
        if !self.vnni {
            return self.avx2.gemv(w, block, apart, x, out);
        }
        x.check_row(w.shape(), self.takes_bytes(w.shape().codes));
        // SAFETY: `vnni` proves AVX-512 F, BW and VNNI.
        unsafe { avx512::gemv(w, block, apart, x, out) }
    }

    fn unpack(&self, w: &Rows<'_>, block: usize, first: usize, panel: &mut Panel) {
        if !self.vnni {
            return self.avx2.unpack(w, block, first, panel);
        }
        // SAFETY: `vnni` proves AVX-512 F and BW.
        unsafe {
            match panel.planes {
                true => amx::unpack(w, block, first, panel),
                false => avx512::unpack(w, block, first, panel),
            }
        }
    }

    fn gemm(&self, panel: &Panel, first: usize, x: &Inputs<'_>, sums: &mut [[f32; LANES]]) {
        if !self.vnni {
            return self.avx2.gemm(panel, first, x, sums);
        }
        // SAFETY: `vnni` proves AVX-512 F, BW and VNNI, `amx` tiles.
        unsafe {
            match self.amx && panel.planes {
                true => amx::gemm(panel, first, x, sums),
                false => avx512::gemm(panel, first, x, sums),
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx2,f16c")]
fn expand_w4(words: &[u32], params: &[u32], group_size: usize, offset: Offset, out: &mut [f32]) {
    let shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    for ((words, &params), out) in words.chunks(group_size / 8).zip(params).zip(out.chunks_mut(group_size)) {
        let (low, high) = table_avx2(params, offset);
        let table = _mm512_castpd_ps(_mm512_insertf64x4::<1>(
            _mm512_castpd256_pd512(_mm256_castps_pd(low)),
            _mm256_castps_pd(high),
        ));
        for (pair, out) in words.as_chunks::<2>().0.iter().zip(out.as_chunks_mut::<16>().0) {
            let words = _mm512_inserti64x4::<1>(
                _mm512_castsi256_si512(_mm256_set1_epi32(pair[0] as i32)),
                _mm256_set1_epi32(pair[1] as i32),
            );
            // The permutation reads the low 4 bits of each index only.
            let w = _mm512_permutexvar_ps(_mm512_srlv_epi32(words, shifts), table);
            // SAFETY: `out` is 16 floats.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), w) };
        }
    }
}

/// acc[r][c] += w[r * stride_w ..][..k] . x[c * stride_x ..][..k] for r < R and c < C.
///
/// # Safety
/// `(R - 1) * stride_w + k <= w.len()`, `(C - 1) * stride_x + k <= x.len()` and `R <= acc.len()`.
#[target_feature(enable = "avx512f")]
unsafe fn dot_tile<const R: usize, const C: usize>(
    w: &[f32],
    stride_w: usize,
    x: &[f32],
    stride_x: usize,
    k: usize,
    acc: &mut [[f32; TILE]],
) {
    let mut sums = [[_mm512_setzero_ps(); C]; R];
    let mut i = 0;
    while i < k {
        // The last step masks off what lies past `k`.
        let mask: __mmask16 = if k - i >= 16 { !0 } else { (1 << (k - i)) - 1 };
        // SAFETY: masked lanes are not accessed, the others lie before `k` of rows that the caller promises.
        unsafe {
            // Not `array::from_fn`: a closure with vector features is not inlined into a function without them.
            let mut xs = [_mm512_setzero_ps(); C];
            for (c, xs) in xs.iter_mut().enumerate() {
                *xs = _mm512_maskz_loadu_ps(mask, x.as_ptr().add(c * stride_x + i));
            }
            for r in 0..R {
                let w = _mm512_maskz_loadu_ps(mask, w.as_ptr().add(r * stride_w + i));
                for c in 0..C {
                    sums[r][c] = _mm512_fmadd_ps(w, xs[c], sums[r][c]);
                }
            }
        }
        i += 16;
    }
    for r in 0..R {
        for c in 0..C {
            acc[r][c] += _mm512_reduce_add_ps(sums[r][c]);
        }
    }
}

#[target_feature(enable = "avx512f,fma")]
fn exponentials(x: &mut [f32]) -> (f32, f32) {
    vector::exponentials(x)
}

#[target_feature(enable = "avx512f,fma")]
fn silu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    vector::silu(gate, up, out);
}

#[target_feature(enable = "avx512f,fma")]
fn gelu_tanh(gate: &[f32], up: &[f32], out: &mut [f32]) {
    vector::gelu_tanh(gate, up, out);
}

/// See [`vector::outer`]: tiles of at most 12 rows and 32 columns.
///
/// # Safety
/// The matrices have these extents.
#[target_feature(enable = "avx512f")]
unsafe fn outer(a: (&[f32], usize), b: (&[f32], usize), c: (&mut [f32], usize), extents: Outer) {
    let mut first = 0;
    while first < extents.rows {
        // SAFETY: these rows lie in the matrices by the caller's promise.
        unsafe {
            let a = (a.0.as_ptr().add(first * a.1), a.1);
            let b = (b.0.as_ptr(), b.1);
            let c = (c.0.as_mut_ptr().add(first * c.1), c.1);
            first += match extents.rows - first {
                1 => outer_rows::<1>(a, b, c, &extents),
                2..4 => outer_rows::<2>(a, b, c, &extents),
                4..8 => outer_rows::<4>(a, b, c, &extents),
                8..12 => outer_rows::<8>(a, b, c, &extents),
                _ => outer_rows::<12>(a, b, c, &extents),
            };
        }
    }
}

/// R rows of [`outer`]; returns R.
///
/// # Safety
/// R rows of `a` and `c`, and all of `b`.
#[target_feature(enable = "avx512f")]
unsafe fn outer_rows<const R: usize>(
    a: (*const f32, usize),
    b: (*const f32, usize),
    c: (*mut f32, usize),
    extents: &Outer,
) -> usize {
    for column in (0..extents.columns).step_by(2 * LANES) {
        let left = extents.columns - column;
        // The last vector masks off what lies past the last column.
        let mask = |n: usize| if n >= LANES { !0 } else { (1 << n) - 1 };
        // SAFETY: these columns lie in the matrices by the caller's promise.
        unsafe {
            let (b, c) = ((b.0.add(column), b.1), (c.0.add(column), c.1));
            match left {
                0..=LANES => outer_tile::<R, 1>(a, b, c, extents, mask(left)),
                _ => outer_tile::<R, 2>(a, b, c, extents, mask(left - LANES)),
            }
        }
    }
    R
}

/// # Safety
/// R rows of `a` and `c`, `extents.depth` columns of `a` and rows of `b`, V vectors of columns of `b` and `c`, the last
/// one's as `mask` says.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn outer_tile<const R: usize, const V: usize>(
    a: (*const f32, usize),
    b: (*const f32, usize),
    c: (*mut f32, usize),
    extents: &Outer,
    mask: __mmask16,
) {
    let masks: [__mmask16; 2] = if V == 1 { [mask, 0] } else { [!0, mask] };
    // SAFETY: every access is to a row and column of the caller's promise; lanes masked off are not accessed.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        if extents.add {
            for (r, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_maskz_loadu_ps(masks[v], c.0.add(r * c.1 + v * LANES));
                }
            }
        }
        for i in 0..extents.depth {
            let mut bs = [_mm512_setzero_ps(); V];
            for (v, to) in bs.iter_mut().enumerate() {
                *to = _mm512_maskz_loadu_ps(masks[v], b.0.add(i * b.1 + v * LANES));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let a = _mm512_set1_ps(*a.0.add(r * a.1 + i));
                for (sum, b) in sums.iter_mut().zip(bs) {
                    *sum = _mm512_fmadd_ps(a, b, *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                _mm512_mask_storeu_ps(c.0.add(r * c.1 + v * LANES), masks[v], *sum);
            }
        }
    }
}
