//! Quantization grids: which weights a group of codes can stand for, and the scale and zero point that span a range.

use awqua::quant::AffineMatrix;
use awqua::{Error, ErrorKind, Result};
use half::f16;
use serde::{Deserialize, Serialize};

use crate::math::Threads;

/// Smallest range of a group, as AutoAWQ's: it keeps the scale of an all-zero group away from zero.
const MIN_RANGE: f32 = 1e-5;

/// Bits, grouping and symmetry of the codes of one matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Grid {
    /// Bits of a code: 2 to 6, or 8.
    pub bits: u32,
    /// Input features that share a scale; `None`: one group a row.
    pub group_size: Option<usize>,
    /// Whether the zero point is always the middle of the range.
    pub symmetric: bool,
}

/// Scale and zero point of one group; the scale is a half-precision value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Weight units a code unit.
    pub scale: f32,
    /// Code that stands for weight 0.
    pub zero: f32,
}

impl Grid {
    /// Largest code.
    pub fn max_code(self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }

    /// Features of a group of a matrix with `k` input features.
    pub fn group(self, k: usize) -> usize {
        self.group_size.unwrap_or(k)
    }

    /// Checks that the grid is one that is offered and that it fits a matrix of `k` input features.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`].
    pub fn check(self, k: usize) -> Result<()> {
        let refuse = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
        if !matches!(self.bits, 2..=6 | 8) {
            return refuse(format!("expected 2 to 6 or 8 bits, found {}", self.bits));
        }
        let group = self.group(k);
        if k == 0 || group == 0 || !group.is_multiple_of(8) || !k.is_multiple_of(group) {
            return refuse(format!("group size {group} is not a multiple of 8 that divides {k} input features"));
        }
        Ok(())
    }

    /// The step that spans `low` to `high`, widened to include 0, which is then a value of the grid.
    pub fn span(self, low: f32, high: f32) -> Step {
        let (low, high) = (low.min(0.0), high.max(0.0));
        let max = self.max_code();
        if self.symmetric {
            let scale = half_scale((2.0 * high.max(-low)).max(MIN_RANGE) / max);
            return Step { scale, zero: (1u32 << (self.bits - 1)) as f32 };
        }
        let scale = half_scale((high - low).max(MIN_RANGE) / max);
        Step { scale, zero: round(-low / scale).clamp(0.0, max) }
    }

    /// The code of weight `w`.
    #[inline]
    pub fn code(self, step: Step, w: f32) -> f32 {
        (round(w / step.scale) + step.zero).clamp(0.0, self.max_code())
    }

    /// The weight that `w` becomes.
    #[inline]
    pub fn nearest(self, step: Step, w: f32) -> f32 {
        (self.code(step, w) - step.zero) * step.scale
    }

    /// The step that spans each group of the (n, k) matrix `w`.
    pub fn spans(self, w: &[f32], k: usize) -> Vec<Step> {
        w.chunks_exact(self.group(k))
            .map(|group| {
                let (low, high) = extremes(group);
                self.span(low, high)
            })
            .collect()
    }

    /// Rounds every weight of the (n, k) matrix to the nearest value of its group.
    pub fn round_to_nearest(self, threads: Threads, w: &[f32], k: usize, steps: &[Step]) -> Vec<u8> {
        let group = self.group(k);
        let mut codes = vec![0u8; w.len()];
        threads.rows(&mut codes, group, |first, codes| {
            for (i, codes) in codes.chunks_exact_mut(group).enumerate() {
                let step = steps[first + i];
                for (code, &w) in codes.iter_mut().zip(&w[(first + i) * group..]) {
                    *code = self.code(step, w) as u8;
                }
            }
        });
        codes
    }

    /// The matrix of these codes and steps.
    pub fn matrix(self, n: usize, k: usize, codes: Vec<u8>, steps: &[Step]) -> AffineMatrix {
        AffineMatrix {
            n,
            k,
            bits: self.bits,
            group_size: self.group(k),
            codes,
            scales: steps.iter().map(|step| f16::from_f32(step.scale)).collect(),
            zeros: steps.iter().map(|step| step.zero as u8).collect(),
        }
    }
}

/// Smallest and largest element.
pub(crate) fn extremes(group: &[f32]) -> (f32, f32) {
    group.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &w| (low.min(w), high.max(w)))
}

/// The scale as the file will hold it; positive and finite.
pub(crate) fn half_scale(scale: f32) -> f32 {
    // Below the smallest subnormal a scale would become 0 and its weights NaN.
    f16::from_f32(scale.min(65504.0)).max(f16::from_bits(1)).to_f32()
}

/// Rounds to the nearest integer, ties to even, for magnitudes up to 2^22; codes are below 2^8.
///
/// Adding 1.5 * 2^23 leaves no fraction bits, so the addition itself rounds. `f32::round_ties_even` means the same, but
/// is a function call on processors whose baseline has no such instruction, and that was most of the time.
#[inline]
pub(crate) fn round(x: f32) -> f32 {
    const NO_FRACTION: f32 = 12_582_912.0;
    x.clamp(-4_000_000.0, 4_000_000.0) + NO_FRACTION - NO_FRACTION
}

/// All weights of a matrix as f32, row after row.
pub fn dequantize(threads: Threads, matrix: &AffineMatrix) -> Vec<f32> {
    let mut out = vec![0.0; matrix.n * matrix.k];
    threads.rows(&mut out, matrix.k, |first, rows| {
        for (i, row) in rows.chunks_exact_mut(matrix.k).enumerate() {
            matrix.dequantize_row(first + i, row);
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn every_grid_holds_zero_and_errs_by_half_a_step() {
        let w = Random::new(3).normals(8 * 128);
        for bits in [2, 3, 4, 5, 6, 8] {
            for symmetric in [false, true] {
                for group_size in [Some(32), Some(128), None] {
                    let grid = Grid { bits, group_size, symmetric };
                    grid.check(128).unwrap();
                    let steps = grid.spans(&w, 128);
                    let matrix = grid.matrix(8, 128, grid.round_to_nearest(Threads::new(2), &w, 128, &steps), &steps);
                    matrix.check().unwrap();
                    assert_eq!(matrix.is_symmetric(), symmetric);
                    let back = dequantize(Threads::new(2), &matrix);
                    for (i, (&w, &b)) in w.iter().zip(&back).enumerate() {
                        let step = steps[i / grid.group(128)];
                        assert_eq!(grid.nearest(step, 0.0), 0.0);
                        assert!((w - b).abs() <= 1.01 * step.scale, "{bits} {w} {b}");
                    }
                }
            }
        }
    }

    #[test]
    fn strange_groups_get_finite_steps() {
        let grid = Grid { bits: 4, group_size: None, symmetric: false };
        for group in [[0.0; 8], [1e-30; 8], [-3.0; 8], [65000.0; 8]] {
            let step = grid.spans(&group, 8)[0];
            assert!(step.scale > 0.0 && step.scale.is_finite() && (0.0..=15.0).contains(&step.zero));
            let error = (grid.nearest(step, group[0]) - group[0]).abs();
            assert!(error <= 1e-5 + group[0].abs() * 1e-3, "{group:?}: {error}");
        }
    }
}
