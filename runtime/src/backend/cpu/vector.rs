//! Loops over rows of numbers, written plainly: every instruction set inlines and so compiles them for itself.

use awqua_shaders::kv::LARGEST_SCALE;
use half::f16;

use crate::backend::Q8_GROUP;

/// Numbers that such a loop takes at a time.
const LANES: usize = 16;

/// e^x within 2 units in the last place; at most e^88, at least e^-87. NaN stays NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// Added to a small number, it rounds it to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts, the first of which has few bits, so that its multiples are exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let x = if x > 88.0 { 88.0 } else { x };
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2[0]) - n * LN_2[1];
    let high = 1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0));
    let e = 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * high)));
    e * f32::from_bits((shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127)) << 23)
}

/// Replaces numbers by e^(x - m), m the largest; returns m and the sum of what they became.
#[inline(always)]
pub(super) fn exponentials(x: &mut [f32]) -> (f32, f32) {
    let mut most = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (most, &x) in most.iter_mut().zip(chunk) {
            *most = if x > *most { x } else { *most };
        }
    }
    let most = most.iter().chain(rest).fold(f32::NEG_INFINITY, |most, &x| most.max(x));
    let mut sums = [0.0; LANES];
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *x = exp(*x - most);
            *sum += *x;
        }
    }
    let mut sum: f32 = sums.iter().sum();
    for x in rest {
        *x = exp(*x - most);
        sum += *x;
    }
    (most, sum)
}

/// Rounds a group of numbers to the codes of [`crate::backend::KvType::Q8`]; returns their scale. NaN becomes 0, and numbers
/// beyond 127 of the largest scale the last code.
pub(super) fn round_q8(x: &[f32], codes: &mut [i8]) -> f16 {
    let most = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let scale = f16::from_f32((most / 127.0).min(LARGEST_SCALE));
    let wide = scale.to_f32();
    let inverse = if wide > 0.0 { 1.0 / wide } else { 0.0 };
    for (x, code) in x.iter().zip(codes) {
        *code = (x * inverse).clamp(-127.0, 127.0).round_ties_even() as i8;
    }
    scale
}

/// Widens rows of `dim` codes, each with a scale for every [`Q8_GROUP`] of them.
#[inline(always)]
pub(super) fn expand_q8(codes: &[i8], scales: &[f32], dim: usize, out: &mut [f32]) {
    let rows = codes.chunks_exact(dim).zip(scales.chunks_exact(dim.div_ceil(Q8_GROUP)));
    for ((codes, scales), out) in rows.zip(out.chunks_exact_mut(dim)) {
        for ((codes, scale), out) in codes.chunks(Q8_GROUP).zip(scales).zip(out.chunks_mut(Q8_GROUP)) {
            for (out, code) in out.iter_mut().zip(codes) {
                *out = f32::from(*code) * scale;
            }
        }
    }
}

/// Widens rows of sixteen codes, with sixteen scales for every [`Q8_GROUP`] rows.
#[inline(always)]
pub(super) fn expand_q8_lanes(codes: &[i8], scales: &[f32], out: &mut [f32]) {
    let groups = codes.chunks(Q8_GROUP * LANES).zip(scales.as_chunks::<LANES>().0);
    for ((codes, scales), out) in groups.zip(out.chunks_mut(Q8_GROUP * LANES)) {
        for (codes, out) in codes.as_chunks::<LANES>().0.iter().zip(out.as_chunks_mut::<LANES>().0) {
            for ((out, code), scale) in out.iter_mut().zip(codes).zip(scales) {
                *out = f32::from(*code) * scale;
            }
        }
    }
}

/// out[i] = silu(gate[i]) * up[i]
#[inline(always)]
pub(super) fn silu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((&g, u), out) in gate.iter().zip(up).zip(out) {
        *out = g / (1.0 + exp(-g)) * u;
    }
}

