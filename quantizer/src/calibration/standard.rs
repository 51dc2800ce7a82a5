//! The calibration texts that come with the quantizer.
//!
//! All of it was written for this project, or is its own source code, and has its licence. Several domains, because a
//! model calibrated with one does worse in the others.

use awqua::{Error, ErrorKind, Result};

/// A kind of text.
#[derive(Debug, Clone, Copy)]
pub struct Domain {
    /// Short name.
    pub name: &'static str,
    /// The text.
    pub text: &'static str,
}

impl Domain {
    /// The domain of this name.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] listing the names.
    pub fn named(name: &str) -> Result<&'static Self> {
        DOMAINS.iter().find(|domain| domain.name == name).ok_or_else(|| {
            let names: Vec<&str> = DOMAINS.iter().map(|domain| domain.name).collect();
            let message = format!("no calibration domain `{name}`; there are {}", names.join(", "));
            Error::new(ErrorKind::InvalidInput, message)
        })
    }
}

/// Every domain of the default set.
pub const DOMAINS: &[Domain] = &[
    Domain { name: "prose-modern", text: include_str!("../../calibration/prose-modern.txt") },
    Domain { name: "prose-classic", text: include_str!("../../calibration/prose-classic.txt") },
    Domain { name: "encyclopedic", text: include_str!("../../calibration/encyclopedic.txt") },
    Domain { name: "technical", text: include_str!("../../calibration/technical.txt") },
    Domain { name: "dialogue", text: include_str!("../../calibration/dialogue.txt") },
    Domain { name: "instructions", text: include_str!("../../calibration/instructions.txt") },
    Domain { name: "code-mixed", text: include_str!("../../calibration/code-mixed.txt") },
    Domain { name: "code-rust", text: include_str!("../../calibration/code-rust.txt") },
    Domain { name: "code-shaders", text: include_str!("../../calibration/code-shaders.txt") },
    Domain { name: "data", text: include_str!("../../calibration/data.txt") },
    Domain { name: "languages", text: include_str!("../../calibration/languages.txt") },
];
