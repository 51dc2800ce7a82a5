//! [`super`]'s inner loops with AVX-512 and its VNNI: the sixteen rows of a block are the lanes of one vector.
//!
//! One `vpdpbusd` multiplies four columns of sixteen rows with the low or the high bytes of four activations
//! ([`Inputs::bytes`]) and adds to their sums; the activations come with it from memory. One token takes, for the 128 4-bit
//! codes of an octet, 3 instructions to bring the codes out and 4 of these. Many tokens, and 8-bit codes, go through
//! `vpdpwssd` and pairs of columns. Processors with two such units do 64 of those products a cycle, which two loads a cycle
//! can feed: tiles have one vector of weights and 12 tokens, enough independent sums to hide the latency of both units.

use std::arch::asm;
use std::arch::x86_64::*;

use super::rows::{Codes, LANES, OCTET, Rows};
use super::{BLOCKS, Inputs, Panel};

/// Tokens of a tile.
const TOKENS: usize = 12;
/// Bytes that a product reads ahead of itself.
const AHEAD: usize = 1024;

/// sums[i] + a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn multiply_add(mut sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the instruction reads and writes these registers only. There is an intrinsic, but LLVM takes it apart again
    // into a product and an addition, for shorter chains of dependencies that there are enough of here.
    unsafe {
        asm!(
            "vpdpwssd {sums}, {a}, {b}",
            sums = inout(zmm_reg) sums, a = in(zmm_reg) a, b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// sums[i] + the four products of bytes 4 i to 4 i + 3, those of `a` without a sign.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn multiply_bytes(mut sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: as for `multiply_add`.
    unsafe {
        asm!(
            "vpdpbusd {sums}, {a}, {b}",
            sums = inout(zmm_reg) sums, a = in(zmm_reg) a, b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// See [`super::super::kernels::Kernels::gemv`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(in crate::backend::cpu) fn gemv(
    w: &Rows<'_>,
    block: usize,
    apart: usize,
    x: &Inputs<'_>,
    out: &mut [[f32; LANES]],
) {
    let (fours, rest) = out.as_chunks_mut::<BLOCKS>();
    let four = matches!(w.shape().codes, Codes::Four(_));
    for (i, out) in fours.iter_mut().enumerate() {
        let first = block + BLOCKS * i * apart;
        match four {
            true => gemv_blocks::<BLOCKS, true>(w, first, apart, x, out),
            false => gemv_blocks::<BLOCKS, false>(w, first, apart, x, out),
        }
    }
    for (i, out) in rest.iter_mut().enumerate() {
        let (first, out) = (block + (BLOCKS * fours.len() + i) * apart, std::array::from_mut(out));
        match four {
            true => gemv_blocks::<1, true>(w, first, apart, x, out),
            false => gemv_blocks::<1, false>(w, first, apart, x, out),
        }
    }
}

/// The products of B blocks side by side: one core reads several streams from memory a quarter faster than one.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn gemv_blocks<const B: usize, const FOUR: bool>(
    w: &Rows<'_>,
    block: usize,
    apart: usize,
    x: &Inputs<'_>,
    out: &mut [[f32; LANES]; B],
) {
    let shape = w.shape();
    let spans = shape.group_size / x.span;
    let mut at: [*const u8; B] = std::array::from_fn(|i| w.block(block + apart * i).as_ptr());
    // An octet takes four words of activations, of bytes as of pairs.
    let mut activations = if FOUR { x.bytes.as_ptr().cast::<i32>() } else { x.codes.as_ptr().cast() };
    let octet_bytes = if FOUR { 4 * LANES } else { OCTET * LANES };
    let mut sums = [_mm512_setzero_ps(); B];
    let mut index = 0;
    for _ in 0..shape.groups() {
        // SAFETY: a group's numbers come first in its bytes.
        let numbers = at.map(|at| unsafe { params(w, at) });
        at = at.map(|at| at.wrapping_add(shape.param_bytes()));
        for _ in 0..spans {
            // Four sums a block: of low bytes with even and odd columns, and of high ones; or of pairs, of which four blocks
            // need two. The next octet shall not wait for these multiplications.
            let mut lanes = [[_mm512_setzero_si512(); 4]; B];
            for _ in 0..x.span / OCTET {
                for i in 0..B {
                    _mm_prefetch::<_MM_HINT_T0>(at[i].wrapping_add(AHEAD).cast());
                    // SAFETY: a block has the bytes its shape says, and `x` the columns of that shape: an octet is left.
                    unsafe {
                        let activations = |t: usize| _mm512_set1_epi32(activations.add(t).read_unaligned());
                        if FOUR {
                            let codes = bytes_of_four(at[i]);
                            for (t, sum) in lanes[i].iter_mut().enumerate() {
                                *sum = multiply_bytes(*sum, codes[t % 2], activations(t));
                            }
                        } else {
                            for (t, octet) in bring_out(shape.codes, at[i]).into_iter().enumerate() {
                                let sum = &mut lanes[i][if B == 1 { t } else { t % 2 }];
                                *sum = multiply_add(*sum, octet, activations(t));
                            }
                        }
                    }
                    at[i] = at[i].wrapping_add(octet_bytes);
                }
                activations = activations.wrapping_add(4);
            }
            let (d, sum) = (_mm512_set1_ps(x.scales[index]), _mm512_set1_ps(x.sums[index]));
            index += 1;
            for i in 0..B {
                let [a, b, c, e] = lanes[i];
                let (first, second) = (_mm512_add_epi32(a, b), _mm512_add_epi32(c, e));
                let lanes = _mm512_add_epi32(first, if FOUR { _mm512_slli_epi32::<8>(second) } else { second });
                let (s, b) = numbers[i];
                sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(lanes), _mm512_mul_ps(s, d), sums[i]);
                if shape.has_offsets() {
                    sums[i] = _mm512_fmadd_ps(b, sum, sums[i]);
                }
            }
        }
    }
    for (out, sums) in out.iter_mut().zip(sums) {
        // SAFETY: sixteen floats.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sums) }
    }
}

/// Even and odd columns of an octet of 4-bit codes as bytes.
///
/// # Safety
/// 64 bytes at `at`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn bytes_of_four(at: *const u8) -> [__m512i; 2] {
    let low = _mm512_set1_epi8(15);
    // SAFETY: by the caller's promise.
    let words = unsafe { _mm512_loadu_si512(at.cast()) };
    [_mm512_and_si512(words, low), _mm512_and_si512(_mm512_srli_epi16::<4>(words), low)]
}

