//! What rounding errors in a group of columns cost, from the second moments of the inputs that the columns read.
//!
//! The error of one output for inputs x is `(d x)²` with the errors d of its weights, summed over tokens `d G dᵀ` with
//! the Gram matrix G of the group's inputs. G is replaced by its leading part `FᵀF`, a Cholesky factorisation that takes
//! the largest remaining diagonal element first and is cut short, plus the diagonal of what remains: the variance of
//! every input counts in full, and only the weakest correlations are left out.

use super::Moments;
use crate::math::{Threads, View, dot, gemm, vectorized};

/// Groups wider than this are judged by the mean squares alone; the Gram matrix would cost its square.
const MAX_GRAM: usize = 256;

/// Width of the diagonal blocks of moments that judging groups of this width needs.
pub fn block(group: usize) -> usize {
    // A group is a multiple of 8 features.
    if group <= MAX_GRAM { group } else { 8 }
}

/// How much of a Gram matrix is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// All of it.
    Whole,
    /// Its leading quarter and the diagonal of the rest: a quarter of the time.
    Leading,
}

/// Weighs the errors of one group of columns.
#[derive(Debug)]
pub struct Weigher {
    group: usize,
    /// F, (rank, group).
    factor: Vec<f32>,
    /// Diagonal of G - FᵀF, (group).
    rest: Vec<f32>,
}

impl Weigher {
    /// Weighs errors in the `group` columns from `first` on, of which `moments` holds the products or, for wide groups,
    /// the squares.
    pub fn new(moments: &Moments, first: usize, group: usize, detail: Detail) -> Self {
        if group > MAX_GRAM {
            let rest = (first..first + group).map(|i| moments.mean_square(i)).collect();
            return Self { group, factor: Vec::new(), rest };
        }
        let mut gram = moments.diagonal_block(first, group);
        // Directions the calibration never took still count a little.
        let mean = (0..group).map(|i| gram[i * group + i]).sum::<f32>() / group as f32;
        (0..group).for_each(|i| gram[i * group + i] += 0.01 * mean);
        let rank = match detail {
            Detail::Whole => group,
            Detail::Leading => group.div_ceil(4),
        };
        let (factor, rest) = leading(&gram, group, rank);
        Self { group, factor, rest }
    }

    /// Adds the cost of each row of `errors`, which are `stride` apart and begin with the group, to `costs`. `scratch` is
    /// for memory that calls may share.
    pub fn add(&self, errors: &[f32], stride: usize, costs: &mut [f64], scratch: &mut Vec<f32>) {
        let group = self.group;
        let rows = costs.len();
        vectorized(|| {
            for (cost, d) in costs.iter_mut().zip(errors.chunks(stride)) {
                *cost += f64::from(weighted_square(&d[..group], &self.rest));
            }
        });
        let rank = self.factor.len() / group;
        if rank == 0 {
            return;
        }
        scratch.resize(rows * rank, 0.0);
        let d = View::strided(errors, group, stride).rows(rows);
        gemm(Threads::new(1), 1.0, d, View::new(&self.factor, group).t(), 0.0, scratch, rank);
        vectorized(|| {
            for (cost, product) in costs.iter_mut().zip(scratch.chunks_exact(rank)) {
                *cost += f64::from(dot(product, product));
            }
        });
    }
}

/// sum of d² w, in eight interleaved partial sums.
#[inline]
fn weighted_square(d: &[f32], weights: &[f32]) -> f32 {
    let (d8, d1) = d.as_chunks::<8>();
    let (w8, w1) = weights.as_chunks::<8>();
    let mut sums = [0.0f32; 8];
    for (d, w) in d8.iter().zip(w8) {
        for i in 0..8 {
            sums[i] += d[i] * d[i] * w[i];
        }
    }
    sums.iter().sum::<f32>() + d1.iter().zip(w1).map(|(d, w)| d * d * w).sum::<f32>()
}

