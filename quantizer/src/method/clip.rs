//! Ranges narrower than the extremes: a few large weights saturate and all others get finer steps.
//!
//! The objective is that of AutoAWQ's clip search, which multiplies with the tokens themselves, for the price of one
//! small matrix a group; see [`super::weigh`].

use super::Moments;
use super::weigh::{Detail, Weigher};
use crate::grid::{Grid, Step, extremes, half_scale};
use crate::math::{Threads, vectorized};

/// How often scales are fitted to their codes, which change with them.
const FITS: usize = 2;

/// Rows judged together: their errors stay in a cache near the processor.
const ROWS: usize = 128;

/// Chooses the step of every group of the (n, k) matrix `w` among shrunk ranges; the full range is one of them. With `fit`
/// scales are then fitted to the codes that rounding to nearest gives, which pays if that is how it will be rounded.
pub fn search(threads: Threads, w: &[f32], k: usize, grid: Grid, moments: &Moments, fit: bool) -> Vec<Step> {
    let group = grid.group(k);
    let (n, groups) = (w.len() / k, k / group);
    let columns = threads.map(groups, |g| {
        // Few codes leave large errors, and more for correlations to decide.
        let detail = if grid.bits <= 3 { Detail::Whole } else { Detail::Leading };
        let weigher = Weigher::new(moments, g * group, group, detail);
        let mut judge = Judge { group, weigher, errors: Vec::new(), scratch: Vec::new() };
        let mut steps = Vec::with_capacity(n);
        let mut rows = Vec::with_capacity(ROWS * group);
        for first in (0..n).step_by(ROWS) {
            rows.clear();
            for row in first..n.min(first + ROWS) {
                rows.extend_from_slice(&w[row * k + g * group..][..group]);
            }
            steps.extend(search_rows(&rows, grid, fit, &mut judge));
        }
        steps
    });
    let mut steps = Vec::with_capacity(n * groups);
    for row in 0..n {
        steps.extend(columns.iter().map(|column| column[row]));
    }
    steps
}

/// How far the range shrinks: (steps, largest share).
fn shrinkage(bits: u32) -> (usize, f32) {
    match bits {
        2 => (14, 0.7),
        3 => (12, 0.6),
        4 => (10, 0.5),
        5 => (8, 0.4),
        6 => (6, 0.3),
        _ => (4, 0.1),
    }
}

/// The best step of a group so far.
#[derive(Clone, Copy)]
struct Best {
    step: Step,
    /// Shares of both ends of the range.
    shares: (f32, f32),
    cost: f64,
}

fn search_rows(rows: &[f32], grid: Grid, fit: bool, judge: &mut Judge) -> Vec<Step> {
    let ranges: Vec<(f32, f32)> = rows
        .chunks_exact(judge.group)
        .map(|row| {
            let (low, high) = extremes(row);
            (low.min(0.0), high.max(0.0))
        })
        .collect();
    let none = |range: &(f32, f32)| Best { step: grid.span(range.0, range.1), shares: (1.0, 1.0), cost: f64::INFINITY };
    let mut best: Vec<Best> = ranges.iter().map(none).collect();
    let consider = |shares: &dyn Fn(usize) -> (f32, f32), judge: &mut Judge, best: &mut [Best]| {
        let tried: Vec<(f32, f32)> = (0..ranges.len()).map(shares).collect();
        let steps: Vec<Step> = ranges.iter().zip(&tried).map(|(r, s)| grid.span(r.0 * s.0, r.1 * s.1)).collect();
        let costs = judge.costs(rows, grid, &steps);
        for (((best, shares), step), cost) in best.iter_mut().zip(tried).zip(steps).zip(costs) {
            if cost < best.cost {
                *best = Best { step, shares, cost };
            }
        }
    };
    let (count, most) = shrinkage(grid.bits);
    for i in 0..count {
        let share = 1.0 - most * i as f32 / count as f32;
        consider(&|_| (share, share), judge, &mut best);
    }
    if grid.bits <= 3 && !grid.symmetric {
        // Each end on its own, from the common best.
        let near = most / count as f32;
        for offset in [-2.0, -1.0, 1.0, 2.0] {
            let common = best.clone();
            let end = |share: f32| (share + offset * near).clamp(0.05, 1.1);
            consider(&|i| (end(common[i].shares.0), common[i].shares.1), judge, &mut best);
            consider(&|i| (common[i].shares.0, end(common[i].shares.1)), judge, &mut best);
        }
    }
    if fit {
        for _ in 0..FITS {
            let steps: Vec<Step> = best.iter().map(|best| best.step).collect();
            let fitted = judge.fitted(rows, grid, &steps);
            let costs = judge.costs(rows, grid, &fitted);
            for ((best, step), cost) in best.iter_mut().zip(fitted).zip(costs) {
                if cost < best.cost {
                    *best = Best { step, cost, ..*best };
                }
            }
        }
    }
    best.iter().map(|best| best.step).collect()
}

