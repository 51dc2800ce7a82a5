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

use super::neon::{QUADS, bring_out, finish, pair, params, products};
use super::rows::{LANES, OCTET, Rows};
use super::{Inputs, Panel};

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

/// Adds the products of two pairs of rows with both bytes.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn add(sums: [int32x4_t; 2], pairs: [int8x16_t; 2], x: int8x16_t) -> [int32x4_t; 2] {
    [multiply(sums[0], pairs[0], x), multiply(sums[1], pairs[1], x)]
}

// Tiles of 3 tokens, whose sums take 24 registers.
products!("neon,dotprod,i8mm", 3, pair, add, part);
