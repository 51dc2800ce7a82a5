//! [`super`]'s inner loops with AVX2, FMA and F16C, also with AVX-VNNI.
//!
//! A vector has eight rows, so a block is two. One `vpmaddwd` multiplies a pair of columns of eight rows with the same
//! pair of activations, which a broadcasting load brings. One token takes, for the 128 codes of an octet, 12
//! instructions to bring the codes out, 8 products and 8 additions: 7 cycles for 64 bytes on four vector units. (Products
//! of bytes, `vpmaddubsw`, take 24 instructions and, on a Zen 3, as long.) Many tokens share codes that were brought out
//! before ([`Panel`]): tiles of 16 rows and 6 tokens keep their 12 sums in registers.
//!
//! With AVX-VNNI, of processors for laptops since Alder Lake, `vpdpwssd` multiplies and adds in one: twice the products a
//! cycle for many tokens (16 multiplications in each of two units). One token has its activations as bytes then
//! ([`Inputs::bytes`]): `vpdpbusd` multiplies four columns of eight rows with the low or the high bytes of four activations
//! and adds, so an octet takes 6 instructions to bring the codes out and 8 of these.

use std::arch::asm;
use std::arch::x86_64::*;

use super::activations::Round;
use super::rows::{BYTE_GROUP, Codes, LANES, OCTET, Rows};
use super::{BLOCKS, Inputs, Panel};

/// Rows of a vector.
const HALF: usize = LANES / 2;
/// Tokens of a tile.
const TOKENS: usize = 6;
/// Bytes that a product reads ahead of itself.
const AHEAD: usize = 1024;

