//! The calibration texts that come with the quantizer.
//!
//! All of it was written for this project, or is its own source code, and has its licence. Several domains, because a
//! model calibrated with one does worse in the others.

/// A kind of text.
#[derive(Debug, Clone, Copy)]
pub struct Domain {
    /// Short name.
    pub name: &'static str,
    /// The text.
    pub text: &'static str,
}

/// Every domain of the default set.
pub const DOMAINS: &[Domain] = &[
    Domain { name: "code-rust", text: include_str!("../../calibration/code-rust.txt") },
    Domain { name: "code-shaders", text: include_str!("../../calibration/code-shaders.txt") },
];
