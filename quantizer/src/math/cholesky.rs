//! Factorisation of Gram matrices, blocked so that nearly all of it is matrix products.

use super::{Threads, View, dot, gemm, mirror};

/// A matrix that should be positive definite is not, at this pivot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotPositive {
    /// Index of the pivot.
    pub pivot: usize,
}

/// Overwrites the symmetric positive definite `h` (k, k) with the upper triangular R of h = R Rᵀ, zeros below.
///
/// This is Cholesky's factorisation taken from the last row up. With it the quadratic form of an error row d is
/// `|d R|²`, whose component i has d_0 to d_i only: exactly what rounding column after column needs, without the inverse
/// that GPTQ forms (Frantar et al. 2022; the equivalence is theorem 6 of QuIP, Chee et al. 2023).
///
/// # Errors
/// [`NotPositive`]; `h` is then overwritten in part.
pub fn reverse_cholesky(threads: Threads, h: &mut [f32], k: usize) -> Result<(), NotPositive> {
    const BLOCK: usize = 96;
    assert_eq!(h.len(), k * k);
    let mut end = k;
    while end > 0 {
        let start = end.saturating_sub(BLOCK);
        let width = end - start;
        diagonal(&mut h[start * k..end * k], start, width, k)?;
        if start > 0 {
            let (above, block) = h.split_at_mut(start * k);
            // Rows above: X = A R⁻ᵀ for the upper triangular R of the block, from its last column to its first.
            threads.rows(above, k, |_, rows| {
                for row in rows.chunks_exact_mut(k) {
                    for j in (0..width).rev() {
                        let r = &block[j * k + start..][..width];
                        let tail = dot(&row[start + j + 1..end], &r[j + 1..]);
                        row[start + j] = (row[start + j] - tail) / r[j];
                    }
                }
            });
            // What is left: A -= X Xᵀ, upper block triangle only.
            let mut x = vec![0.0; start * width];
            for (x, row) in x.chunks_exact_mut(width).zip(above.chunks_exact(k)) {
                x.copy_from_slice(&row[start..end]);
            }
            const PANEL: usize = 384;
            for first in (0..start).step_by(PANEL) {
                let rows = PANEL.min(start - first);
                let a = View::new(&x[first * width..(first + rows) * width], width);
                let b = View::new(&x[first * width..], width).t();
                gemm(threads, -1.0, a, b, 1.0, &mut above[first * k + first..], k);
            }
        }
        end = start;
    }
    for i in 1..k {
        h[i * k..i * k + i].fill(0.0);
    }
    Ok(())
}

/// Factorises the `width` columns from `start` of `rows` in place; sums in f64.
fn diagonal(rows: &mut [f32], start: usize, width: usize, k: usize) -> Result<(), NotPositive> {
    for j in (0..width).rev() {
        let at = |i: usize, l: usize| i * k + start + l;
        let tail: f64 = (j + 1..width).map(|l| f64::from(rows[at(j, l)]).powi(2)).sum();
        let pivot = f64::from(rows[at(j, j)]) - tail;
        if !(pivot.is_finite() && pivot > 0.0) {
            return Err(NotPositive { pivot: start + j });
        }
        let root = pivot.sqrt();
        rows[at(j, j)] = root as f32;
        for i in 0..j {
            let tail: f64 = (j + 1..width).map(|l| f64::from(rows[at(i, l)]) * f64::from(rows[at(j, l)])).sum();
            rows[at(i, j)] = ((f64::from(rows[at(i, j)]) - tail) / root) as f32;
        }
    }
    Ok(())
}

