//! [`super`]'s inner loops with NEON's products of bytes (`sdot`, the `dotprod` extension).
//!
//! A rounded activation is `256 * high + low` with two signed bytes. An `sdot` multiplies four columns of four rows with
//! one of these bytes of four activations, a lane of a vector, and adds the products to the rows' sums; so one token
//! takes, for the 128 codes of an octet, 8 instructions to bring the codes out and 16 of these. At two a cycle, which
//! Cortex-A76 and later big cores do (4 on Apple's), an octet's 64 bytes take about 12 cycles: at 2.8 GHz 15 GB/s by this
//! count, about what one such core reads from memory. Tiles of many tokens have 16 rows and 3 tokens, whose 24 sums stay
//! in registers.

use std::arch::aarch64::*;
use std::arch::asm;

use super::activations::place;
use super::rows::{Codes, LANES, OCTET, Rows};
use super::{Inputs, Panel, portable};

/// Vectors of four rows in a block.
pub(super) const QUADS: usize = LANES / 4;

/// sums[r] += sum_i a[4 r + i] * b[4 I + i]
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot<const I: i32>(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction reads and writes these registers only. The intrinsic for it is not stable yet.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {a:v}.16b, {b:v}.4b[{i}]",
            sums = inout(vreg) sums, a = in(vreg) a, b = in(vreg) b, i = const I,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// See [`super::super::kernels::Kernels::round_span`]; an octet of codes is the low bytes of columns 0, 2, 4, 6 and of 1,
/// 3, 5, 7, then the high ones.
pub(in crate::backend::cpu) fn round_span(x: &[f32], codes: &mut [i16]) -> (f32, f32) {
    let numbers = portable::round_span(x, codes);
    for octet in bytemuck::cast_slice_mut::<i16, [i16; OCTET]>(codes) {
        let given = *octet;
        let bytes: &mut [i8; 2 * OCTET] = bytemuck::cast_mut(octet);
        for column in 0..OCTET {
            let code = given[place(column)];
            let low = code as i8;
            let at = OCTET / 2 * (column % 2) + column / 2;
            bytes[at] = low;
            bytes[OCTET + at] = ((code - i16::from(low)) >> 8) as i8;
        }
    }
    numbers
}

/// Codes of [`round_span`] in the order of [`portable`].
#[cfg(test)]
pub(in crate::backend::cpu) fn natural(codes: &[i16]) -> Vec<i16> {
    let mut all = Vec::new();
    for octet in bytemuck::cast_slice::<i16, [i8; 2 * OCTET]>(codes) {
        let mut natural = [0; OCTET];
        for column in 0..OCTET {
            let at = OCTET / 2 * (column % 2) + column / 2;
            natural[place(column)] = 256 * i16::from(octet[OCTET + at]) + i16::from(octet[at]);
        }
        all.extend(natural);
    }
    all
}

/// The codes of an octet: columns 0, 2, 4, 6 of four rows at a time, then 1, 3, 5, 7.
///
/// # Safety
/// The bytes of an octet at `at`.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn bring_out(codes: Codes, at: *const u8) -> [[int8x16_t; 2]; QUADS] {
    match codes {
        Codes::Four(_) => std::array::from_fn(|quad| {
            // SAFETY: by the caller's promise.
            let words = unsafe { vld1q_u8(at.add(16 * quad)) };
            [vreinterpretq_s8_u8(vandq_u8(words, vdupq_n_u8(15))), vreinterpretq_s8_u8(vshrq_n_u8::<4>(words))]
        }),
        Codes::Eight => {
            // Pairs of columns 0 and 4, 1 and 5, 2 and 6, 3 and 7 of eight rows; zipped, the first and third make 0, 4, 2,
            // 6 of four rows.
            const ORDER: [u8; 16] = [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15];
            // SAFETY: by the caller's promise, and sixteen bytes of a table.
            let (order, pair) = unsafe {
                (vld1q_u8(ORDER.as_ptr()), |t: usize, half: usize| {
                    vreinterpretq_s16_s8(vld1q_s8(at.cast::<i8>().add(2 * LANES * t + 16 * half)))
                })
            };
            let sort = |v: int16x8_t| vqtbl1q_s8(vreinterpretq_s8_s16(v), order);
            std::array::from_fn(|quad| {
                let half = quad / 2;
                let parts = [(pair(0, half), pair(2, half)), (pair(1, half), pair(3, half))];
                parts.map(|(a, b)| sort(if quad % 2 == 0 { vzip1q_s16(a, b) } else { vzip2q_s16(a, b) }))
            })
        }
    }
}

