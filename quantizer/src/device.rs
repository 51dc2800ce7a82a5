//! A GPU beside the processor: it holds the matrices of the block in work and multiplies long runs of rows with them.
//!
//! Everything is computed the same without one. A device that fails is left alone from then on, and the work goes on
//! without it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use awqua::Error;
use awqua::backend::{Products, Resident, RoundingGrid};

use crate::grid::Grid;
use crate::math::Threads;

/// Multiplications and additions from which on a product pays for its way to the device and back.
const WORTHWHILE: usize = 1 << 28;

/// What computes.
#[derive(Debug, Clone)]
pub struct Compute {
    /// Threads of the processor.
    pub threads: Threads,
    /// What helps them.
    pub device: Option<Accelerator>,
}

impl From<Threads> for Compute {
    fn from(threads: Threads) -> Self {
        Self { threads, device: None }
    }
}

impl From<&Compute> for Compute {
    fn from(compute: &Compute) -> Self {
        compute.clone()
    }
}

/// A device, and whether it still works.
#[derive(Debug, Clone)]
pub struct Accelerator {
    products: Arc<dyn Products>,
    worthwhile: usize,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    failed: AtomicBool,
    reason: Mutex<Option<Error>>,
}

impl Accelerator {
    /// Computes on this device.
    pub fn new(products: Arc<dyn Products>) -> Self {
        Self { products, worthwhile: WORTHWHILE, state: Arc::default() }
    }

    /// Takes products of at least so many multiplications to the device.
    #[must_use]
    pub fn from_work(self, worthwhile: usize) -> Self {
        Self { worthwhile, ..self }
    }

    /// The device.
    pub fn products(&self) -> &dyn Products {
        &*self.products
    }

    /// Why the device is not used any more, once.
    pub fn take_failure(&self) -> Option<Error> {
        self.state.reason.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Whether `rows` rows times a matrix of (n, k) go to the device.
    pub(crate) fn takes(&self, rows: usize, n: usize, k: usize) -> bool {
        !self.state.failed.load(Ordering::Relaxed) && rows.saturating_mul(n).saturating_mul(k) >= self.worthwhile
    }

    /// A matrix on the device; `None` if it failed.
    pub(crate) fn upload(&self, weights: &[f32], k: usize) -> Option<Resident> {
        self.note(self.products.upload(weights, k))
    }

    /// As [`Products::rounded`]; `None` if the device failed.
    pub(crate) fn rounded(&self, weights: &Resident, scales: &[f32], grid: Grid) -> Option<Resident> {
        let rounding = RoundingGrid {
            max_code: grid.max_code() as u32,
            group_size: grid.group(weights.k),
            symmetric: grid.symmetric,
        };
        self.note(self.products.rounded(weights, scales, &rounding))
    }

    /// The product (m, n); `None` if the device failed.
    pub(crate) fn multiply(&self, x: &[f32], weights: &Resident) -> Option<Vec<f32>> {
        let mut out = vec![0.0; x.len() / weights.k * weights.n];
        self.note(self.products.multiply(x, weights, &mut out)).map(|()| out)
    }

    fn note<T>(&self, result: Result<T, Error>) -> Option<T> {
        result
            .map_err(|error| {
                if !self.state.failed.swap(true, Ordering::Relaxed) {
                    *self.state.reason.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                }
            })
            .ok()
    }
}
