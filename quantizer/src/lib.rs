//! Turns models of other formats and precisions into checkpoints that Awqua and others run.
//!
//! [`import`] expands GGUF models to half precision. [`rtn`] chooses 4-bit codes by rounding every weight to the
//! nearest step, without calibration data. [`mod@write`] is the streaming writer of checkpoint folders that packing
//! ends in. What the packed bits mean is [`awqua::quant`]'s business: a format is written with the functions beside
//! those that read it.

pub mod calibration;
pub mod decoder;
pub mod device;
pub mod evaluate;
pub mod grid;
pub mod import;
pub mod math;
pub mod method;
pub mod mixed;
pub mod plot;
pub mod quantize;
pub mod random;
pub mod rtn;
pub mod synth;
pub mod write;

pub use rtn::{PackedModule, Progress, Report, Rest, RtnOptions, quantize_matrix, quantize_rtn};
