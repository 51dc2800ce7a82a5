//! Ranges narrower than the extremes: a few large weights saturate and all others get finer steps.
//!
//! The error of a group for inputs x is `|(w - w') x|²`, summed over tokens `d G dᵀ` with the group's Gram matrix G: the
//! objective of AutoAWQ's clip search, which multiplies with the tokens themselves, for the price of one small matrix.

use super::Moments;
use crate::grid::{Grid, Step, extremes};
use crate::math::{Threads, View, dot, gemm, vectorized};

/// Groups wider than this are judged by the mean squares alone; the Gram matrix would cost its square.
const MAX_GRAM: usize = 256;

/// Rows judged together.
const ROWS: usize = 512;

/// Chooses the step of every group of the (n, k) matrix `w` among shrunk ranges; the full range is one of them.
pub fn search(threads: Threads, w: &[f32], k: usize, grid: Grid, moments: &Moments) -> Vec<Step> {
    let group = grid.group(k);
    let (n, groups) = (w.len() / k, k / group);
    let columns = threads.map(groups, |g| {
        let mut judge = Judge::new(moments, g * group, group);
        let mut steps = Vec::with_capacity(n);
        let mut rows = Vec::with_capacity(ROWS * group);
        for first in (0..n).step_by(ROWS) {
            rows.clear();
            for row in first..n.min(first + ROWS) {
                rows.extend_from_slice(&w[row * k + g * group..][..group]);
            }
            steps.extend(search_rows(&rows, grid, &mut judge));
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
        _ => (4, 0.1),
    }
}

fn search_rows(rows: &[f32], grid: Grid, judge: &mut Judge) -> Vec<Step> {
    let ranges: Vec<(f32, f32)> = rows
        .chunks_exact(judge.group)
        .map(|row| {
            let (low, high) = extremes(row);
            (low.min(0.0), high.max(0.0))
        })
        .collect();
    // Shares of both ends, and the best error with them.
    let mut best: Vec<(f32, f32, f64)> = vec![(1.0, 1.0, f64::INFINITY); ranges.len()];
    let mut consider = |shares: &dyn Fn(usize) -> (f32, f32), best: &mut Vec<(f32, f32, f64)>| {
        let tried: Vec<(f32, f32)> = (0..ranges.len()).map(shares).collect();
        let steps: Vec<Step> = ranges.iter().zip(&tried).map(|(r, s)| grid.span(r.0 * s.0, r.1 * s.1)).collect();
        let errors = judge.errors(rows, grid, &steps);
        for ((best, &(low, high)), error) in best.iter_mut().zip(&tried).zip(errors) {
            if error < best.2 {
                *best = (low, high, error);
            }
        }
    };
    let (count, most) = shrinkage(grid.bits);
    for i in 0..count {
        let share = 1.0 - most * i as f32 / count as f32;
        consider(&|_| (share, share), &mut best);
    }
    if grid.bits <= 3 && !grid.symmetric {
        // Each end on its own, from the common best.
        let near = most / count as f32;
        for offset in [-2.0, -1.0, 1.0, 2.0] {
            let common: Vec<(f32, f32, f64)> = best.clone();
            let end = |share: f32| (share + offset * near).clamp(0.05, 1.1);
            consider(&|i| (end(common[i].0), common[i].1), &mut best);
            consider(&|i| (common[i].0, end(common[i].1)), &mut best);
        }
    }
    ranges.iter().zip(&best).map(|(r, b)| grid.span(r.0 * b.0, r.1 * b.1)).collect()
}

/// Weighs the errors of one group of columns.
struct Judge {
    group: usize,
    /// Gram matrix (group, group), or the mean squares (group) of wide groups.
    gram: Vec<f32>,
    delta: Vec<f32>,
    product: Vec<f32>,
}

impl Judge {
    fn new(moments: &Moments, first: usize, group: usize) -> Self {
        let gram = match group <= MAX_GRAM {
            true => {
                let mut gram = moments.diagonal_block(first, group);
                // Directions the calibration never took still count a little.
                let mean = (0..group).map(|i| gram[i * group + i]).sum::<f32>() / group as f32;
                (0..group).for_each(|i| gram[i * group + i] += 0.01 * mean);
                gram
            }
            false => (first..first + group).map(|i| moments.mean_square(i)).collect(),
        };
        Self { group, gram, delta: Vec::new(), product: Vec::new() }
    }

    /// Error of every row with the given steps.
    fn errors(&mut self, rows: &[f32], grid: Grid, steps: &[Step]) -> Vec<f64> {
        let group = self.group;
        self.delta.resize(rows.len(), 0.0);
        let delta = &mut self.delta;
        vectorized(|| {
            let max = grid.max_code();
            for ((row, delta), &step) in rows.chunks_exact(group).zip(delta.chunks_exact_mut(group)).zip(steps) {
                let inverse = 1.0 / step.scale;
                for (&w, delta) in row.iter().zip(delta) {
                    let code = (crate::grid::round(w * inverse) + step.zero).clamp(0.0, max);
                    *delta = w - (code - step.zero) * step.scale;
                }
            }
        });
        if group > MAX_GRAM {
            let weigh = |d: &[f32]| d.iter().zip(&self.gram).map(|(&d, &g)| f64::from(d * d * g)).sum();
            return self.delta.chunks_exact(group).map(weigh).collect();
        }
        self.product.resize(self.delta.len(), 0.0);
        let (d, g) = (View::new(&self.delta, group), View::new(&self.gram, group));
        gemm(Threads::new(1), 1.0, d, g, 0.0, &mut self.product, group);
        let pairs = self.delta.chunks_exact(group).zip(self.product.chunks_exact(group));
        vectorized(|| pairs.map(|(d, p)| f64::from(dot(d, p))).collect())
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
        for group_size in [Some(32), Some(64), None] {
            for bits in [2, 3, 4] {
                let grid = Grid { bits, group_size, symmetric: false };
                let mut moments = Moments::new(k, k);
                moments.add(Threads::new(1), &x);
                let steps = search(Threads::new(2), &w, k, grid, &moments);
                assert_eq!(steps, search(Threads::new(1), &w, k, grid, &moments));
                let (found, full) = (error(&w, k, grid, &steps, &x), error(&w, k, grid, &grid.spans(&w, k), &x));
                assert!(found < 0.99 * full, "{bits} bits, {group_size:?}: {found} against {full}");
            }
        }
    }
}
