//! [`super`]'s inner loops in plain Rust: the oracle of the others.

use super::activations::{Round, place};
use super::rows::{LANES, MAX_SPAN, OCTET, Rows};
use super::{Inputs, Panel};
use crate::tensor::Offset;

/// See [`super::super::kernels::Kernels::round_span`].
pub(in crate::backend::cpu) fn round_span(x: &[f32], codes: &mut [i16]) -> (f32, f32) {
    // Magnitudes by their bits, so that NaN wins and reaches the result.
    let largest = f32::from_bits(x.iter().fold(0, |most, v| most.max(v.to_bits() & !(1 << 31))));
    let Some(Round { scale, inverse }) = Round::of(largest) else {
        codes.fill(0);
        return (0.0, 0.0);
    };
    let mut sum = 0i32;
    for (x, codes) in x.as_chunks::<OCTET>().0.iter().zip(codes.as_chunks_mut::<OCTET>().0) {
        for (column, x) in x.iter().enumerate() {
            let code = (x * inverse).round_ties_even() as i16;
            sum += i32::from(code);
            codes[place(column)] = code;
        }
    }
    (scale, scale * sum as f32)
}

/// See [`super::super::kernels::Kernels::expand_columns`].
pub(in crate::backend::cpu) fn expand_columns(offset: Offset, params: &[u8], codes: &[u8], out: &mut [f32]) {
    assert!(params.len() == 4 * LANES && 2 * codes.len() == out.len() && out.len().is_multiple_of(OCTET * LANES));
    let (scales, offsets) = params.split_at(2 * LANES);
    for lane in 0..LANES {
        let number = |from: &[u8]| u32::from(u16::from_ne_bytes(from.as_chunks().0[lane]));
        let table = offset.weights(number(scales) | number(offsets) << 16);
        for (words, out) in codes.chunks_exact(4 * LANES).zip(out.chunks_exact_mut(OCTET * LANES)) {
            let word = u32::from_ne_bytes(words.as_chunks().0[lane]);
            for (column, out) in out.chunks_exact_mut(LANES).enumerate() {
                out[lane] = table[(word >> (4 * column)) as usize & 15];
            }
        }
    }
}

/// See [`super::super::kernels::Kernels::gemv`].
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

fn gemv_block(w: &Rows<'_>, block: usize, x: &Inputs<'_>, out: &mut [f32; LANES]) {
    let shape = w.shape();
    out.fill(0.0);
    let mut codes = [0i16; MAX_SPAN];
    for span in 0..x.k / x.span {
        let codes = &mut codes[..x.span];
        for (lane, out) in out.iter_mut().enumerate() {
            let (s, b) = w.codes(block * LANES + lane, span * x.span, codes);
            let sum = dot(codes, &x.codes[span * x.span..][..x.span]);
            *out = (sum as f32).mul_add(s * x.scales[span], *out);
            if shape.has_offsets() {
                *out = b.mul_add(x.sums[span], *out);
            }
        }
    }
}

/// Codes in the order of columns times rounded activations in theirs.
fn dot(codes: &[i16], x: &[i16]) -> i32 {
    let octets = codes.as_chunks::<OCTET>().0.iter().zip(x.as_chunks::<OCTET>().0);
    octets.map(|(q, x)| (0..OCTET).map(|t| i32::from(q[t]) * i32::from(x[place(t)])).sum::<i32>()).sum()
}

/// See [`super::super::kernels::Kernels::unpack`].
pub(in crate::backend::cpu) fn unpack(w: &Rows<'_>, block: usize, first: usize, panel: &mut Panel) {
    let mut codes = [0i16; MAX_SPAN];
    for i in 0..panel.spans {
        let codes = &mut codes[..panel.span];
        let to = &mut panel.codes[i * panel.span * LANES..][..panel.span * LANES];
        for lane in 0..LANES {
            (panel.s[i][lane], panel.b[i][lane]) = w.codes(block * LANES + lane, (first + i) * panel.span, codes);
            for (codes, to) in codes.as_chunks::<OCTET>().0.iter().zip(to.chunks_exact_mut(OCTET * LANES)) {
                for (column, code) in codes.iter().enumerate() {
                    to[place(column) / 2 * 2 * LANES + 2 * lane + place(column) % 2] = *code;
                }
            }
        }
    }
}

/// See [`super::super::kernels::Kernels::gemm`].
pub(in crate::backend::cpu) fn gemm(panel: &Panel, first: usize, x: &Inputs<'_>, sums: &mut [[f32; LANES]]) {
    let spans = x.k / x.span;
    for (t, sums) in sums.iter_mut().enumerate() {
        for span in 0..panel.spans {
            let codes = &panel.codes[span * x.span * LANES..][..x.span * LANES];
            let x_codes = &x.codes[t * x.k + (first + span) * x.span..][..x.span];
            let mut lanes = [0i32; LANES];
            for (codes, x) in codes.as_chunks::<{ 2 * LANES }>().0.iter().zip(x_codes.as_chunks::<2>().0) {
                for (lane, sum) in lanes.iter_mut().enumerate() {
                    *sum +=
                        i32::from(codes[2 * lane]) * i32::from(x[0]) + i32::from(codes[2 * lane + 1]) * i32::from(x[1]);
                }
            }
            let at = t * spans + first + span;
            for (lane, sum) in sums.iter_mut().enumerate() {
                *sum = (lanes[lane] as f32).mul_add(panel.s[span][lane] * x.scales[at], *sum);
                if panel.offsets {
                    *sum = panel.b[span][lane].mul_add(x.sums[at], *sum);
                }
            }
        }
    }
}