/// Four rows of even and of odd columns as two pairs of rows.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn pair([even, odd]: [int8x16_t; 2]) -> [int8x16_t; 2] {
    let (even, odd) = (vreinterpretq_s32_s8(even), vreinterpretq_s32_s8(odd));
    [vreinterpretq_s8_s32(vzip1q_s32(even, odd)), vreinterpretq_s8_s32(vzip2q_s32(even, odd))]
}

/// Scales and b of a group.
pub(super) fn params(w: &Rows<'_>, bytes: &[u8]) -> ([f32; LANES], [f32; LANES]) {
    let number = |at: usize| half::f16::from_ne_bytes([bytes[2 * at], bytes[2 * at + 1]]).to_f32();
    let s: [f32; LANES] = std::array::from_fn(number);
    let b = std::array::from_fn(|lane| match w.shape().codes {
        Codes::Four(offset) if offset.is_bias() => number(LANES + lane),
        Codes::Four(_) => -(s[lane] * number(LANES + lane)),
        Codes::Eight => 0.0,
    });
    (s, b)
}

/// Adds a span's products, whose sums of low and high bytes these are.
///
/// # Safety
/// Sixteen floats at each pointer.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn finish(
    lanes: &[[int32x4_t; 2]; QUADS],
    (s, b): (*const f32, *const f32),
    (d, sum): (f32, f32),
    offsets: bool,
    to: *mut f32,
) {
    for (quad, [low, high]) in lanes.iter().enumerate() {
        let all = vcvtq_f32_s32(vaddq_s32(*low, vshlq_n_s32::<8>(*high)));
        // SAFETY: by the caller's promise.
        unsafe {
            let (s, b, to) = (vld1q_f32(s.add(4 * quad)), vld1q_f32(b.add(4 * quad)), to.add(4 * quad));
            let mut sums = vfmaq_f32(vld1q_f32(to), all, vmulq_n_f32(s, d));
            if offsets {
                sums = vfmaq_f32(sums, b, vdupq_n_f32(sum));
            }
            vst1q_f32(to, sums);
        }
    }
}

/// See [`super::super::kernels::Kernels::unpack`]; a panel's octet is what [`bring_out`] gives, or [`pair`] makes of it.
#[target_feature(enable = "neon")]
pub(in crate::backend::cpu) fn unpack<const PAIRED: bool>(w: &Rows<'_>, block: usize, first: usize, panel: &mut Panel) {
    let shape = w.shape();
    let span = panel.span;
    let bytes = w.block(block);
    for i in 0..panel.spans {
        let column = (first + i) * span;
        let group = &bytes[column / shape.group_size * shape.group_bytes()..][..shape.group_bytes()];
        (panel.s[i], panel.b[i]) = params(w, group);
        let octets = column % shape.group_size / OCTET..(column % shape.group_size + span) / OCTET;
        let codes = &group[shape.param_bytes()..][octets.start * shape.octet_bytes()..octets.end * shape.octet_bytes()];
        let to = &mut bytemuck::cast_slice_mut::<i16, i8>(&mut panel.codes)[i * span * LANES..][..span * LANES];
        for (codes, to) in codes.chunks_exact(shape.octet_bytes()).zip(to.chunks_exact_mut(OCTET * LANES)) {
            // SAFETY: an octet of codes; 128 bytes for eight vectors.
            unsafe {
                for (quad, parts) in bring_out(shape.codes, codes.as_ptr()).into_iter().enumerate() {
                    let parts = if PAIRED { pair(parts) } else { parts };
                    vst1q_s8(to.as_mut_ptr().add(32 * quad), parts[0]);
                    vst1q_s8(to.as_mut_ptr().add(32 * quad + 16), parts[1]);
                }
            }
        }
    }
}

