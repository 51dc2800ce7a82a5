//! Turns models of other formats and precisions into checkpoints that Awqua runs.

pub mod import;