/// The loops over products, with whatever adds the products of two pairs of 16-bit numbers to a sum.
macro_rules! products {
    ($name:ident, $features:literal, $add:ident, $span_of_four:ident) => {
        pub(in crate::backend::cpu) mod $name {
            use super::*;

            /// See [`crate::backend::cpu::kernels::Kernels::gemv`].
            #[target_feature(enable = $features)]
            pub(in crate::backend::cpu) fn gemv(
                w: &Rows<'_>,
                block: usize,
                apart: usize,
                x: &Inputs<'_>,
                out: &mut [[f32; LANES]],
            ) {
                for (i, out) in out.chunks_mut(BLOCKS).enumerate() {
                    let first = block + BLOCKS * i * apart;
                    match w.shape().codes {
                        Codes::Four(_) => gemv_few::<true>(w, first, apart, x, out),
                        Codes::Eight => gemv_few::<false>(w, first, apart, x, out),
                    }
                }
            }

            /// The products of at most [`BLOCKS`] blocks.
            #[inline]
            #[target_feature(enable = $features)]
            fn gemv_few<const FOUR: bool>(
                w: &Rows<'_>,
                block: usize,
                apart: usize,
                x: &Inputs<'_>,
                out: &mut [[f32; LANES]],
            ) {
                // SAFETY: a block has the bytes its shape says, and `Inputs` the columns of that shape.
                unsafe {
                    match out.len() {
                        0 => {}
                        1 => gemv_blocks::<1, FOUR>(w, block, apart, x, out),
                        2 => gemv_blocks::<2, FOUR>(w, block, apart, x, out),
                        3 => gemv_blocks::<3, FOUR>(w, block, apart, x, out),
                        _ => gemv_blocks::<BLOCKS, FOUR>(w, block, apart, x, out),
                    }
                }
            }

            /// The products of B blocks side by side. A Zen 3 core reads four streams a quarter of a matrix apart at 22 to
            /// 24 GB/s, one at 17.6, and four neighbouring blocks at 15 to 19, likely because these end before the
            /// processor, which fetches ahead of long streams, has found them.
            ///
            /// # Safety
            /// `x` has a row of the matrix' columns; FOUR says whether codes have 4 bits.
            #[target_feature(enable = $features)]
            unsafe fn gemv_blocks<const B: usize, const FOUR: bool>(
                w: &Rows<'_>,
                block: usize,
                apart: usize,
                x: &Inputs<'_>,
                out: &mut [[f32; LANES]],
            ) {
                let shape = w.shape();
                let span = x.span;
                let mut at: [*const u8; B] = std::array::from_fn(|i| w.block(block + apart * i).as_ptr());
                let (mut codes, mut bytes) = (x.codes.as_ptr(), x.bytes.as_ptr());
                let mut sums = [[_mm256_setzero_ps(); 2]; B];
                let mut index = 0;
                for _ in 0..shape.groups() {
                    let numbers = at;
                    at = at.map(|at| at.wrapping_add(shape.param_bytes()));
                    for _ in 0..shape.group_size / span {
                        let mut lanes = [[_mm256_setzero_si256(); 2]; B];
                        // SAFETY: a span of these groups, and of the activations, is left.
                        unsafe {
                            match FOUR {
                                true => $span_of_four(&mut at, (codes, bytes), span, &mut lanes),
                                false => span_of_eight(&mut at, codes, span, &mut lanes),
                            }
                        }
                        codes = codes.wrapping_add(span);
                        bytes = bytes.wrapping_add(2 * span);
                        let (d, sum) = (_mm256_set1_ps(x.scales[index]), _mm256_set1_ps(x.sums[index]));
                        index += 1;
                        for i in 0..B {
                            // SAFETY: a group's numbers come first in its bytes.
                            let (s, b) = unsafe { params(w, numbers[i]) };
                            for h in 0..2 {
                                let product = _mm256_cvtepi32_ps(lanes[i][h]);
                                sums[i][h] = _mm256_fmadd_ps(product, _mm256_mul_ps(s[h], d), sums[i][h]);
                                if FOUR {
                                    sums[i][h] = _mm256_fmadd_ps(b[h], sum, sums[i][h]);
                                }
                            }
                        }
                    }
                }
                for (out, sums) in out.iter_mut().zip(sums) {
                    // SAFETY: two vectors of eight fill `out`.
                    unsafe {
                        _mm256_storeu_ps(out.as_mut_ptr(), sums[0]);
                        _mm256_storeu_ps(out.as_mut_ptr().add(HALF), sums[1]);
                    }
                }
            }

            /// Adds the products of a span's 8-bit codes with activations.
            ///
            /// # Safety
            /// The codes of `span` columns at each of `at`, which moves behind them, and as many activations.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn span_of_eight<const B: usize>(
                at: &mut [*const u8; B],
                codes: *const i16,
                span: usize,
                lanes: &mut [[__m256i; 2]; B],
            ) {
                for octet in 0..span / OCTET {
                    let x = codes.wrapping_add(OCTET * octet);
                    // SAFETY: by the caller's promise.
                    let pairs: [__m256i; 4] = std::array::from_fn(|t| unsafe { pair(x, t) });
                    for (at, lanes) in at.iter_mut().zip(&mut *lanes) {
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD + 64).cast());
                        for t in 0..4 {
                            for h in 0..2 {
                                // SAFETY: by the caller's promise.
                                let bytes = unsafe { _mm_loadu_si128(at.cast::<__m128i>().add(2 * t + h)) };
                                lanes[h] = $add(lanes[h], _mm256_cvtepi8_epi16(bytes), pairs[t]);
                            }
                        }
                        *at = at.wrapping_add(OCTET * LANES);
                    }
                }
            }

            /// See [`crate::backend::cpu::kernels::Kernels::gemm`].
            #[target_feature(enable = $features)]
            pub(in crate::backend::cpu) fn gemm(
                panel: &Panel,
                first: usize,
                x: &Inputs<'_>,
                sums: &mut [[f32; LANES]],
            ) {
                x.check_panel(panel, first, sums.len());
                let mut t = 0;
                while t < sums.len() {
                    let tokens = TOKENS.min(sums.len() - t);
                    let sums = &mut sums[t..];
                    // SAFETY: rows `t..t + tokens` of `x` and `sums` exist, with the columns of the panel.
                    unsafe {
                        match tokens {
                            1 => tile::<1>(panel, first, x, t, sums),
                            2 => tile::<2>(panel, first, x, t, sums),
                            3 => tile::<3>(panel, first, x, t, sums),
                            4 => tile::<4>(panel, first, x, t, sums),
                            5 => tile::<5>(panel, first, x, t, sums),
                            _ => tile::<TOKENS>(panel, first, x, t, sums),
                        }
                    }
                    t += tokens;
                }
            }

            /// Adds the products with T rows of `x` from row `t` on.
            ///
            /// # Safety
            /// `x` and `sums` have these rows, `x` the columns of the spans from `first` on that the panel has.
            #[target_feature(enable = $features)]
            unsafe fn tile<const T: usize>(
                panel: &Panel,
                first: usize,
                x: &Inputs<'_>,
                t: usize,
                sums: &mut [[f32; LANES]],
            ) {
                let spans = x.k / x.span;
                let mut weights = panel.codes.as_ptr().cast::<__m256i>();
                let mut rows: [*const i32; T] =
                    std::array::from_fn(|i| x.codes.as_ptr().wrapping_add((t + i) * x.k + first * x.span).cast());
                for span in 0..panel.spans {
                    let mut lanes = [[_mm256_setzero_si256(); 2]; T];
                    for pair in 0..x.span / 2 {
                        // SAFETY: two vectors of the panel a pair of columns; a pair of every row of `x`.
                        unsafe {
                            let (w0, w1) = (_mm256_loadu_si256(weights), _mm256_loadu_si256(weights.add(1)));
                            for i in 0..T {
                                let x = _mm256_set1_epi32(rows[i].add(pair).read_unaligned());
                                lanes[i][0] = $add(lanes[i][0], w0, x);
                                lanes[i][1] = $add(lanes[i][1], w1, x);
                            }
                        }
                        weights = weights.wrapping_add(2);
                    }
                    for h in 0..2 {
                        // SAFETY: halves of arrays of sixteen.
                        unsafe {
                            let (s, b) = (
                                _mm256_loadu_ps(panel.s[span][HALF * h..].as_ptr()),
                                _mm256_loadu_ps(panel.b[span][HALF * h..].as_ptr()),
                            );
                            for i in 0..T {
                                let number = (t + i) * spans + first + span;
                                let d = _mm256_set1_ps(*x.scales.get_unchecked(number));
                                let sum = _mm256_set1_ps(*x.sums.get_unchecked(number));
                                let to = sums[i].as_mut_ptr().add(HALF * h);
                                let lanes = _mm256_cvtepi32_ps(lanes[i][h]);
                                let all = _mm256_fmadd_ps(lanes, _mm256_mul_ps(s, d), _mm256_loadu_ps(to));
                                _mm256_storeu_ps(to, if panel.offsets { _mm256_fmadd_ps(b, sum, all) } else { all });
                            }
                        }
                    }
                    rows = rows.map(|row| row.wrapping_add(x.span / 2));
                }
            }
        }
    };
}

