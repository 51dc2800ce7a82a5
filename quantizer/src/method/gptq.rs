//! Rounding column after column, each error compensated by the columns that are still to come.
//!
//! GPTQ (Frantar et al. 2022) in the form of QuIP's LDLQ: with the Gram matrix H = R Rᵀ, R upper triangular, the error
//! of a row is `|d R|²`, and column i is rounded from `w_i + sum_{j<i} d_j R_ji / R_ii` with d the errors so far. The
//! sums over finished blocks of columns are one matrix product, and rows are independent.

use serde::{Deserialize, Serialize};

use super::Moments;
use crate::grid::{Grid, Step, extremes};
use crate::math::{Threads, View, damped_factor, gemm, solve_rows, vectorized};

/// How errors are compensated.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Share of the mean of the diagonal that is added to the diagonal; ten times more whenever the factorisation fails.
    pub damp: f32,
    /// Round columns with large inputs first. Groups stay those of the file, so no order has to be stored.
    pub act_order: bool,
    /// Fit scales to the codes ([`super::refit`]).
    #[serde(default)]
    pub refit: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { damp: 0.01, act_order: true, refit: true }
    }
}

/// The moments of one input, factorised.
#[derive(Debug)]
pub struct Factor {
    k: usize,
    /// Column of the matrix that is rounded i-th.
    order: Vec<usize>,
    /// (k, k) in that order.
    r: Vec<f32>,
    /// Share of the mean of the diagonal that had to be added.
    pub damp: f32,
}

impl Factor {
    /// Factorises moments that hold the whole Gram matrix; `None` if they are not finite.
    ///
    /// # Panics
    /// If the moments hold diagonal blocks only.
    pub fn new(threads: Threads, moments: &Moments, options: Options) -> Option<Self> {
        let k = moments.k;
        assert_eq!(moments.block, k, "the whole Gram matrix");
        let mut order: Vec<usize> = (0..k).collect();
        if options.act_order {
            order.sort_by(|&a, &b| moments.mean_square(b).total_cmp(&moments.mean_square(a)));
        }
        let mut gram = vec![0.0; k * k];
        threads.rows(&mut gram, k, |first, rows| {
            for (i, row) in rows.chunks_exact_mut(k).enumerate() {
                let a = order[first + i];
                for (value, &b) in row.iter_mut().zip(&order) {
                    *value = moments.gram[a.min(b) * k + a.max(b)];
                }
            }
        });
        let (r, damp) = damped_factor(threads, &gram, k, options.damp)?;
        Some(Self { k, order, r, damp })
    }

    /// Overwrites every row of `b` (m, k) with its product with the inverse of the damped matrix.
    ///
    /// # Panics
    /// If the factor is in another order than the file's.
    pub(crate) fn solve(&self, threads: Threads, b: &mut [f32]) {
        assert!(self.order.is_sorted(), "solved in the order of the file");
        solve_rows(threads, &self.r, self.k, b);
    }
}

const BLOCK: usize = 128;

