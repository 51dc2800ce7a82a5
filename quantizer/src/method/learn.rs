//! Learned rounding: placeholder options.
use serde::{Deserialize, Serialize};

/// How rounding is learned.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Steps of a block.
    pub steps: usize,
}

impl Options {
    /// What worked best for codes of `bits` bits.
    pub fn for_bits(_bits: u32) -> Self {
        Self { steps: 100 }
    }
}