/// At most `rank` rows F, (rank, n), of the pivoted Cholesky factorisation of the (n, n) matrix, and the diagonal of
/// what FᵀF leaves of it.
fn leading(gram: &[f32], n: usize, rank: usize) -> (Vec<f32>, Vec<f32>) {
    let mut rest: Vec<f32> = (0..n).map(|i| gram[i * n + i]).collect();
    let mut factor: Vec<f32> = Vec::with_capacity(rank * n);
    let largest = rest.iter().fold(0f32, |m, &v| m.max(v));
    while factor.len() < rank * n {
        let pivot = (0..n).max_by(|&a, &b| rest[a].total_cmp(&rest[b])).unwrap_or(0);
        // What is left is rounding error, or nothing.
        if rest.get(pivot).is_none_or(|&v| v.is_nan() || v <= 1e-6 * largest) {
            break;
        }
        let mut row = gram[pivot * n..][..n].to_vec();
        for before in factor.chunks_exact(n) {
            let share = before[pivot];
            row.iter_mut().zip(before).for_each(|(row, before)| *row -= share * before);
        }
        let scale = 1.0 / rest[pivot].sqrt();
        for (row, rest) in row.iter_mut().zip(&mut rest) {
            *row *= scale;
            *rest = (*rest - *row * *row).max(0.0);
        }
        rest[pivot] = 0.0;
        factor.extend(row);
    }
    (factor, rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    /// Costs by the definition, damping included.
    fn naive(x: &[f32], k: usize, first: usize, group: usize, d: &[f32]) -> f64 {
        let at = |row: &[f32]| -> f64 {
            let sum: f32 = d.iter().zip(&row[first..]).map(|(d, x)| d * x).sum();
            f64::from(sum).powi(2)
        };
        let tokens = (x.len() / k) as f64;
        let squares: f64 = x.chunks(k).flat_map(|row| &row[first..first + group]).map(|v| f64::from(v * v)).sum();
        let damp = 0.01 * squares / tokens / group as f64;
        x.chunks(k).map(at).sum::<f64>() / tokens + damp * d.iter().map(|v| f64::from(v * v)).sum::<f64>()
    }

    /// Inputs whose features share a few causes.
    fn correlated(random: &mut Random, tokens: usize, k: usize) -> Vec<f32> {
        let mix = random.normals(6 * k);
        let mut x = random.normals(tokens * k);
        for row in x.chunks_exact_mut(k) {
            for (cause, mix) in random.normals(6).iter().zip(mix.chunks_exact(k)) {
                row.iter_mut().zip(mix).for_each(|(x, m)| *x += cause * m);
            }
        }
        x
    }

    #[test]
    fn costs_are_those_of_the_tokens() {
        let (tokens, k) = (200, 96);
        let mut random = Random::new(11);
        let x = correlated(&mut random, tokens, k);
        let mut moments = Moments::new(k, 32);
        moments.add(Threads::new(1), &x);
        let rows = 9;
        let errors = random.normals(rows * k);
        for first in [0, 32, 64] {
            for (detail, tolerance) in [(Detail::Whole, 1e-3), (Detail::Leading, 0.25)] {
                let mut costs = vec![0.0; rows];
                Weigher::new(&moments, first, 32, detail).add(&errors[first..], k, &mut costs, &mut Vec::new());
                let (mut sum, mut expected) = (0.0, 0.0);
                for (row, &cost) in errors.chunks(k).zip(&costs) {
                    let exact = naive(&x, k, first, 32, &row[first..first + 32]);
                    assert!((cost - exact).abs() < tolerance * exact, "{detail:?} {first}: {cost} against {exact}");
                    sum += cost;
                    expected += exact;
                }
                assert!((sum - expected).abs() < 0.1 * expected, "{detail:?} {first}: {sum} against {expected}");
            }
        }
    }

    #[test]
    fn silent_and_wide_groups_have_finite_costs() {
        let silent = Moments::new(32, 32);
        let mut costs = [0.0; 2];
        Weigher::new(&silent, 0, 32, Detail::Leading).add(&[1.0; 64], 32, &mut costs, &mut Vec::new());
        assert_eq!(costs, [0.0; 2]);

        let (tokens, k) = (50, 512);
        let x = Random::new(4).normals(tokens * k);
        let mut moments = Moments::new(k, block(k));
        moments.add(Threads::new(1), &x);
        let mut costs = [0.0];
        Weigher::new(&moments, 0, k, Detail::Whole).add(&vec![1.0; k], k, &mut costs, &mut Vec::new());
        let squares: f32 = x.iter().map(|v| v * v).sum();
        assert!((costs[0] - f64::from(squares / tokens as f32)).abs() < 1e-3 * costs[0]);
    }
}