/// The codes of an octet as four vectors of pairs.
///
/// # Safety
/// The bytes of an octet at `at`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn bring_out(codes: Codes, at: *const u8) -> [__m512i; 4] {
    match codes {
        Codes::Four(_) => {
            let low = _mm512_set1_epi16(15);
            // SAFETY: by the caller's promise.
            let words = unsafe { _mm512_loadu_si512(at.cast()) };
            [
                _mm512_and_si512(words, low),
                _mm512_and_si512(_mm512_srli_epi16::<4>(words), low),
                _mm512_and_si512(_mm512_srli_epi16::<8>(words), low),
                _mm512_srli_epi16::<12>(words),
            ]
        }
        Codes::Eight => {
            // SAFETY: by the caller's promise.
            std::array::from_fn(|t| unsafe { _mm512_cvtepi8_epi16(_mm256_loadu_si256(at.cast::<__m256i>().add(t))) })
        }
    }
}

/// Scales and b of the sixteen rows of a group.
///
/// # Safety
/// The numbers of a group of `w` at `at`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn params(w: &Rows<'_>, at: *const u8) -> (__m512, __m512) {
    // SAFETY: by the caller's promise.
    let sixteen = |i: usize| _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(at.cast::<__m256i>().add(i)) });
    let s = sixteen(0);
    match w.shape().codes {
        Codes::Four(offset) if offset.is_bias() => (s, sixteen(1)),
        Codes::Four(_) => (s, _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(s, sixteen(1)))),
        Codes::Eight => (s, _mm512_setzero_ps()),
    }
}

