//! [`super::int8`] with AVX2.
//!
//! 32 bytes of a weight row are 64 codes: their low nibbles meet a block's even columns in `vpmaddubsw`, their high
//! nibbles the odd ones. The two 16-bit results cannot saturate (4 * 15 * 127) and belong to the same 4 columns lane by
//! lane, so one `vpmaddwd` with the multipliers ends the block: for 64 products 2 + 1 + 1 + 1 instructions, and 4 for
//! the nibbles, which all tokens of a tile share.

use std::arch::x86_64::*;

use super::int8::{BLOCK, Block, Codes, Extents, MAX_CODE, MAX_MULTIPLIER, OCTET, QUAD, TINY, Tile};
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
    let low = _mm256_set1_epi8(15);
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
                let mut nibbles = [[_mm256_setzero_si256(); 2]; R];
                for r in 0..R {
                    // SAFETY: `at` is below the blocks of a row, 32 bytes each.
                    let bytes = unsafe { _mm256_loadu_si256(words[r].add(at)) };
                    nibbles[r] = [_mm256_and_si256(bytes, low), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), low)];
                }
                for c in 0..C {
                    // SAFETY: `at` is below the blocks of a token; a block is three aligned vectors.
                    let (even, odd, multipliers) = unsafe {
                        let block = blocks[c].add(at).cast::<__m256i>();
                        (_mm256_load_si256(block), _mm256_load_si256(block.add(1)), _mm256_load_si256(block.add(2)))
                    };
                    for r in 0..R {
                        let pairs = _mm256_add_epi16(
                            _mm256_maddubs_epi16(nibbles[r][0], even),
                            _mm256_maddubs_epi16(nibbles[r][1], odd),
                        );
                        lanes[r][c] = _mm256_add_epi32(lanes[r][c], _mm256_madd_epi16(pairs, multipliers));
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

/// See [`super::kernels::Kernels::round_span`]: the same bits as in plain Rust.
#[target_feature(enable = "avx2")]
pub(super) fn round_span(x: &[f32], blocks: &mut [Block]) -> (f32, f32) {
    assert!(x.len() == blocks.len() * BLOCK);
    let magnitude = _mm256_set1_ps(f32::from_bits(!(1 << 31)));
    let mut most = _mm256_setzero_si256();
    for x in x.as_chunks::<8>().0 {
        // SAFETY: a load of 8 floats from an array of 8.
        let v = unsafe { _mm256_loadu_ps(x.as_ptr()) };
        most = _mm256_max_epu32(most, _mm256_castps_si256(_mm256_and_ps(v, magnitude)));
    }
    let mut eight = [0u32; 8];
    // SAFETY: a store of 8 words to an array of 8.
    unsafe { _mm256_storeu_si256(eight.as_mut_ptr().cast(), most) };
    let largest = f32::from_bits(eight.into_iter().fold(0, u32::max));
    if largest < TINY {
        blocks.fill(Block::ZERO);
        return (0.0, 0.0);
    }
    let scale = largest / (MAX_CODE * MAX_MULTIPLIER);
    let inverse = 1.0 / scale;
    let to_multiplier = _mm256_set1_ps(inverse * (1.0 / MAX_CODE));
    let mut sums = _mm256_setzero_si256();
    for (x, block) in x.as_chunks::<BLOCK>().0.iter().zip(blocks) {
        let mut codes = [_mm256_setzero_si256(); 8];
        for i in 0..8 {
            // SAFETY: `i` counts the eights of a block of 64.
            let v = unsafe { _mm256_loadu_ps(x.as_ptr().add(8 * i)) };
            // Every lane of a quad gets the quad's largest magnitude.
            let most = _mm256_and_ps(v, magnitude);
            let most = _mm256_max_ps(most, _mm256_permute_ps::<0b10_11_00_01>(most));
            let most = _mm256_max_ps(most, _mm256_permute_ps::<0b01_00_11_10>(most));
            let m = _mm256_ceil_ps(_mm256_mul_ps(most, to_multiplier));
            let m = _mm256_min_ps(_mm256_max_ps(m, _mm256_set1_ps(1.0)), _mm256_set1_ps(MAX_MULTIPLIER));
            codes[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v, _mm256_div_ps(_mm256_set1_ps(inverse), m)));
            let m = _mm256_cvtps_epi32(m);
            sums = _mm256_add_epi32(sums, _mm256_mullo_epi32(codes[i], m));
            const { assert!(QUAD == 4) };
            block.multipliers[2 * i] = _mm256_cvtsi256_si32(m) as i16;
            block.multipliers[2 * i + 1] = _mm_cvtsi128_si32(_mm256_extracti128_si256::<1>(m)) as i16;
        }
        // Packing works on 128-bit halves; the permutation puts quarters back in order.
        let pack = |a: __m256i, b: __m256i, c: __m256i, d: __m256i| {
            let low = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a, b));
            let high = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(c, d));
            let bytes = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi16(low, high));
            let apart = _mm256_setr_epi8(
                0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13,
                15,
            );
            // 16 even columns, then 16 odd ones.
            _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_shuffle_epi8(bytes, apart))
        };
        let first = pack(codes[0], codes[1], codes[2], codes[3]);
        let second = pack(codes[4], codes[5], codes[6], codes[7]);
        // SAFETY: two stores of 32 bytes to an array of 64.
        unsafe {
            let to = block.codes.as_mut_ptr().cast::<__m256i>();
            _mm256_storeu_si256(to, _mm256_permute2x128_si256::<0x20>(first, second));
            _mm256_storeu_si256(to.add(1), _mm256_permute2x128_si256::<0x31>(first, second));
        }
    }
    let mut eight = [0i32; 8];
    // SAFETY: a store of 8 words to an array of 8.
    unsafe { _mm256_storeu_si256(eight.as_mut_ptr().cast(), sums) };
    (scale, scale * eight.into_iter().fold(0, i32::wrapping_add) as f32)
}