/// Errors of the rows of one group of columns.
struct Judge {
    group: usize,
    weigher: Weigher,
    errors: Vec<f32>,
    scratch: Vec<f32>,
}

impl Judge {
    /// Cost of every row's error with the given steps.
    fn costs(&mut self, rows: &[f32], grid: Grid, steps: &[Step]) -> Vec<f64> {
        self.round(rows, grid, steps);
        let mut costs = vec![0.0; steps.len()];
        self.weigher.add(&self.errors, self.group, &mut costs, &mut self.scratch);
        costs
    }

    /// The steps with the scale that suits the codes they give best: with w' what the codes stand for, the cost of
    /// w - c w' is smallest at c = (w G w') / (w' G w').
    fn fitted(&mut self, rows: &[f32], grid: Grid, steps: &[Step]) -> Vec<Step> {
        self.round(rows, grid, steps);
        let mut sizes = vec![0.0; steps.len()];
        let mut products = vec![0.0; steps.len()];
        self.errors.iter_mut().zip(rows).for_each(|(error, w)| *error = w - *error);
        self.weigher.add(&self.errors, self.group, &mut sizes, &mut self.scratch);
        // From |w + w'|² = |w|² + |w'|² + 2 w w', with lengths as the weigher has them.
        self.weigher.add(rows, self.group, &mut products, &mut self.scratch);
        products.iter_mut().zip(&sizes).for_each(|(product, size)| *product = -*product - size);
        self.errors.iter_mut().zip(rows).for_each(|(error, w)| *error += w);
        self.weigher.add(&self.errors, self.group, &mut products, &mut self.scratch);
        let fit = |((step, product), size): ((&Step, f64), f64)| {
            let share = (0.5 * product / size) as f32;
            // A group of zeros fits any scale.
            let share = if share.is_finite() { share.clamp(0.8, 1.25) } else { 1.0 };
            Step { scale: half_scale(step.scale * share), ..*step }
        };
        steps.iter().zip(products).zip(sizes).map(fit).collect()
    }

    /// Notes the error of every weight with the given steps.
    fn round(&mut self, rows: &[f32], grid: Grid, steps: &[Step]) {
        let group = self.group;
        self.errors.resize(rows.len(), 0.0);
        let errors = &mut self.errors;
        vectorized(|| {
            let max = grid.max_code();
            for ((row, errors), &step) in rows.chunks_exact(group).zip(errors.chunks_exact_mut(group)).zip(steps) {
                let inverse = 1.0 / step.scale;
                for (&w, error) in row.iter().zip(errors) {
                    let code = (crate::grid::round(w * inverse) + step.zero).clamp(0.0, max);
                    *error = w - (code - step.zero) * step.scale;
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::dequantize;
    use crate::random::Random;

    fn error(w: &[f32], k: usize, grid: Grid, steps: &[Step], x: &[f32]) -> f64 {
        let threads = Threads::new(1);
        let codes = grid.round_to_nearest(threads, w, k, steps);
        let back = dequantize(threads, &grid.matrix(w.len() / k, k, codes, steps));
        let delta: Vec<f32> = w.iter().zip(&back).map(|(a, b)| a - b).collect();
        crate::math::times_transposed(threads, x, &delta, k).iter().map(|&e| f64::from(e).powi(2)).sum()
    }

    #[test]
    fn a_searched_range_is_never_much_worse_and_helps_where_there_are_outliers() {
        let (n, k) = (24, 128);
        let mut random = Random::new(7);
        let mut w = random.normals(n * k);
        for row in w.chunks_exact_mut(k) {
            row[3] *= 6.0;
        }
        let x = random.normals(300 * k);
        let mut gains = Vec::new();
        for group_size in [Some(32), Some(64), None] {
            for bits in [2, 3, 4] {
                let grid = Grid { bits, group_size, symmetric: false };
                let mut moments = Moments::new(k, k);
                moments.add(Threads::new(1), &x);
                let steps = search(Threads::new(2), &w, k, grid, &moments, false);
                assert_eq!(steps, search(Threads::new(1), &w, k, grid, &moments, false));
                let (found, full) = (error(&w, k, grid, &steps, &x), error(&w, k, grid, &grid.spans(&w, k), &x));
                assert!(found < 0.99 * full, "{bits} bits, {group_size:?}: {found} against {full}");
                let steps = search(Threads::new(2), &w, k, grid, &moments, true);
                let fitted = error(&w, k, grid, &steps, &x);
                // The search does not see what errors of different groups have to do with each other.
                assert!(fitted < 1.01 * found, "{bits} bits, {group_size:?}: {fitted} against {found}");
                gains.push(1.0 - fitted / found);
            }
        }
        assert!(gains.iter().sum::<f64>() > 0.0, "{gains:?}");
    }
}