/// Codes of the (n, k) matrix `w`. `steps` are those of the groups, or `None` to span each group when its first column
/// comes up, with the errors so far in it; that needs the order of the file.
///
/// # Panics
/// If shapes do not fit, or `steps` is `None` and the factor is in another order.
pub fn round(
    threads: Threads,
    w: &[f32],
    grid: Grid,
    steps: Option<Vec<Step>>,
    factor: &Factor,
) -> (Vec<u8>, Vec<Step>) {
    let k = factor.k;
    let group = grid.group(k);
    let (n, groups) = (w.len() / k, k / group);
    let late = steps.is_none();
    assert!(!late || factor.order.is_sorted(), "late ranges need the order of the file");
    let steps = steps.unwrap_or_else(|| vec![Step { scale: 1.0, zero: 0.0 }; n * groups]);
    assert_eq!(steps.len(), n * groups);

    // One record a row: errors so far, codes, steps, and the sums of the current block.
    struct Row {
        delta: Vec<f32>,
        codes: Vec<u8>,
        steps: Vec<Step>,
    }
    let mut rows: Vec<Row> = steps
        .chunks_exact(groups)
        .map(|steps| Row { delta: Vec::new(), codes: vec![0; k], steps: steps.to_vec() })
        .collect();
    let mut delta = vec![0.0f32; n * k];
    let mut sums = vec![0.0f32; n * BLOCK.min(k)];
    for first in (0..k).step_by(BLOCK) {
        let width = BLOCK.min(k - first);
        let sums = &mut sums[..n * width];
        if first == 0 {
            sums.fill(0.0);
        } else {
            let finished = View::strided(&delta, first, k);
            let r = View::strided(&factor.r[first..(first - 1) * k + first + width], width, k);
            gemm(threads, 1.0, finished, r, 0.0, sums, width);
        }
        let sums = &*sums;
        threads.rows(&mut rows, 1, |at, rows| {
            vectorized(|| {
                let mut acc = vec![0.0f32; width];
                for (i, row) in rows.iter_mut().enumerate() {
                    let w = &w[(at + i) * k..][..k];
                    acc.copy_from_slice(&sums[(at + i) * width..][..width]);
                    row.delta.clear();
                    for c in 0..width {
                        let place = first + c;
                        let column = factor.order[place];
                        let r = &factor.r[place * k + first..][..width];
                        if late && column.is_multiple_of(group) {
                            // Groups may be longer than a block; then the corrections of its later columns are unknown.
                            let known = group.min(width - c);
                            let corrected = (0..group).map(|j| {
                                let moved =
                                    if j < known { acc[c + j] / factor.r[(place + j) * k + place + j] } else { 0.0 };
                                w[column + j] + moved
                            });
                            let corrected: Vec<f32> = corrected.collect();
                            let (low, high) = extremes(&corrected);
                            row.steps[column / group] = grid.span(low, high);
                        }
                        let step = row.steps[column / group];
                        let code = grid.code(step, w[column] + acc[c] / r[c]);
                        let error = w[column] - (code - step.zero) * step.scale;
                        row.codes[column] = code as u8;
                        row.delta.push(error);
                        for (acc, r) in acc[c + 1..].iter_mut().zip(&r[c + 1..]) {
                            *acc += error * r;
                        }
                    }
                }
            })
        });
        threads.rows(&mut delta, k, |at, chunk| {
            for (i, chunk) in chunk.chunks_exact_mut(k).enumerate() {
                chunk[first..first + width].copy_from_slice(&rows[at + i].delta);
            }
        });
    }
    let codes = rows.iter().flat_map(|row| row.codes.iter().copied()).collect();
    let steps = rows.iter().flat_map(|row| row.steps.iter().copied()).collect();
    (codes, steps)
}

#[cfg(test)]
mod tests {
    use super::super::refit::refit;
    use super::*;
    use crate::grid::{dequantize, half_scale};
    use crate::random::Random;

    /// Correlated inputs: 16 hidden causes and a little noise.
    fn inputs(tokens: usize, k: usize) -> Vec<f32> {
        let mut random = Random::new(11);
        let mix = random.normals(k * 16);
        let causes = random.normals(tokens * 16);
        let noise = random.normals(tokens * k);
        let x = crate::math::times_transposed(Threads::new(1), &causes, &mix, 16);
        x.iter().zip(noise).map(|(x, n)| x + 0.5 * n).collect()
    }

    fn error(w: &[f32], codes: Vec<u8>, steps: &[Step], grid: Grid, x: &[f32], k: usize) -> f64 {
        let threads = Threads::new(1);
        let back = dequantize(threads, &grid.matrix(w.len() / k, k, codes, steps));
        let delta: Vec<f32> = w.iter().zip(&back).map(|(a, b)| a - b).collect();
        crate::math::times_transposed(threads, x, &delta, k).iter().map(|&e| f64::from(e).powi(2)).sum()
    }

    /// The published algorithm, in f64 with an explicit inverse, one row at a time.
    fn published(w: &[f32], k: usize, grid: Grid, steps: &[Step], moments: &Moments, damp: f64) -> Vec<u8> {
        let mut h: Vec<f64> = moments.diagonal_block(0, k).iter().map(|&v| f64::from(v)).collect();
        let mean = (0..k).map(|i| h[i * k + i]).sum::<f64>() / k as f64;
        (0..k).for_each(|i| h[i * k + i] += damp * mean);
        // Gauss and Jordan.
        let mut inverse = vec![0.0; k * k];
        (0..k).for_each(|i| inverse[i * k + i] = 1.0);
        for i in 0..k {
            let pivot = h[i * k + i];
            for j in 0..k {
                h[i * k + j] /= pivot;
                inverse[i * k + j] /= pivot;
            }
            for l in (0..k).filter(|&l| l != i) {
                let factor = h[l * k + i];
                for j in 0..k {
                    h[l * k + j] -= factor * h[i * k + j];
                    inverse[l * k + j] -= factor * inverse[i * k + j];
                }
            }
        }
        // Upper Cholesky factor U of the inverse: inverse = Uᵀ U.
        let mut u = vec![0.0; k * k];
        for i in 0..k {
            for j in i..k {
                let tail: f64 = (0..i).map(|l| u[l * k + i] * u[l * k + j]).sum();
                let value = inverse[i * k + j] - tail;
                u[i * k + j] = if i == j { value.sqrt() } else { value / u[i * k + i] };
            }
        }
        let mut codes = Vec::new();
        for (row, w) in w.chunks_exact(k).enumerate() {
            let mut w: Vec<f64> = w.iter().map(|&v| f64::from(v)).collect();
            for i in 0..k {
                let step = steps[(row * k + i) / grid.group(k)];
                let code = grid.code(step, w[i] as f32);
                let error = (w[i] - f64::from((code - step.zero) * step.scale)) / u[i * k + i];
                codes.push(code as u8);
                for j in i..k {
                    w[j] -= error * u[i * k + j];
                }
            }
        }
        codes
    }

