//! A large half-precision output layer rounded to 8 bits behind the weights, in parts that a tick can end between.

use memmap2::MmapMut;

use super::integer::rows::{LANES, Shape};
use super::kernels::Kernels;
use super::share::{processors, share_out};
use super::weights::{Weights, huge_pages};
use crate::error::Result;

/// Weights of a part, which takes less than a millisecond.
const PART: usize = 512 << 10;

/// A matrix on its way.
pub(super) struct Rounding {
    id: usize,
    shape: Shape,
    pages: MmapMut,
    /// Blocks that are done.
    done: usize,
}

impl Rounding {
    pub(super) fn new(id: usize, shape: Shape) -> Result<Self> {
        Ok(Self { id, shape, pages: huge_pages(shape.bytes(), "a matrix in 8 bits")?, done: 0 })
    }

    pub(super) fn id(&self) -> usize {
        self.id
    }

    /// Blocks of a part.
    fn part(&self) -> usize {
        (PART / (LANES * self.shape.k)).max(1)
    }

    /// Parts that are left.
    pub(super) fn left(&self) -> usize {
        (self.shape.blocks() - self.done).div_ceil(self.part())
    }

    /// Rounds at most `most` parts, several of them on threads for this time.
    pub(super) fn advance(&mut self, weights: &Weights, kernels: &dyn Kernels, most: usize) {
        let part = self.part();
        let end = self.shape.blocks().min(self.done.saturating_add(most.saturating_mul(part)));
        let bytes = self.shape.block_bytes();
        let parts =
            (self.done..end).step_by(part).zip(self.pages[self.done * bytes..end * bytes].chunks_mut(part * bytes));
        share_out(parts, processors(), |(first, bytes)| weights.round(self.id, *first, bytes, kernels));
        self.done = end;
    }

    /// The whole matrix.
    pub(super) fn finish(self) -> MmapMut {
        self.pages
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::super::integer::rows;
    use super::super::kernels::Portable;
    use super::super::weights::Partial;
    use super::*;
    use crate::tensor::{Bytes, DenseMatrix, DenseType, Offset, W4Matrix, Weight};

    #[test]
    fn parts_make_what_one_call_makes() {
        // The last block is not whole, nor is the last part.
        let (n, k) = (4485, 1024);
        let values: Vec<f16> = (0..n * k).map(|i| f16::from_f32(((i * 7919) % 4093) as f32 / 4093.0 - 0.5)).collect();
        let mut weights = Weights::default();
        // Only beside packed matrices is a head rounded.
        let w4 = W4Matrix {
            n: 16,
            k: 32,
            group_size: 32,
            qweight: vec![0; 64],
            group_params: vec![0; 16],
            offset: Offset::Zero,
        };
        let bytes = Bytes::owned(values.iter().flat_map(|v| v.to_le_bytes()).collect());
        let head = DenseMatrix::new(n, k, DenseType::F16, bytes).unwrap();
        for weight in [Weight::W4(w4), Weight::Dense(head)] {
            let (id, shape, mut partial) = (weights.reserve(), weight.shape(), Partial::Nothing);
            weights.push(&shape, &mut partial, weight).unwrap();
            weights.set(id, partial, &shape).unwrap();
        }
        let shape = weights.rounded_shape(1).unwrap();
        let mut expected = vec![0; shape.bytes().unwrap()];
        rows::round(&Portable, &shape, 0, &mut expected, |row, out| {
            out.iter_mut().zip(&values[row * k..]).for_each(|(out, v)| *out = v.to_f32());
        });
        for most in [1, 3, usize::MAX] {
            let mut rounding = Rounding::new(1, shape).unwrap();
            let mut calls = 0;
            while rounding.left() > 0 {
                rounding.advance(&weights, &Portable, most);
                calls += 1;
            }
            assert_eq!(calls, 9usize.div_ceil(most), "of {most} parts");
            assert!(rounding.finish()[..] == expected[..], "{most} parts at a time");
        }
    }
}
