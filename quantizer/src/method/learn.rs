//! Learned rounding: placeholder options.
use awqua::quant::AffineMatrix;
use serde::{Deserialize, Serialize};

use crate::decoder::{Block, Decoder};

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

/// One block.
pub(crate) struct Problem<'a> {
    pub decoder: &'a Decoder,
    pub scaled: &'a Block,
    pub inputs: &'a [Vec<f32>],
    pub targets: &'a [Vec<f32>],
}

pub(crate) fn learn(
    _problem: &Problem<'_>,
    _options: &Options,
    _seed: u64,
    _block: &mut Block,
    _packed: &mut [Option<AffineMatrix>],
) {
}