/// The products with the instructions of `$features`: of an octet's codes, as [`bring_out`] gives them, `$form` makes what
/// `$add` adds the products of to two vectors of sums; `$leave` gives those of low and of high bytes of four rows.
macro_rules! products {
    ($features:literal, $tokens:literal, $form:expr, $add:expr, $leave:expr) => {
        /// See [`super::super::kernels::Kernels::gemv`].
        #[target_feature(enable = $features)]
        pub(in crate::backend::cpu) fn gemv(
            w: &Rows<'_>,
            block: usize,
            apart: usize,
            x: &Inputs<'_>,
            out: &mut [[f32; LANES]],
        ) {
            for (block, out) in (block..).step_by(apart).zip(out) {
                gemv_block(w, block, x, out);
            }
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn gemv_block(w: &Rows<'_>, block: usize, x: &Inputs<'_>, out: &mut [f32; LANES]) {
            let shape = w.shape();
            out.fill(0.0);
            let mut x_octets = x.codes.as_ptr().cast::<i8>();
            let mut index = 0;
            for group in w.block(block).chunks_exact(shape.group_bytes()) {
                let (numbers, codes) = group.split_at(shape.param_bytes());
                let (s, b) = params(w, numbers);
                for codes in codes.chunks_exact(x.span / OCTET * shape.octet_bytes()) {
                    let mut sums = [[vdupq_n_s32(0); 2]; QUADS];
                    for octet in codes.chunks_exact(shape.octet_bytes()) {
                        // SAFETY: an octet of codes, and sixteen bytes of activations for each octet of a row of the
                        // matrix.
                        let (codes, x) = unsafe { (bring_out(shape.codes, octet.as_ptr()), vld1q_s8(x_octets)) };
                        x_octets = x_octets.wrapping_add(2 * OCTET);
                        for (sums, codes) in sums.iter_mut().zip(codes) {
                            *sums = $add(*sums, $form(codes), x);
                        }
                    }
                    let x = (x.scales[index], x.sums[index]);
                    index += 1;
                    let lanes = sums.map(|sums| $leave(sums));
                    // SAFETY: arrays of sixteen.
                    unsafe { finish(&lanes, (s.as_ptr(), b.as_ptr()), x, shape.has_offsets(), out.as_mut_ptr()) };
                }
            }
        }

        /// See [`super::super::kernels::Kernels::gemm`].
        #[target_feature(enable = $features)]
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
                        _ => tile::<$tokens>(panel, first, x, t, sums),
                    };
                }
            }
        }

        /// Adds the products with T rows of `x` from row `t` on; returns T.
        ///
        /// # Safety
        /// `x` and `sums` have these rows, `x` the columns of the spans from `first` on that the panel has.
        #[target_feature(enable = $features)]
        unsafe fn tile<const T: usize>(
            panel: &Panel,
            first: usize,
            x: &Inputs<'_>,
            t: usize,
            to: &mut [[f32; LANES]],
        ) -> usize {
            let spans = x.k / x.span;
            let mut weights = panel.codes.as_ptr().cast::<i8>();
            let mut rows: [*const i8; T] =
                std::array::from_fn(|i| x.codes.as_ptr().wrapping_add((t + i) * x.k + first * x.span).cast());
            for span in 0..panel.spans {
                let mut sums = [[[vdupq_n_s32(0); 2]; QUADS]; T];
                for octet in 0..x.span / OCTET {
                    // SAFETY: sixteen bytes of every row of `x`, eight vectors of the panel for an octet.
                    let x: [int8x16_t; T] =
                        std::array::from_fn(|i| unsafe { vld1q_s8(rows[i].add(2 * OCTET * octet)) });
                    for quad in 0..QUADS {
                        // SAFETY: as above.
                        let codes = unsafe { [vld1q_s8(weights), vld1q_s8(weights.add(16))] };
                        weights = weights.wrapping_add(32);
                        for i in 0..T {
                            sums[i][quad] = $add(sums[i][quad], codes, x[i]);
                        }
                    }
                }
                for (i, sums) in sums.into_iter().enumerate() {
                    let number = (t + i) * spans + first + span;
                    let numbers = (panel.s[span].as_ptr(), panel.b[span].as_ptr());
                    let x = (x.scales[number], x.sums[number]);
                    let lanes = sums.map(|sums| $leave(sums));
                    // SAFETY: arrays of sixteen.
                    unsafe { finish(&lanes, numbers, x, panel.offsets, to[i].as_mut_ptr()) };
                }
                rows = rows.map(|row| row.wrapping_add(2 * x.span));
            }
            T
        }
    };
}

pub(super) use products;

/// Adds the products of four rows' even and odd columns with low and with high bytes.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn add([low, high]: [int32x4_t; 2], [even, odd]: [int8x16_t; 2], x: int8x16_t) -> [int32x4_t; 2] {
    [dot::<1>(dot::<0>(low, even, x), odd, x), dot::<3>(dot::<2>(high, even, x), odd, x)]
}

// Tiles of 3 tokens.
products!("neon,dotprod", 3, std::convert::identity, add, std::convert::identity);
