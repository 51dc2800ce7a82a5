//! Twin of `sample.wgsl`; the formula and the mapping are in its header.

use crate::*;

/// Invocations of the workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0.
    Params {
        /// Scores in the row.
        vocab: u32,
        /// First score, in elements.
        offset: u32,
        /// Recent tokens.
        n_recent: u32,
        /// Candidates kept; 1 to [`crate::sample::MAX_TOP_K`].
        top_k: u32,
        /// Above 0.
        temperature: f32,
        /// Mass of the prefix kept; 1 keeps all.
        top_p: f32,
        /// Least probability relative to the first; 0 keeps all.
        min_p: f32,
        /// Uniform in [0, 1).
        uniform_number: f32,
        /// Repetition penalty; 1 changes nothing.
        repetition: f32,
        /// Presence penalty.
        presence: f32,
        /// Frequency penalty.
        frequency: f32,
        /// Unused.
        pad: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "sample",
    body: include_str!("sample.wgsl"),
    preludes: &[Prelude::Order],
    constants: &[("WG", WG)],
    params: Params::FIELDS,
    trials: |_, _| Vec::new(),
};

/// Most candidates that the kernels keep.
pub const MAX_TOP_K: u32 = WG;

/// Dispatch: one workgroup.
pub fn grid() -> [u32; 3] {
    [1, 1, 1]
}