/// See [`super::super::kernels::Kernels::unpack`].
#[target_feature(enable = "avx512f,avx512bw")]
pub(in crate::backend::cpu) fn unpack(w: &Rows<'_>, block: usize, first: usize, panel: &mut Panel) {
    let shape = w.shape();
    let span = panel.span;
    let bytes = w.block(block);
    for i in 0..panel.spans {
        let column = (first + i) * span;
        let group = &bytes[column / shape.group_size * shape.group_bytes()..][..shape.group_bytes()];
        let octets = column % shape.group_size / OCTET..(column % shape.group_size + span) / OCTET;
        let codes = &group[shape.param_bytes()..][octets.start * shape.octet_bytes()..octets.end * shape.octet_bytes()];
        let to = &mut panel.codes[i * span * LANES..][..span * LANES];
        // SAFETY: the numbers come first in the bytes of a group; stores to arrays of sixteen; octets of codes of the
        // size that `octet_bytes` says, which become four vectors.
        unsafe {
            let (s, b) = params(w, group.as_ptr());
            _mm512_storeu_ps(panel.s[i].as_mut_ptr(), s);
            _mm512_storeu_ps(panel.b[i].as_mut_ptr(), b);
            for (codes, to) in codes.chunks_exact(shape.octet_bytes()).zip(to.chunks_exact_mut(OCTET * LANES)) {
                for (t, pairs) in bring_out(shape.codes, codes.as_ptr()).into_iter().enumerate() {
                    _mm512_storeu_si512(to.as_mut_ptr().cast::<__m512i>().add(t), pairs);
                }
            }
        }
    }
}

/// See [`super::super::kernels::Kernels::gemm`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(in crate::backend::cpu) fn gemm(panel: &Panel, first: usize, x: &Inputs<'_>, sums: &mut [[f32; LANES]]) {
    x.check_panel(panel, first, sums.len());
    let mut t = 0;
    while t < sums.len() {
        let sums = &mut sums[t..];
        // SAFETY: rows from `t` on, as many as the tile has, are in `x` and `sums`, with the columns of the panel.
        unsafe {
            t += match sums.len() {
                1 => tile::<1>(panel, first, x, t, sums),
                2 => tile::<2>(panel, first, x, t, sums),
                3 => tile::<3>(panel, first, x, t, sums),
                4..6 => tile::<4>(panel, first, x, t, sums),
                6..8 => tile::<6>(panel, first, x, t, sums),
                8..TOKENS => tile::<8>(panel, first, x, t, sums),
                _ => tile::<TOKENS>(panel, first, x, t, sums),
            };
        }
    }
}

/// Adds the products with T rows of `x` from row `t` on; returns T.
///
/// # Safety
/// `x` and `sums` have these rows, `x` the columns of the spans from `first` on that the panel has.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn tile<const T: usize>(
    panel: &Panel,
    first: usize,
    x: &Inputs<'_>,
    t: usize,
    sums: &mut [[f32; LANES]],
) -> usize {
    let spans = x.k / x.span;
    let mut weights = panel.codes.as_ptr().cast::<__m512i>();
    let mut rows: [*const i32; T] =
        std::array::from_fn(|i| x.codes.as_ptr().wrapping_add((t + i) * x.k + first * x.span).cast());
    for span in 0..panel.spans {
        let mut lanes = [_mm512_setzero_si512(); T];
        for pair in 0..x.span / 2 {
            // SAFETY: a vector of the panel and a pair of every row of `x` for each pair of columns.
            unsafe {
                let w = _mm512_loadu_si512(weights);
                for i in 0..T {
                    let x = _mm512_set1_epi32(rows[i].add(pair).read_unaligned());
                    lanes[i] = multiply_add(lanes[i], w, x);
                }
            }
            weights = weights.wrapping_add(1);
        }
        // SAFETY: arrays of sixteen; a scale and a sum for every span of a row.
        unsafe {
            let (s, b) = (_mm512_loadu_ps(panel.s[span].as_ptr()), _mm512_loadu_ps(panel.b[span].as_ptr()));
            for i in 0..T {
                let number = (t + i) * spans + first + span;
                let d = _mm512_set1_ps(*x.scales.get_unchecked(number));
                let sum = _mm512_set1_ps(*x.sums.get_unchecked(number));
                let to = sums[i].as_mut_ptr();
                let all = _mm512_fmadd_ps(_mm512_cvtepi32_ps(lanes[i]), _mm512_mul_ps(s, d), _mm512_loadu_ps(to));
                _mm512_storeu_ps(to, if panel.offsets { _mm512_fmadd_ps(b, sum, all) } else { all });
            }
        }
        rows = rows.map(|row| row.wrapping_add(x.span / 2));
    }
    T
}
