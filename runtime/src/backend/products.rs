//! Matrix products on a device for work that is no model's step, such as a quantizer's searches.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use crate::error::Result;

/// A device that multiplies with matrices it holds, in single precision.
pub trait Products: Send + Sync + fmt::Debug {
    /// Name of the device, for people.
    fn name(&self) -> String;

    /// Gives the row-major matrix `weights` (n, k) to the device.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`], or a device error.
    fn upload(&self, weights: &[f32], k: usize) -> Result<Resident>;

    /// What `weights` become when column `i` is multiplied by `scales[i]`, every group of a row is rounded to the codes
    /// that span it and 0, and the scaling is taken back.
    ///
    /// # Errors
    /// As [`Products::upload`]; [`crate::ErrorKind::InvalidInput`] if shapes do not fit.
    fn rounded(&self, weights: &Resident, scales: &[f32], grid: &RoundingGrid) -> Result<Resident>;

    /// Writes `x` (m, k) times the transpose of `weights` (n, k) to `out` (m, n).
    ///
    /// # Errors
    /// As [`Products::rounded`].
    fn multiply(&self, x: &[f32], weights: &Resident, out: &mut [f32]) -> Result<()>;

    /// Most bytes of matrices and work buffers that were on the device at once.
    fn peak_bytes(&self) -> u64;
}

/// A matrix on a device; gone there when the last clone is dropped.
#[derive(Clone)]
pub struct Resident {
    /// Rows.
    pub n: usize,
    /// Columns.
    pub k: usize,
    place: Arc<dyn Any + Send + Sync>,
}

impl Resident {
    /// A matrix of (n, k) that is held by `place`.
    pub fn new(n: usize, k: usize, place: Arc<dyn Any + Send + Sync>) -> Self {
        Self { n, k, place }
    }

    /// What holds it, known to the device that made it.
    pub fn place(&self) -> &(dyn Any + Send + Sync) {
        &*self.place
    }
}

impl fmt::Debug for Resident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {} on a device", self.n, self.k)
    }
}

/// How groups are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoundingGrid {
    /// Largest code.
    pub max_code: u32,
    /// Columns that share a step; divides the columns.
    pub group_size: usize,
    /// Whether the zero point is the middle of the codes.
    pub symmetric: bool,
}
