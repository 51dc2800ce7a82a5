//! Dense f32 linear algebra of the quantizer: matrix products on all cores and the factorisation of Gram matrices.
//!
//! Results do not depend on the number of threads: work is split by rows of the result, whose sums stay whole.

mod cholesky;

pub(crate) use cholesky::damped_factor;
pub use cholesky::{NotPositive, reverse_cholesky, solve_rows};

/// How many threads a computation may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Threads(usize);

impl Threads {
    /// `n` threads; 0 counts as 1.
    pub fn new(n: usize) -> Self {
        Self(n.max(1))
    }

    /// As many as the machine offers.
    pub fn available() -> Self {
        Self::new(std::thread::available_parallelism().map_or(1, |n| n.get()))
    }

    /// The number.
    pub fn count(self) -> usize {
        self.0
    }

    /// Calls `work(first row, rows)` on disjoint runs of rows of `data`, `width` elements each.
    ///
    /// # Panics
    /// If `width` is 0 or does not divide the length of `data`.
    pub fn rows<T: Send>(self, data: &mut [T], width: usize, work: impl Fn(usize, &mut [T]) + Sync) {
        assert!(width > 0 && data.len().is_multiple_of(width), "rows of one width");
        let rows = data.len() / width;
        let each = rows.div_ceil(self.0).max(1);
        if each >= rows {
            return work(0, data);
        }
        std::thread::scope(|scope| {
            for (i, chunk) in data.chunks_mut(each * width).enumerate() {
                let work = &work;
                scope.spawn(move || work(i * each, chunk));
            }
        });
    }

    /// `work(i)` for every `i` below `n`, in order of `i`.
    pub fn map<T: Send>(self, n: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
        let mut results: Vec<Option<T>> = (0..n).map(|_| None).collect();
        if n > 0 {
            self.rows(&mut results, 1, |first, chunk| {
                for (i, slot) in chunk.iter_mut().enumerate() {
                    *slot = Some(work(first + i));
                }
            });
        }
        results.into_iter().flatten().collect()
    }
}

/// Runs `work`, compiled for the vector instructions of this processor where it has them.
///
/// Portable builds may use 128-bit vectors only; loops over weights are three times faster with 256. No operation is
/// fused or reordered, so results do not depend on the processor.
#[inline(always)]
pub(crate) fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn wide<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the feature that `wide` is compiled for.
            return unsafe { wide(work) };
        }
    }
    work()
}

/// A matrix somewhere in a slice: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// A row-major matrix of `cols` columns that fills `data`.
    ///
    /// # Panics
    /// If `cols` is 0 or does not divide the length of `data`.
    pub fn new(data: &'a [f32], cols: usize) -> Self {
        Self::strided(data, cols, cols)
    }

    /// The first `cols` columns of a row-major matrix of `stride` columns; the last row may end early.
    ///
    /// # Panics
    /// If `stride` is below `cols` or the last row is shorter than `cols`.
    pub fn strided(data: &'a [f32], cols: usize, stride: usize) -> Self {
        assert!(cols > 0 && stride >= cols, "a row has elements");
        let rows = data.len().div_ceil(stride);
        assert!(rows == 0 || data.len() >= (rows - 1) * stride + cols, "the last row is whole");
        Self { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// The transpose.
    #[must_use]
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            data: self.data,
        }
    }

    /// The first `n` rows.
    ///
    /// # Panics
    /// If there are fewer.
    #[must_use]
    pub fn rows(self, n: usize) -> Self {
        self.slice_rows(0, n)
    }

    /// Rows `first..first + n`.
    fn slice_rows(self, first: usize, n: usize) -> Self {
        assert!(first + n <= self.rows);
        Self { data: &self.data[(first * self.row_stride).min(self.data.len())..], rows: n, ..self }
    }
}

/// `c = alpha * a * b + beta * c`, where `c` is row-major with rows `stride` apart.
///
/// # Panics
/// If the shapes do not fit.
#[allow(clippy::too_many_arguments, reason = "the operands of a matrix product, in the order of BLAS")]
pub fn gemm(threads: Threads, alpha: f32, a: View<'_>, b: View<'_>, beta: f32, c: &mut [f32], stride: usize) {
    assert_eq!(a.cols, b.rows, "inner dimensions differ");
    if a.rows == 0 || b.cols == 0 {
        return;
    }
    assert!(stride >= b.cols && c.len() >= (a.rows - 1) * stride + b.cols, "the result does not fit");
    // A thread costs some ten microseconds; below a megaflop it is not worth one.
    let work = a.rows * b.cols * a.cols;
    let parts = threads.0.min(work.div_ceil(1 << 20)).min(a.rows.div_ceil(8)).max(1);
    let each = a.rows.div_ceil(parts);
    if parts == 1 {
        return product(alpha, a, b, beta, c, stride);
    }
    std::thread::scope(|scope| {
        for (i, c) in c.chunks_mut(each * stride).enumerate().take(a.rows.div_ceil(each)) {
            let a = a.slice_rows(i * each, each.min(a.rows - i * each));
            scope.spawn(move || product(alpha, a, b, beta, c, stride));
        }
    });
}