    #[test]
    fn codes_are_those_of_the_published_algorithm() {
        let (n, k) = (12, 320);
        let x = inputs(900, k);
        let w = Random::new(12).normals(n * k);
        let mut moments = Moments::new(k, k);
        moments.add(Threads::new(2), &x);
        let grid = Grid { bits: 3, group_size: Some(64), symmetric: false };
        let steps = grid.spans(&w, k);
        let options = Options { act_order: false, ..Options::default() };
        let factor = Factor::new(Threads::new(2), &moments, options).unwrap();
        let (codes, kept) = round(Threads::new(2), &w, grid, Some(steps.clone()), &factor);
        assert_eq!(kept, steps);
        let expected = published(&w, k, grid, &steps, &moments, 0.01);
        let differing = codes.iter().zip(&expected).filter(|(a, b)| a != b).count();
        // A value on a rounding boundary may fall to either side, and moves what comes after it.
        assert!(differing * 100 < codes.len(), "{differing} of {} codes differ", codes.len());
    }

    #[test]
    fn compensation_beats_rounding_in_every_order_and_grid() {
        let (n, k) = (20, 256);
        let x = inputs(1000, k);
        let w = Random::new(13).normals(n * k);
        let mut moments = Moments::new(k, k);
        moments.add(Threads::new(2), &x);
        for group_size in [Some(32), Some(128), None] {
            for bits in [2, 3, 4, 5, 6, 8] {
                let grid = Grid { bits, group_size, symmetric: bits == 4 };
                let steps = grid.spans(&w, k);
                let plain = grid.round_to_nearest(Threads::new(1), &w, k, &steps);
                let plain = error(&w, plain, &steps, grid, &x, k);
                for (act_order, late) in [(false, false), (true, false), (false, true)] {
                    let factor =
                        Factor::new(Threads::new(1), &moments, Options { act_order, ..Options::default() }).unwrap();
                    let given = (!late).then(|| steps.clone());
                    let (codes, found) = round(Threads::new(2), &w, grid, given.clone(), &factor);
                    assert_eq!((&codes, &found), (&round(Threads::new(1), &w, grid, given, &factor).0, &found));
                    let found = error(&w, codes, &found, grid, &x, k);
                    assert!(found < 0.7 * plain, "{bits} {group_size:?} {act_order} {late}: {found} against {plain}");
                }
            }
        }
    }

    #[test]
    fn scales_that_fit_their_codes_lose_less() {
        let (n, k) = (24, 256);
        let x = inputs(1000, k);
        let w = Random::new(15).normals(n * k);
        let mut moments = Moments::new(k, k);
        moments.add(Threads::new(2), &x);
        let factor = Factor::new(Threads::new(2), &moments, Options::default()).unwrap();
        // One scale a row leaves little to choose.
        for (bits, group_size, symmetric, share) in
            [(2, Some(32), false, 0.95), (2, None, false, 0.99), (3, Some(64), true, 0.95)]
        {
            let grid = Grid { bits, group_size, symmetric };
            let (codes, steps) = round(Threads::new(2), &w, grid, Some(grid.spans(&w, k)), &factor);
            let before = error(&w, codes.clone(), &steps, grid, &x, k);
            let fit = |threads| refit(threads, &w, grid, &codes, steps.clone(), &moments, factor.damp);
            let fitted = fit(Threads::new(3));
            assert_eq!(fitted, fit(Threads::new(1)));
            assert!(fitted.iter().all(|step| step.scale > 0.0 && half_scale(step.scale) == step.scale));
            let after = error(&w, codes, &fitted, grid, &x, k);
            assert!(after < share * before, "{grid:?}: {after} against {before}");
        }
    }

    #[test]
    fn dead_channels_round_to_something_finite() {
        let k = 64;
        let mut x = inputs(10, k);
        x.chunks_exact_mut(k).for_each(|row| row[5..40].fill(0.0));
        let mut moments = Moments::new(k, k);
        moments.add(Threads::new(1), &x);
        let factor = Factor::new(Threads::new(1), &moments, Options::default()).unwrap();
        let grid = Grid { bits: 4, group_size: Some(32), symmetric: false };
        let w = Random::new(14).normals(4 * k);
        let (codes, steps) = round(Threads::new(1), &w, grid, Some(grid.spans(&w, k)), &factor);
        assert!(dequantize(Threads::new(1), &grid.matrix(4, k, codes, &steps)).iter().all(|w| w.is_finite()));
    }
}
