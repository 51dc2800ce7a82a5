//! How codes are chosen: from the weights of a block and what flows into them, steps and codes of every matrix.
//!
//! A method is a combination of three: [`scale`] moves range between channels before anything is rounded (AWQ),
//! [`clip`] and [`gptq`] choose steps and codes of one matrix against the second moments of its input, and [`learn`]
//! moves the codes of a whole block towards the block's own output.

use serde::{Deserialize, Serialize};

use crate::quantize::tune;

pub(crate) mod adam;
pub mod clip;
pub mod correct;
pub mod gptq;
pub mod learn;
mod moments;
pub mod refit;
pub mod scale;
pub mod weigh;

pub use moments::Moments;

/// Which parts of the machinery choose the codes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// Search activation-aware scales and fold them into the operation before (AWQ).
    pub scale: bool,
    /// Search a narrower range of every group.
    pub clip: bool,
    /// Compensate the error of every column in the columns after it (GPTQ).
    pub compensate: Option<gptq::Options>,
    /// Make up for what earlier rounding did to the inputs, before compensation.
    #[serde(default)]
    pub correct: Option<correct::Options>,
    /// Learn rounding and ranges of a block against its output.
    pub learn: Option<learn::Options>,
    /// Tune scales, norms and biases of the packed model end to end.
    #[serde(default)]
    pub tune: Option<tune::Options>,
}

impl Recipe {
    /// Whether it looks at calibration tokens.
    pub fn uses_tokens(&self) -> bool {
        self.scale || self.clip || self.compensate.is_some() || self.learn.is_some() || self.tune.is_some()
    }

    /// Whether it follows the unquantized model beside the quantized one.
    pub fn follows_exact(&self) -> bool {
        self.correct.is_some() || self.learn.is_some()
    }
}

/// A recipe by the name users know it by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Round to nearest, without calibration data.
    Rtn,
    /// Activation-aware scales and clipping (Lin et al. 2023).
    Awq,
    /// Error compensation with second moments (Frantar et al. 2022).
    Gptq,
    /// AWQ's scales and clipping, then GPTQ's compensation.
    AwqGptq,
    /// `AwqGptq`, then learned rounding of the family of AutoRound (Cheng et al. 2023).
    Learned,
    /// `AwqGptq` with weights corrected for what earlier rounding did to their inputs (QEP, Arai and Ichikawa 2025).
    Qep,
    /// `Qep`, then scales, norms and biases trained end to end.
    Tuned,
    /// `Awq`, then the same in one pass over the calibration.
    AwqTuned,
}

impl Method {
    /// The parts this method is made of, for codes of `bits` bits.
    pub fn recipe(self, bits: u32) -> Recipe {
        let compensate = Some(gptq::Options::default());
        let none = Recipe { scale: false, clip: false, compensate: None, correct: None, learn: None, tune: None };
        match self {
            Self::Rtn => none,
            Self::Awq => Recipe { scale: true, clip: true, ..none },
            Self::Gptq => Recipe { compensate, ..none },
            Self::AwqGptq => Recipe { scale: true, clip: true, compensate, ..none },
            Self::Learned => {
                Recipe { scale: true, clip: true, compensate, learn: Some(learn::Options::for_bits(bits)), ..none }
            }
            Self::Qep => Recipe { correct: Some(correct::Options::default()), ..Self::AwqGptq.recipe(bits) },
            Self::Tuned => Recipe { tune: Some(tune::Options::for_bits(bits)), ..Self::Qep.recipe(bits) },
            Self::AwqTuned => {
                let tune = Some(tune::Options { epochs: 1.0, ..tune::Options::for_bits(bits) });
                Recipe { tune, ..Self::Awq.recipe(bits) }
            }
        }
    }

    /// Name as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rtn => "rtn",
            Self::Awq => "awq",
            Self::Gptq => "gptq",
            Self::AwqGptq => "awq-gptq",
            Self::Learned => "learned",
            Self::Qep => "qep",
            Self::Tuned => "tuned",
            Self::AwqTuned => "awq-tuned",
        }
    }
}
