//! One module a subcommand.

pub mod bench;
pub mod calibration;
pub mod chat;
pub mod demo;
pub mod devices;
pub mod eval;
pub mod import;
pub mod inspect;
pub mod logits;
pub mod perplexity;
pub mod quantize;
pub mod run;
pub mod synth;
#[cfg(feature = "wgpu")]
pub mod tune;
#[cfg(not(feature = "wgpu"))]
#[path = "no_tune.rs"]
pub mod tune;
pub mod verify;