/// sums[i] + a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1]
#[inline]
#[target_feature(enable = "avx2")]
fn multiply_add(sums: __m256i, a: __m256i, b: __m256i) -> __m256i {
    _mm256_add_epi32(sums, _mm256_madd_epi16(a, b))
}

/// The same in one instruction.
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn multiply_add_vnni(mut sums: __m256i, a: __m256i, b: __m256i) -> __m256i {
    // SAFETY: the instruction reads and writes these registers only. There is an intrinsic, but LLVM takes it apart again.
    unsafe {
        asm!(
            "{{vex}} vpdpwssd {sums}, {a}, {b}",
            sums = inout(ymm_reg) sums, a = in(ymm_reg) a, b = in(ymm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// Adds the products of a span's 4-bit codes with activations.
///
/// # Safety
/// The codes of `span` columns at each of `at`, which moves behind them, and as many activations, in pairs first.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn span_of_four<const B: usize>(
    at: &mut [*const u8; B],
    (codes, _): (*const i16, *const i8),
    span: usize,
    lanes: &mut [[__m256i; 2]; B],
) {
    let low = _mm256_set1_epi16(15);
    for octet in 0..span / OCTET {
        // SAFETY: by the caller's promise.
        let pairs: [__m256i; 4] = std::array::from_fn(|t| unsafe { pair(codes.wrapping_add(OCTET * octet), t) });
        for (at, lanes) in at.iter_mut().zip(&mut *lanes) {
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
            for (h, lanes) in lanes.iter_mut().enumerate() {
                // SAFETY: by the caller's promise.
                let words = unsafe { _mm256_loadu_si256(at.cast::<__m256i>().add(h)) };
                let codes = [
                    _mm256_and_si256(words, low),
                    _mm256_and_si256(_mm256_srli_epi16::<4>(words), low),
                    _mm256_and_si256(_mm256_srli_epi16::<8>(words), low),
                    _mm256_srli_epi16::<12>(words),
                ];
                for (codes, pair) in codes.into_iter().zip(pairs) {
                    *lanes = multiply_add(*lanes, codes, pair);
                }
            }
            *at = at.wrapping_add(4 * LANES);
        }
    }
}

/// The same with AVX-VNNI, and bytes of activations: two blocks at a time, since the sums of more would not fit registers.
///
/// # Safety
/// As for [`span_of_four`], with bytes.
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn span_of_four_vnni<const B: usize>(
    at: &mut [*const u8; B],
    (_, bytes): (*const i16, *const i8),
    span: usize,
    lanes: &mut [[__m256i; 2]; B],
) {
    for first in (0..span / OCTET).step_by(OCTETS) {
        let bytes = bytes.wrapping_add(2 * OCTET * first);
        for (at, lanes) in at.chunks_mut(2).zip(lanes.chunks_mut(2)) {
            // SAFETY: as many octets are left, by the caller's promise: spans are multiples of 32 columns.
            unsafe {
                match (at, lanes) {
                    ([first, second], [a, b]) => octets_vnni([first, second], bytes, [a, b]),
                    ([first], [a]) => octets_vnni([first], bytes, [a]),
                    _ => {}
                }
            }
        }
    }
}

/// Octets of a block before those of the next ones, so that all streams advance together.
const OCTETS: usize = 4;

/// Adds the products of [`OCTETS`] octets of each of N blocks to the sums of their rows.
///
/// # Safety
/// So many octets of 4-bit codes at each of `at`, which moves behind them, and of bytes at `x`.
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn octets_vnni<const N: usize>(at: [&mut *const u8; N], x: *const i8, lanes: [&mut [__m256i; 2]; N]) {
    // Of low and of high bytes.
    let mut sums = [[[_mm256_setzero_si256(); 2]; 2]; N];
    let low = _mm256_set1_epi8(15);
    for octet in 0..OCTETS {
        // SAFETY: by the caller's promise.
        let x: [__m256i; 4] = std::array::from_fn(|t| unsafe {
            _mm256_set1_epi32(x.add(2 * OCTET * octet).cast::<i32>().add(t).read_unaligned())
        });
        for (at, sums) in at.iter().zip(&mut sums) {
            let at = at.wrapping_add(4 * LANES * octet);
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
            for (h, sums) in sums.iter_mut().enumerate() {
                // SAFETY: by the caller's promise.
                let words = unsafe { _mm256_loadu_si256(at.cast::<__m256i>().add(h)) };
                let even = _mm256_and_si256(words, low);
                let odd = _mm256_and_si256(_mm256_srli_epi16::<4>(words), low);
                for (sum, x) in sums.iter_mut().zip([[x[0], x[1]], [x[2], x[3]]]) {
                    *sum = multiply_bytes_vnni(multiply_bytes_vnni(*sum, even, x[0]), odd, x[1]);
                }
            }
        }
    }
    for ((at, lanes), sums) in at.into_iter().zip(lanes).zip(sums) {
        *at = at.wrapping_add(4 * LANES * OCTETS);
        for (lanes, [low, high]) in lanes.iter_mut().zip(sums) {
            *lanes = _mm256_add_epi32(*lanes, _mm256_add_epi32(low, _mm256_slli_epi32::<8>(high)));
        }
    }
}

/// sums[i] + the four products of bytes 4 i to 4 i + 3, those of `a` without a sign.
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn multiply_bytes_vnni(mut sums: __m256i, a: __m256i, b: __m256i) -> __m256i {
    // SAFETY: as for `multiply_add_vnni`.
    unsafe {
        asm!(
            "{{vex}} vpdpbusd {sums}, {a}, {b}",
            sums = inout(ymm_reg) sums, a = in(ymm_reg) a, b = in(ymm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

products!(plain, "avx2,fma,f16c", multiply_add, span_of_four);
products!(vnni, "avx2,fma,f16c,avxvnni", multiply_add_vnni, span_of_four_vnni);

/// See [`super::super::kernels::Kernels::split_row`].
///
/// # Panics
/// Unless there are twice as many bytes as codes, and these a multiple of 16.
#[target_feature(enable = "avx2")]
pub(in crate::backend::cpu) fn split_row(codes: &[i16], bytes: &mut [i8]) {
    assert!(bytes.len() == 2 * codes.len() && codes.len().is_multiple_of(2 * OCTET));
    // Of pairs 0 4, 1 5, 2 6, 3 7 the columns 0, 2, 4, 6 and 1, 3, 5, 7.
    let order = _mm256_setr_epi8(
        0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15, 0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15,
    );
    for (codes, bytes) in codes.as_chunks::<{ 2 * OCTET }>().0.iter().zip(bytes.as_chunks_mut::<{ 4 * OCTET }>().0) {
        // SAFETY: sixteen codes and 32 bytes.
        unsafe {
            let codes = _mm256_loadu_si256(codes.as_ptr().cast());
            let low = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(codes));
            let high = _mm256_srai_epi16::<8>(_mm256_sub_epi16(codes, low));
            // An octet of low and the same of high bytes in each half.
            let both = _mm256_shuffle_epi8(_mm256_packs_epi16(low, high), order);
            _mm256_storeu_si256(bytes.as_mut_ptr().cast(), both);
        }
    }
}

/// Activations of columns t and t + 4 of an octet, in every lane.
///
/// # Safety
/// 8 activations at `x`, t below 4.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn pair(x: *const i16, t: usize) -> __m256i {
    // SAFETY: by the caller's promise.
    _mm256_set1_epi32(unsafe { x.cast::<i32>().add(t).read_unaligned() })
}

/// Scales and b of the sixteen rows of a group.
///
/// # Safety
/// The numbers of a group of `w` at `at`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn params(w: &Rows<'_>, at: *const u8) -> ([__m256; 2], [__m256; 2]) {
    // SAFETY: by the caller's promise.
    let eight = |i: usize| _mm256_cvtph_ps(unsafe { _mm_loadu_si128(at.cast::<__m128i>().add(i)) });
    let s = [eight(0), eight(1)];
    let b = match w.shape().codes {
        Codes::Four(offset) => {
            let o = [eight(2), eight(3)];
            match offset.is_bias() {
                true => o,
                false => [0, 1].map(|h| _mm256_xor_ps(_mm256_mul_ps(s[h], o[h]), _mm256_set1_ps(-0.0))),
            }
        }
        Codes::Eight => [_mm256_setzero_ps(); 2],
    };
    (s, b)
}

/// See [`super::super::kernels::Kernels::unpack`].
#[target_feature(enable = "avx2,f16c")]
pub(in crate::backend::cpu) fn unpack(w: &Rows<'_>, block: usize, first: usize, panel: &mut Panel) {
    let shape = w.shape();
    let span = panel.span;
    let bytes = w.block(block);
    for i in 0..panel.spans {
        let column = (first + i) * span;
        let group = &bytes[column / shape.group_size * shape.group_bytes()..][..shape.group_bytes()];
        // SAFETY: the numbers come first in the bytes of a group.
        let (s, b) = unsafe { params(w, group.as_ptr()) };
        let octets = column % shape.group_size / OCTET..(column % shape.group_size + span) / OCTET;
        let codes = &group[shape.param_bytes()..][octets.start * shape.octet_bytes()..octets.end * shape.octet_bytes()];
        let to = &mut panel.codes[i * span * LANES..][..span * LANES];
        // SAFETY: stores to arrays of sixteen; octets of codes of the size that `octet_bytes` says, which become four
        // vectors for each half of the rows.
        unsafe {
            for h in 0..2 {
                _mm256_storeu_ps(panel.s[i].as_mut_ptr().add(HALF * h), s[h]);
                _mm256_storeu_ps(panel.b[i].as_mut_ptr().add(HALF * h), b[h]);
            }
            let low = _mm256_set1_epi16(15);
            for (codes, to) in codes.chunks_exact(shape.octet_bytes()).zip(to.chunks_exact_mut(OCTET * LANES)) {
                let to = to.as_mut_ptr().cast::<__m256i>();
                match shape.codes {
                    Codes::Four(_) => {
                        for h in 0..2 {
                            let words = _mm256_loadu_si256(codes.as_ptr().cast::<__m256i>().add(h));
                            _mm256_storeu_si256(to.add(h), _mm256_and_si256(words, low));
                            _mm256_storeu_si256(to.add(2 + h), _mm256_and_si256(_mm256_srli_epi16::<4>(words), low));
                            _mm256_storeu_si256(to.add(4 + h), _mm256_and_si256(_mm256_srli_epi16::<8>(words), low));
                            _mm256_storeu_si256(to.add(6 + h), _mm256_srli_epi16::<12>(words));
                        }
                    }
                    Codes::Eight => {
                        for v in 0..8 {
                            let bytes = _mm_loadu_si128(codes.as_ptr().cast::<__m128i>().add(v));
                            _mm256_storeu_si256(to.add(v), _mm256_cvtepi8_epi16(bytes));
                        }
                    }
                }
            }
        }
    }
}

/// See [`super::super::kernels::Kernels::round_span`].
#[target_feature(enable = "avx2,fma")]
pub(in crate::backend::cpu) fn round_span(x: &[f32], codes: &mut [i16]) -> (f32, f32) {
    assert!(x.len() == codes.len() && x.len().is_multiple_of(2 * OCTET));
    let magnitude = _mm256_set1_epi32(i32::MAX);
    let mut most = _mm256_setzero_si256();
    // Magnitudes by their bits, so that NaN wins and reaches the result.
    for x in x.as_chunks::<OCTET>().0 {
        // SAFETY: eight floats.
        let bits = unsafe { _mm256_loadu_si256(x.as_ptr().cast()) };
        most = _mm256_max_epi32(most, _mm256_and_si256(bits, magnitude));
    }
    let Some(Round { scale, inverse }) = Round::of(f32::from_bits(largest(most) as u32)) else {
        codes.fill(0);
        return (0.0, 0.0);
    };
    let inverse = _mm256_set1_ps(inverse);
    let mut sum = _mm256_setzero_si256();
    for (x, codes) in x.as_chunks::<{ 2 * OCTET }>().0.iter().zip(codes.as_chunks_mut::<{ 2 * OCTET }>().0) {
        // SAFETY: loads of 16 floats, stores of as many codes.
        unsafe {
            let first = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x.as_ptr()), inverse));
            let second = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x.as_ptr().add(OCTET)), inverse));
            sum = _mm256_add_epi32(sum, _mm256_add_epi32(first, second));
            // Columns 0 to 3 of both octets, and 4 to 7, which go to the upper halves of words.
            let low = _mm256_permute2x128_si256::<0x20>(first, second);
            let high = _mm256_permute2x128_si256::<0x31>(first, second);
            let pairs = _mm256_blend_epi16::<0b1010_1010>(low, _mm256_slli_epi32::<16>(high));
            _mm256_storeu_si256(codes.as_mut_ptr().cast(), pairs);
        }
    }
    let mut lanes = [0i32; OCTET];
    // SAFETY: eight words.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sum) };
    (scale, scale * lanes.iter().sum::<i32>() as f32)
}

