//! Chooses the 4-bit codes of a floating-point checkpoint and writes them as a checkpoint that others read too.
//!
//! [`rtn`] rounds every weight to the nearest step, without calibration data. [`mod@write`] is the streaming writer of
//! checkpoint folders that everything here ends in. What the packed bits mean is [`awqua::quant`]'s business: a
//! format is written with the functions beside those that read it.

pub mod rtn;
pub mod write;

pub use rtn::{PackedModule, Progress, Report, Rest, RtnOptions, quantize_matrix, quantize_rtn};