/// Overwrites every row of `b` (m, k) with its product with the inverse of R Rᵀ, R upper triangular as
/// [`reverse_cholesky`] leaves it.
///
/// # Panics
/// If the shapes do not fit.
pub fn solve_rows(threads: Threads, r: &[f32], k: usize, b: &mut [f32]) {
    const BLOCK: usize = 96;
    assert!(r.len() == k * k && b.len().is_multiple_of(k), "whole rows of one width");
    let starts: Vec<usize> = (0..k).step_by(BLOCK).collect();
    let mut sums = vec![0.0; b.len() / k * BLOCK.min(k)];
    // Y Rᵀ = B, from the last column to the first.
    for &start in starts.iter().rev() {
        let end = k.min(start + BLOCK);
        let width = end - start;
        let sums = &mut sums[..b.len() / k * width];
        if end < k {
            let right = View::strided(&r[start * k + end..(end - 1) * k + k], k - end, k);
            gemm(threads, 1.0, View::strided(&b[end..], k - end, k), right.t(), 0.0, sums, width);
        } else {
            sums.fill(0.0);
        }
        let sums = &*sums;
        threads.rows(b, k, |first, rows| {
            for (row, sums) in rows.chunks_exact_mut(k).zip(sums[first * width..].chunks_exact(width)) {
                for j in (0..width).rev() {
                    let r = &r[(start + j) * k + start..][..width];
                    let tail = dot(&row[start + j + 1..end], &r[j + 1..]);
                    row[start + j] = (row[start + j] - sums[j] - tail) / r[j];
                }
            }
        });
    }
    // Z R = Y, from the first column to the last.
    for &start in &starts {
        let end = k.min(start + BLOCK);
        let width = end - start;
        let sums = &mut sums[..b.len() / k * width];
        if start > 0 {
            let above = View::strided(&r[start..(start - 1) * k + end], width, k);
            gemm(threads, 1.0, View::strided(b, start, k), above, 0.0, sums, width);
        } else {
            sums.fill(0.0);
        }
        let sums = &*sums;
        threads.rows(b, k, |first, rows| {
            for (row, sums) in rows.chunks_exact_mut(k).zip(sums[first * width..].chunks_exact(width)) {
                for (value, sum) in row[start..end].iter_mut().zip(sums) {
                    *value -= sum;
                }
                for j in 0..width {
                    let r = &r[(start + j) * k + start..][..width];
                    let z = row[start + j] / r[j];
                    row[start + j] = z;
                    for (value, r) in row[start + j + 1..end].iter_mut().zip(&r[j + 1..]) {
                        *value -= z * r;
                    }
                }
            }
        });
    }
}

/// Adds `damp` times the mean of the diagonal to the diagonal and factorises, ten times more for every failure.
/// Returns the factor and the share that was added, or `None` if the matrix is not finite.
pub(crate) fn damped_factor(threads: Threads, gram: &[f32], k: usize, damp: f32) -> Option<(Vec<f32>, f32)> {
    let mean = (0..k).map(|i| f64::from(gram[i * k + i])).sum::<f64>() / k as f64;
    if !mean.is_finite() {
        return None;
    }
    let mut share = damp.max(1e-6);
    loop {
        let mut h = gram.to_vec();
        mirror(&mut h, k);
        for i in 0..k {
            h[i * k + i] += (f64::from(share) * mean) as f32;
            // A channel that is always zero has no say; any positive number keeps it out of the others' way.
            if h[i * k + i] <= 0.0 {
                h[i * k + i] = 1.0;
            }
        }
        match reverse_cholesky(threads, &mut h, k) {
            Ok(()) => return Some((h, share)),
            Err(_) if share < 10.0 => share *= 10.0,
            Err(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::add_gram;
    use super::*;
    use crate::random::Random;

    #[test]
    fn the_factor_times_its_transpose_is_the_matrix() {
        for k in [1, 5, 96, 97, 250] {
            let x = Random::new(k as u64).normals(2 * k * k);
            let mut gram = vec![0.0; k * k];
            add_gram(Threads::new(2), &x, k, &mut gram);
            mirror(&mut gram, k);
            let mut r = gram.clone();
            reverse_cholesky(Threads::new(2), &mut r, k).unwrap();
            let mut back = vec![0.0; k * k];
            gemm(Threads::new(2), 1.0, View::new(&r, k), View::new(&r, k).t(), 0.0, &mut back, k);
            let worst = gram.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-4 * (2 * k) as f32, "{k}: {worst}");
            assert!((0..k).all(|i| r[i * k..i * k + i].iter().all(|&v| v == 0.0)));
        }
    }

    #[test]
    fn solved_rows_times_the_matrix_are_the_rows() {
        for k in [1, 96, 100, 230] {
            let x = Random::new(k as u64).normals(3 * k * k);
            let mut gram = vec![0.0; k * k];
            add_gram(Threads::new(2), &x, k, &mut gram);
            mirror(&mut gram, k);
            let mut r = gram.clone();
            reverse_cholesky(Threads::new(2), &mut r, k).unwrap();
            let b = Random::new(5).normals(7 * k);
            let mut z = b.clone();
            solve_rows(Threads::new(2), &r, k, &mut z);
            let mut back = vec![0.0; b.len()];
            gemm(Threads::new(1), 1.0, View::new(&z, k), View::new(&gram, k), 0.0, &mut back, k);
            assert!(b.iter().zip(&back).all(|(a, b)| (a - b).abs() < 1e-3), "{k}");
        }
    }

    #[test]
    fn a_singular_matrix_is_named_and_damping_heals_it() {
        let mut gram = vec![0.0; 9];
        gram[0] = 1.0;
        assert_eq!(reverse_cholesky(Threads::new(1), &mut gram.clone(), 3), Err(NotPositive { pivot: 2 }));
        let (factor, share) = damped_factor(Threads::new(1), &gram, 3, 0.01).unwrap();
        assert!(factor.iter().all(|v| v.is_finite()) && share >= 0.01);
        assert!(damped_factor(Threads::new(1), &[f32::NAN], 1, 0.01).is_none());
    }
}
