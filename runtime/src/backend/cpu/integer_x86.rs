//! [`super::integer`] with AVX2.
//!
//! 32 bytes of a weight row are 64 codes, four in each 16-bit word. Shifted and masked, the codes of one place meet 16
//! activations in `vpmaddwd`: for 64 products 4 of those and 4 additions, and 7 instructions for the codes, which all
//! tokens of a tile share.

use std::arch::x86_64::*;

use super::integer::{self, BLOCK, Block, Codes, Extents, OCTET, QUAD, Tile};
use super::kernels::TILE;

/// See [`super::kernels::Kernels::dot_codes`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dot_codes(w: &Codes<'_>, x: &Tile<'_>, acc: &mut [[f32; TILE]; TILE]) {
    let extents = Extents::check(w, x);
    // One token: four rows share what is loaded of it. More: two rows, so that eight sums stay in registers.
    let step = if x.cols == 1 && w.rows == TILE { TILE } else { 2 };
    let mut r = 0;
    while r < w.rows {
        let rows = step.min(w.rows - r);
        let acc = &mut acc[r..];
        // SAFETY: rows `r..r + rows` and `cols` tokens exist by `Extents::check`.
        unsafe {
            match (rows, x.cols) {
                (TILE, _) => dot_tile::<4, 1>(w, x, &extents, r, acc),
                (2, 1) => dot_tile::<2, 1>(w, x, &extents, r, acc),
                (2, 2) => dot_tile::<2, 2>(w, x, &extents, r, acc),
                (2, 3) => dot_tile::<2, 3>(w, x, &extents, r, acc),
                (2, _) => dot_tile::<2, 4>(w, x, &extents, r, acc),
                (_, 1) => dot_tile::<1, 1>(w, x, &extents, r, acc),
                (_, 2) => dot_tile::<1, 2>(w, x, &extents, r, acc),
                (_, 3) => dot_tile::<1, 3>(w, x, &extents, r, acc),
                _ => dot_tile::<1, 4>(w, x, &extents, r, acc),
            }
        }
        r += rows;
    }
}

/// acc[r][c] += product of row `first + r` and token c for r < R and c < C. Each sum is added up in the same order
/// whatever R and C are.
///
/// # Safety
/// `extents` is of these operands, which have R rows from `first` on and C tokens.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot_tile<const R: usize, const C: usize>(
    w: &Codes<'_>,
    x: &Tile<'_>,
    extents: &Extents,
    first: usize,
    acc: &mut [[f32; TILE]],
) {
    let groups = extents.spans / extents.per_group;
    let per_span = x.span / BLOCK;
    let low = _mm256_set1_epi16(15);
    let mut words: [*const __m256i; R] = [std::ptr::null(); R];
    for r in 0..R {
        words[r] = w.words[(first + r) * (w.k / 8)..].as_ptr().cast();
    }
    let mut blocks: [*const Block; C] = [std::ptr::null(); C];
    for c in 0..C {
        blocks[c] = x.blocks[c * extents.blocks..].as_ptr();
    }
    let mut sums = [[_mm256_setzero_ps(); C]; R];
    // b * sum(x), eight spans at a time.
    let mut offsets = [[_mm256_setzero_ps(); C]; R];
    for octet in (0..extents.spans).step_by(OCTET) {
        let mut scales = [[[0.0f32; OCTET]; C]; R];
        for r in 0..R {
            let params = &w.params[(first + r) * groups..][..groups];
            let (s, b) = numbers(params, octet, extents.per_group, w.bias);
            for c in 0..C {
                let at = c * extents.padded + octet;
                let (d, sum) = (&x.scales[at..at + OCTET], &x.sums[at..at + OCTET]);
                // SAFETY: loads and stores of 8 floats from and to slices of 8.
                unsafe {
                    _mm256_storeu_ps(scales[r][c].as_mut_ptr(), _mm256_mul_ps(s, _mm256_loadu_ps(d.as_ptr())));
                    offsets[r][c] = _mm256_fmadd_ps(b, _mm256_loadu_ps(sum.as_ptr()), offsets[r][c]);
                }
            }
        }
        for span in 0..OCTET.min(extents.spans - octet) {
            let mut lanes = [[_mm256_setzero_si256(); C]; R];
            for block in 0..per_span {
                let at = (octet + span) * per_span + block;
                let mut bits = [_mm256_setzero_si256(); R];
                for r in 0..R {
                    // SAFETY: `at` is below the blocks of a row, 32 bytes each.
                    bits[r] = unsafe { _mm256_loadu_si256(words[r].add(at)) };
                }
                for place in 0..QUAD {
                    let mut codes = bits;
                    for r in 0..R {
                        codes[r] = _mm256_and_si256(codes[r], low);
                        bits[r] = _mm256_srli_epi16::<4>(bits[r]);
                    }
                    for c in 0..C {
                        // SAFETY: `at` is below the blocks of a token; a block is four aligned vectors.
                        let x = unsafe { _mm256_load_si256(blocks[c].add(at).cast::<__m256i>().add(place)) };
                        for r in 0..R {
                            lanes[r][c] = _mm256_add_epi32(lanes[r][c], _mm256_madd_epi16(codes[r], x));
                        }
                    }
                }
            }
            for r in 0..R {
                for c in 0..C {
                    let scale = _mm256_set1_ps(scales[r][c][span]);
                    sums[r][c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(lanes[r][c]), scale, sums[r][c]);
                }
            }
        }
    }
    for r in 0..R {
        for c in 0..C {
            acc[r][c] += super::x86::sum_avx(_mm256_add_ps(sums[r][c], offsets[r][c]));
        }
    }
}

/// Scale and `b` of eight spans from `first` on; 0 behind the last one.
#[target_feature(enable = "avx2,f16c")]
fn numbers(params: &[u32], first: usize, per_group: usize, bias: bool) -> (__m256, __m256) {
    let mut eight = [0u32; OCTET];
    match (per_group, params.get(first..first + OCTET)) {
        (1, Some(all)) => eight.copy_from_slice(all),
        (1, None) => eight[..params.len() - first].copy_from_slice(&params[first..]),
        _ => {
            for (i, to) in eight.iter_mut().enumerate() {
                *to = params.get((first + i) / per_group).copied().unwrap_or(0);
            }
        }
    }
    // SAFETY: a load of 8 words from an array of 8.
    let both = unsafe { _mm256_loadu_si256(eight.as_ptr().cast()) };
    let halves = _mm256_packus_epi32(_mm256_and_si256(both, _mm256_set1_epi32(0xffff)), _mm256_srli_epi32::<16>(both));
    let halves = _mm256_permute4x64_epi64::<0b11_01_10_00>(halves);
    let s = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    let o = _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves));
    let b = if bias { o } else { _mm256_xor_ps(_mm256_mul_ps(s, o), _mm256_set1_ps(-0.0)) };
    (s, b)
}

/// See [`super::kernels::Kernels::round_span`].
#[target_feature(enable = "avx2")]
pub(super) fn round_span(x: &[f32], blocks: &mut [Block]) -> (f32, f32) {
    integer::round_span(x, blocks)
}