fn product(alpha: f32, a: View<'_>, b: View<'_>, beta: f32, c: &mut [f32], stride: usize) {
    let last = |v: &View<'_>| match v.rows == 0 || v.cols == 0 {
        true => 0,
        false => (v.rows - 1) * v.row_stride + (v.cols - 1) * v.col_stride + 1,
    };
    assert!(last(&a) <= a.data.len() && last(&b) <= b.data.len());
    assert!(c.len() >= (a.rows - 1) * stride + b.cols && stride >= b.cols && a.cols == b.rows);
    // SAFETY: the assertions keep the last element of every operand inside its slice, `c` is borrowed exclusively,
    // and its rows do not overlap because the stride is at least the number of columns.
    unsafe {
        matrixmultiply::sgemm(
            a.rows,
            a.cols,
            b.cols,
            alpha,
            a.data.as_ptr(),
            a.row_stride as isize,
            a.col_stride as isize,
            b.data.as_ptr(),
            b.row_stride as isize,
            b.col_stride as isize,
            beta,
            c.as_mut_ptr(),
            stride as isize,
            1,
        );
    }
}

/// `x` (m, k) times the transpose of `w` (n, k), the product of a linear layer: (m, n).
pub fn times_transposed(threads: Threads, x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let (m, n) = (x.len() / k, w.len() / k);
    let mut out = vec![0.0; m * n];
    gemm(threads, 1.0, View::new(x, k), View::new(w, k).t(), 0.0, &mut out, n);
    out
}

/// Adds the Gram matrix of the rows of `x` (m, k) to `gram` (k, k). Only the blocks on and above the diagonal are
/// computed; [`mirror`] fills in the rest.
pub fn add_gram(threads: Threads, x: &[f32], k: usize, gram: &mut [f32]) {
    const BLOCK: usize = 512;
    let m = x.len() / k;
    if m == 0 {
        return;
    }
    for first in (0..k).step_by(BLOCK) {
        let rows = BLOCK.min(k - first);
        let a = View::strided(&x[first..], rows, k);
        let b = View::strided(&x[first..], k - first, k);
        let c = &mut gram[first * k + first..];
        gemm(threads, 1.0, a.t(), b, 1.0, c, k);
    }
}

/// Copies the upper triangle of a (k, k) matrix to the lower one.
pub fn mirror(matrix: &mut [f32], k: usize) {
    const TILE: usize = 64;
    for i0 in (0..k).step_by(TILE) {
        for j0 in (i0..k).step_by(TILE) {
            for i in i0..k.min(i0 + TILE) {
                for j in j0.max(i + 1)..k.min(j0 + TILE) {
                    matrix[j * k + i] = matrix[i * k + j];
                }
            }
        }
    }
}

/// Sum of products, in eight interleaved partial sums.
#[inline]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a8, a1) = a.as_chunks::<8>();
    let (b8, b1) = b.as_chunks::<8>();
    let mut sums = [0.0f32; 8];
    for (a, b) in a8.iter().zip(b8) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + a1.iter().zip(b1).map(|(a, b)| a * b).sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn naive(a: View<'_>, b: View<'_>) -> Vec<f32> {
        let at = |v: &View<'_>, i: usize, j: usize| f64::from(v.data[i * v.row_stride + j * v.col_stride]);
        let mut c = Vec::new();
        for i in 0..a.rows {
            for j in 0..b.cols {
                c.push((0..a.cols).map(|l| at(&a, i, l) * at(&b, l, j)).sum::<f64>() as f32);
            }
        }
        c
    }

    #[test]
    fn products_agree_with_the_definition_and_with_any_number_of_threads() {
        let mut random = Random::new(1);
        for (m, n, k) in [(1, 1, 1), (3, 5, 7), (65, 33, 129), (128, 300, 64)] {
            let a = random.normals(m * k);
            let b = random.normals(n * k);
            let expected = naive(View::new(&a, k), View::new(&b, k).t());
            let one = times_transposed(Threads::new(1), &a, &b, k);
            assert!(one.iter().zip(&expected).all(|(x, y)| (x - y).abs() < 1e-3), "{m} {n} {k}");
            assert_eq!(one, times_transposed(Threads::new(3), &a, &b, k));
        }
    }

    #[test]
    fn the_gram_matrix_is_symmetric_and_accumulates() {
        let (m, k) = (37, 600);
        let x = Random::new(2).normals(m * k);
        let mut gram = vec![0.0; k * k];
        add_gram(Threads::new(2), &x[..20 * k], k, &mut gram);
        add_gram(Threads::new(2), &x[20 * k..], k, &mut gram);
        mirror(&mut gram, k);
        let expected = naive(View::new(&x, k).t(), View::new(&x, k));
        assert!(gram.iter().zip(&expected).all(|(x, y)| (x - y).abs() < 1e-2));
    }
}
