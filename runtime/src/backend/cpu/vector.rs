//! Loops over rows of numbers, written plainly: every instruction set inlines and so compiles them for itself.

/// Numbers that such a loop takes at a time.
const LANES: usize = 16;

/// e^x within 2 units in the last place; at most e^88, at least e^-87. NaN stays NaN.
#[inline(always)]
fn exp(x: f32) -> f32 {
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

/// Replaces numbers by their softmax.
#[inline(always)]
pub(super) fn softmax(x: &mut [f32]) {
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
    let factor = 1.0 / sum;
    x.iter_mut().for_each(|x| *x *= factor);
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

impl Outer {
    /// # Panics
    /// If a matrix is shorter than these extents.
    pub(super) fn check(&self, a: (&[f32], usize), b: (&[f32], usize), c: (&[f32], usize)) {
        let fits = |(m, stride): (&[f32], usize), rows: usize, columns: usize| {
            rows == 0 || columns == 0 || (rows - 1) * stride + columns <= m.len()
        };
        assert!(
            fits(a, self.rows, self.depth) && fits(b, self.depth, self.columns) && fits(c, self.rows, self.columns)
        );
    }
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
    fn softmax_adds_up_to_one() {
        for n in [1, 5, 16, 33, 100] {
            let mut x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin() * 20.0).collect();
            let largest = x.iter().fold(f32::MIN, |a, &b| a.max(b));
            let sum: f64 = x.iter().map(|&v| f64::from(v - largest).exp()).sum();
            let expected: Vec<f64> = x.iter().map(|&v| f64::from(v - largest).exp() / sum).collect();
            softmax(&mut x);
            for (found, expected) in x.iter().zip(expected) {
                assert!((f64::from(*found) - expected).abs() < 1e-6);
            }
        }
        let mut bad = [0.0, f32::NAN, 1.0];
        softmax(&mut bad);
        assert!(bad.iter().any(|v| v.is_nan()));
    }
}
