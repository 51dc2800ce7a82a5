//! A large half-precision output layer rounded to 8 bits behind the weights, in parts that a tick can end between.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use memmap2::MmapMut;

use super::integer::rows::{LANES, Shape};
use super::kernels::Kernels;
use super::weights::{Weights, huge_pages};
use crate::error::Result;

/// Weights of a part, which takes less than a millisecond.
const PART: usize = 512 << 10;
/// Most threads.
const THREADS: usize = 16;

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
        let parts: Vec<_> = (self.done..end)
            .step_by(part)
            .zip(self.pages[self.done * bytes..end * bytes].chunks_mut(part * bytes))
            .map(Mutex::new)
            .collect();
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some(part) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
                let (first, bytes) = &mut *part.lock().unwrap_or_else(PoisonError::into_inner);
                weights.round(self.id, *first, bytes, kernels);
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS).min(parts.len());
        std::thread::scope(|scope| {
            for _ in 1..threads {
                // What a thread that the system refuses would have done, the others do.
                let _ = std::thread::Builder::new().spawn_scoped(scope, work);
            }
            work();
        });
        self.done = end;
    }

    /// The whole matrix.
    pub(super) fn finish(self) -> MmapMut {
        self.pages
    }
}