/// out[i] = gelu(gate[i]) * up[i], by the formula with tanh: v / 2 * (1 + tanh(z / 2)) is v / (1 + exp(-z)).
#[inline(always)]
pub(super) fn gelu_tanh(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((&g, u), out) in gate.iter().zip(up).zip(out) {
        *out = g / (1.0 + exp(-1.595_769 * (g + 0.044_715 * g * g * g))) * u;
    }
}

/// c[r, j] = sum_i a[r, i] * b[i, j], added to what is there if `add`; each matrix with its stride. Every sum is added up
/// in the order of i, whatever else is computed with it.
#[inline(always)]
pub(super) fn outer(a: &[f32], lda: usize, b: &[f32], ldb: usize, c: &mut [f32], ldc: usize, extents: Outer) {
    let Outer { rows, depth, columns, add } = extents;
    for r in 0..rows {
        let c = &mut c[r * ldc..][..columns];
        if !add {
            c.fill(0.0);
        }
        for (i, &a) in a[r * lda..][..depth].iter().enumerate() {
            for (c, b) in c.iter_mut().zip(&b[i * ldb..][..columns]) {
                *c += a * b;
            }
        }
    }
}

/// Extents of an [`outer`].
#[derive(Clone, Copy)]
pub(super) struct Outer {
    pub(super) rows: usize,
    pub(super) depth: usize,
    pub(super) columns: usize,
    pub(super) add: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_match_those_of_the_library() {
        for i in -86_999..88_000 {
            let x = i as f32 * 1e-3;
            let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((found / expected - 1.0).abs() < 3e-7, "e^{x}: {found} != {expected}");
        }
        assert!(exp(f32::NAN).is_nan() && exp(1e9).is_finite() && exp(-1e9) < 1e-37);
    }

    #[test]
    fn exponentials_are_of_the_distance_from_the_largest() {
        for n in [1, 5, 16, 33, 100] {
            let mut x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin() * 20.0).collect();
            let largest = x.iter().fold(f32::MIN, |a, &b| a.max(b));
            let expected: Vec<f64> = x.iter().map(|&v| f64::from(v - largest).exp()).collect();
            let (most, sum) = exponentials(&mut x);
            assert_eq!(most, largest);
            assert!((f64::from(sum) / expected.iter().sum::<f64>() - 1.0).abs() < 1e-6);
            for (found, expected) in x.iter().zip(expected) {
                assert!((f64::from(*found) - expected).abs() < 1e-6);
            }
        }
        let mut bad = [0.0, f32::NAN, 1.0];
        assert!(exponentials(&mut bad).1.is_nan());
    }

    #[test]
    fn codes_of_8_bits_are_within_half_a_step() {
        for n in [1, 7, 31, Q8_GROUP] {
            for factor in [1e-3, 1.0, 300.0] {
                let x: Vec<f32> = (0..n).map(|i| (i as f32 * 1.7 + 0.3).sin() * factor).collect();
                let mut codes = vec![0; n];
                let scale = round_q8(&x, &mut codes).to_f32();
                let most = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                assert!((scale * 127.0 / most - 1.0).abs() < 1e-2);
                for (x, code) in x.iter().zip(codes) {
                    // The largest one may lie beyond the last code by what the scale was rounded by.
                    assert!((x - f32::from(code) * scale).abs() <= 0.57 * scale, "{x} with {code} of {scale}");
                }
            }
        }
        let mut codes = [1; 4];
        assert_eq!(round_q8(&[0.0; 4], &mut codes), f16::ZERO);
        assert_eq!(codes, [0; 4]);
        assert_eq!(round_q8(&[f32::NAN, 0.0, f32::INFINITY, -2.0], &mut codes).to_f32(), LARGEST_SCALE);
        assert_eq!(codes, [0, 0, 127, 0]);
        for large in [65_500.0, 65_504.0, 1e5, 3e38, f32::MAX] {
            let scale = round_q8(&[large, -large, 1.0, -600.0], &mut codes).to_f32();
            assert_eq!((scale, codes), (LARGEST_SCALE, [127, -127, 0, -1]), "{large}");
            assert!(f16::from_f32(127.0 * scale).is_finite());
        }
    }
}