#[target_feature(enable = "avx2")]
fn largest(v: __m256i) -> i32 {
    let mut lanes = [0i32; OCTET];
    // SAFETY: eight words.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), v) };
    lanes.into_iter().fold(0, i32::max)
}

/// See [`super::super::kernels::Kernels::round_group`].
#[target_feature(enable = "avx2,f16c")]
pub(in crate::backend::cpu) fn round_group(values: &[f32], stride: usize, bytes: &mut [u8]) {
    assert!(values.len() >= (LANES - 1) * stride + BYTE_GROUP && bytes.len() == (2 + BYTE_GROUP) * LANES);
    let row = |lane: usize| -> [__m256; 4] {
        // SAFETY: four vectors of every row, as was just checked.
        std::array::from_fn(|i| unsafe { _mm256_loadu_ps(values.as_ptr().add(lane * stride + OCTET * i)) })
    };
    let mut largest = [0.0f32; LANES];
    for (lane, largest) in largest.iter_mut().enumerate() {
        let [a, b, c, d] = row(lane).map(|v| _mm256_andnot_ps(_mm256_set1_ps(-0.0), v));
        let most = _mm256_max_ps(_mm256_max_ps(a, b), _mm256_max_ps(c, d));
        let most = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps::<1>(most));
        let most = _mm_max_ps(most, _mm_movehl_ps(most, most));
        *largest = _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
    }
    let mut inverses = [0.0f32; LANES];
    for h in 0..2 {
        // SAFETY: halves of arrays of sixteen, and of the sixteen scales.
        unsafe {
            let largest = _mm256_loadu_ps(largest.as_ptr().add(HALF * h));
            let scales = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_div_ps(largest, _mm256_set1_ps(127.0)));
            _mm_storeu_si128(bytes.as_mut_ptr().cast::<__m128i>().add(h), scales);
            let scales = _mm256_cvtph_ps(scales);
            let some = _mm256_cmp_ps::<_CMP_NEQ_OQ>(scales, _mm256_setzero_ps());
            let inverse = _mm256_and_ps(some, _mm256_div_ps(_mm256_set1_ps(1.0), scales));
            _mm256_storeu_ps(inverses.as_mut_ptr().add(HALF * h), inverse);
        }
    }
    // Sixteen pairs of columns t and t + 4 of a row: those of two octets in a vector.
    let pairs = |lane: usize| -> [__m128i; 2] {
        let limit = _mm256_set1_ps(127.0);
        let inverse = _mm256_set1_ps(inverses[lane]);
        let [a, b, c, d] = row(lane).map(|v| {
            let v = _mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(v, inverse), _mm256_set1_ps(-127.0)), limit);
            _mm256_cvtps_epi32(v)
        });
        // Packing leaves columns 0 to 3 of all octets in one half, and 4 to 7 in the other.
        let bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
        let (first, second) = (_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes));
        [_mm_unpacklo_epi8(first, second), _mm_unpackhi_epi8(first, second)]
    };
    let mut octets = [[_mm256_setzero_si256(); HALF]; 2];
    for lane in 0..HALF {
        let (upper, lower) = (pairs(lane), pairs(HALF + lane));
        for (octets, (upper, lower)) in octets.iter_mut().zip(upper.into_iter().zip(lower)) {
            octets[lane] = _mm256_set_m128i(lower, upper);
        }
    }
    for (i, rows) in octets.into_iter().enumerate() {
        for (pair, column) in transpose(rows).into_iter().enumerate() {
            // SAFETY: the pairs of two octets, sixteen rows each, behind the scales.
            unsafe {
                let to = bytes.as_mut_ptr().add(2 * LANES).cast::<__m256i>();
                _mm256_storeu_si256(to.add(HALF * i + pair), column);
            }
        }
    }
}

/// Transposes 8 x 8 16-bit numbers in both halves of the vectors.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(rows: [__m256i; HALF]) -> [__m256i; HALF] {
    let [a, b, c, d, e, f, g, h] = rows;
    let twos =
        [(a, b), (c, d), (e, f), (g, h)].map(|(a, b)| (_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b)));
    let fours = |a: __m256i, b: __m256i| (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    let (first, second) = (fours(twos[0].0, twos[1].0), fours(twos[2].0, twos[3].0));
    let (third, fourth) = (fours(twos[0].1, twos[1].1), fours(twos[2].1, twos[3].1));
    let pairs = [(first.0, second.0), (first.1, second.1), (third.0, fourth.0), (third.1, fourth.1)];
    let [a, b, c, d] = pairs.map(|(a, b)| [_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)]);
    [a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]]
}
