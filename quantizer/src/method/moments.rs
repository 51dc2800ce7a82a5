//! What is remembered of the activations that enter a linear module.

use crate::math::{Threads, add_gram};

/// Second moments of the inputs at one site.
#[derive(Debug, Clone)]
pub struct Moments {
    /// Features.
    pub k: usize,
    /// Tokens seen.
    pub tokens: usize,
    /// Features of a block of `gram`: `k` for the whole matrix, else only the blocks on the diagonal are kept.
    pub block: usize,
    /// Sums of products, (k / block, block, block); on and above the diagonal.
    pub gram: Vec<f32>,
}

impl Moments {
    /// Nothing seen yet. `block` divides `k`.
    ///
    /// # Panics
    /// If `block` is 0 or does not divide `k`.
    pub fn new(k: usize, block: usize) -> Self {
        assert!(block > 0 && k.is_multiple_of(block), "blocks divide the features");
        Self { k, tokens: 0, block, gram: vec![0.0; k * block] }
    }

    /// Adds rows of activations, (tokens, k).
    ///
    /// # Panics
    /// If `x` does not consist of whole rows.
    pub fn add(&mut self, threads: Threads, x: &[f32]) {
        let Self { k, block, .. } = *self;
        assert!(x.len().is_multiple_of(k), "rows are whole");
        self.tokens += x.len() / k;
        if block == k {
            return add_gram(threads, x, k, &mut self.gram);
        }
        threads.rows(&mut self.gram, block * block, |first, grams| {
            let mut part = vec![0.0; x.len() / k * block];
            for (i, gram) in grams.chunks_exact_mut(block * block).enumerate() {
                let at = (first + i) * block;
                for (part, row) in part.chunks_exact_mut(block).zip(x.chunks_exact(k)) {
                    part.copy_from_slice(&row[at..at + block]);
                }
                add_gram(Threads::new(1), &part, block, gram);
            }
        });
    }

    /// Mean square of feature `i`.
    pub fn mean_square(&self, i: usize) -> f32 {
        let (block, at) = (i / self.block, i % self.block);
        self.gram[block * self.block * self.block + at * self.block + at] / self.tokens.max(1) as f32
    }

    /// Mean products of features `first..first + n`, (n, n), both triangles.
    ///
    /// # Panics
    /// If the range crosses blocks.
    pub fn diagonal_block(&self, first: usize, n: usize) -> Vec<f32> {
        let (block, at) = (first / self.block, first % self.block);
        assert!(at + n <= self.block, "inside one block");
        let gram = &self.gram[block * self.block * self.block..][..self.block * self.block];
        let scale = 1.0 / self.tokens.max(1) as f32;
        let mut out = vec![0.0; n * n];
        for i in 0..n {
            for j in i..n {
                let value = gram[(at + i) * self.block + at + j] * scale;
                out[i * n + j] = value;
                out[j * n + i] = value;
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn diagonal_blocks_are_those_of_the_whole() {
        let x = Random::new(5).normals(40 * 32);
        let (mut whole, mut parts) = (Moments::new(32, 32), Moments::new(32, 8));
        for x in x.chunks(8 * 32) {
            whole.add(Threads::new(2), x);
            parts.add(Threads::new(3), x);
        }
        for first in [0, 8, 24] {
            let (a, b) = (whole.diagonal_block(first, 8), parts.diagonal_block(first, 8));
            assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5));
            let square = x.chunks(32).map(|row| row[first] * row[first]).sum::<f32>() / 40.0;
            assert!((whole.mean_square(first) - square).abs() < 1e-5 && (a[0] - square).abs() < 1e-5);
        }
    }
}
