//! [`super`]'s inner loops with NEON's products of matrices of bytes (`smmla`, the `i8mm` extension).
//!
//! An `smmla` multiplies eight columns of two rows with both bytes of eight activations, which lie as
//! [`neon::round_span`] leaves them: the 2 x 2 sums are those of the low and of the high bytes of both rows. One token
//! takes, for the 128 codes of an octet, 8 instructions to bring the codes out, 8 to pair rows and 8 of these, where
//! products of vectors take 8 and 16. At two products and four other instructions a cycle, which Cortex-X2, Neoverse V1
//! and later cores do, that is about 6 cycles for 64 bytes, less than memory takes to bring them. For many tokens, rows
//! are paired once when a panel is brought out: half the instructions of [`neon`], at 32 multiplications each.

use std::arch::aarch64::*;
use std::arch::asm;

use super::neon::{QUADS, bring_out, finish, pair, params};
use super::rows::{LANES, OCTET, Rows};
use super::{Inputs, Panel};

/// Tokens of a tile: their sums take 24 registers.
const TOKENS: usize = 3;

/// Adds the products of rows 0 and 1 of `a` with rows 0 and 1 of `b`, eight columns each: 00, 01, 10, 11.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn multiply(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction reads and writes these registers only. The intrinsic for it is not stable yet.
    unsafe {
        asm!(
            "smmla {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// Sums of low and of high bytes of four rows, from those of two pairs of rows.
#[inline]
#[target_feature(enable = "neon")]
fn part(pairs: [int32x4_t; 2]) -> [int32x4_t; 2] {
    [vuzp1q_s32(pairs[0], pairs[1]), vuzp2q_s32(pairs[0], pairs[1])]
}

/// See [`super::super::kernels::Kernels::gemv`].
#[target_feature(enable = "neon,dotprod,i8mm")]
pub(in crate::backend::cpu) fn gemv(w: &Rows<'_>, block: usize, x: &Inputs<'_>, out: &mut [[f32; LANES]]) {
    for (block, out) in (block..).zip(out) {
        gemv_block(w, block, x, out);
    }
}

#[inline]
#[target_feature(enable = "neon,dotprod,i8mm")]
fn gemv_block(w: &Rows<'_>, block: usize, x: &Inputs<'_>, out: &mut [f32; LANES]) {
    let shape = w.shape();
    out.fill(0.0);
    let mut x_octets = x.codes.as_ptr().cast::<i8>();
    let mut index = 0;
    for group in w.block(block).chunks_exact(shape.group_bytes()) {
        let (numbers, codes) = group.split_at(shape.param_bytes());
        let (s, b) = params(w, numbers);
        for codes in codes.chunks_exact(x.span / OCTET * shape.octet_bytes()) {
            let mut pairs = [[vdupq_n_s32(0); 2]; QUADS];
            for octet in codes.chunks_exact(shape.octet_bytes()) {
                // SAFETY: an octet of codes, and sixteen bytes of activations for each octet of a row of the matrix.
                let (codes, x) = unsafe { (bring_out(shape.codes, octet.as_ptr()), vld1q_s8(x_octets)) };
                x_octets = x_octets.wrapping_add(2 * OCTET);
                for (sums, codes) in pairs.iter_mut().zip(codes) {
                    let [first, second] = pair(codes);
                    *sums = [multiply(sums[0], first, x), multiply(sums[1], second, x)];
                }
            }
            let x = (x.scales[index], x.sums[index]);
            index += 1;
            let lanes = pairs.map(|pairs| part(pairs));
            // SAFETY: arrays of sixteen.
            unsafe { finish(&lanes, (s.as_ptr(), b.as_ptr()), x, shape.has_offsets(), out.as_mut_ptr()) };
        }
    }
}

/// See [`super::super::kernels::Kernels::gemm`].
#[target_feature(enable = "neon,dotprod,i8mm")]
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
                _ => tile::<TOKENS>(panel, first, x, t, sums),
            };
        }
    }
}

/// Adds the products with T rows of `x` from row `t` on; returns T.
///
/// # Safety
/// `x` and `sums` have these rows, `x` the columns of the spans from `first` on that the panel has.
#[target_feature(enable = "neon,dotprod,i8mm")]
unsafe fn tile<const T: usize>(
    panel: &Panel,
    first: usize,
    x: &Inputs<'_>,
    t: usize,
    sums: &mut [[f32; LANES]],
) -> usize {
    let spans = x.k / x.span;
    let mut weights = panel.codes.as_ptr().cast::<i8>();
    let mut rows: [*const i8; T] =
        std::array::from_fn(|i| x.codes.as_ptr().wrapping_add((t + i) * x.k + first * x.span).cast());
    for span in 0..panel.spans {
        let mut pairs = [[[vdupq_n_s32(0); 2]; QUADS]; T];
        for octet in 0..x.span / OCTET {
            // SAFETY: sixteen bytes of every row of `x`, eight vectors of the panel for an octet.
            let x: [int8x16_t; T] = std::array::from_fn(|i| unsafe { vld1q_s8(rows[i].add(2 * OCTET * octet)) });
            for quad in 0..QUADS {
                // SAFETY: as above.
                let (first, second) = unsafe { (vld1q_s8(weights), vld1q_s8(weights.add(16))) };
                weights = weights.wrapping_add(32);
                for i in 0..T {
                    let sums = &mut pairs[i][quad];
                    *sums = [multiply(sums[0], first, x[i]), multiply(sums[1], second, x[i])];
                }
            }
        }
        for (i, pairs) in pairs.into_iter().enumerate() {
            let number = (t + i) * spans + first + span;
            let numbers = (panel.s[span].as_ptr(), panel.b[span].as_ptr());
            let lanes = pairs.map(|pairs| part(pairs));
            // SAFETY: arrays of sixteen.
            unsafe {
                finish(&lanes, numbers, (x.scales[number], x.sums[number]), panel.offsets, sums[i].as_mut_ptr());
            }
        }
        rows = rows.map(|row| row.wrapping_add(2 * x.span));
    }
    T
}
