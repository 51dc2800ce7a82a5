//! Awqua runs packed 4-bit language models inside another program: on any GPU through WGSL, or on the CPU.
//!
//! A [`Model`] is a checkpoint folder loaded onto a device; a [`Session`] is one conversation with it:
//!
//! ```no_run
//! use std::ops::ControlFlow;
//! use awqua::{GenerateOptions, LoadOptions, Model, Session, SessionOptions};
//!
//! let model = Model::open("SmolLM2-135M-Instruct-AWQ", &LoadOptions::default())?;
//! let mut session = Session::new(&model, &SessionOptions::default())?;
//! let prompt = model.tokenizer()?.encode("The capital of France is", true)?;
//! session.generate(&prompt, &GenerateOptions::default(), &mut |text| {
//!     print!("{text}");
//!     ControlFlow::Continue(())
//! })?;
//! # Ok::<(), awqua::Error>(())
//! ```
//!
//! # Code map
//!
//! Five rooms, each answering one question; data flows from the first to the last.
//!
//! | module | question |
//! |---|---|
//! | [`checkpoint`] | which bytes? Files on disk as validated views of tensors; knows no device |
//! | [`quant`] | what do the bits mean? Every dialect to and from one canonical 4-bit form |
//! | [`model`] | what is computed? A configuration turned into a [`backend::Program`]; knows no file format |
//! | [`backend`] | who computes it? CPU and wgpu; the only room that sees a device |
//! | [`session`] | what does the user say and hear? Prompts, KV cache, sampling, text |
//!
//! The kernels themselves live in the crate `awqua-shaders`, which knows no device API.
//!
//! Invariants: no global state and no global thread pool; library code never prints, exits or opens a network
//! connection; hostile files are errors, never panics; what is unsupported is refused when the model is opened.

pub mod backend;
pub mod checkpoint;
mod checksum;
pub mod engine;
mod error;
pub mod model;
mod processors;
pub mod quant;
pub mod session;
pub mod tensor;

pub use engine::{BackendChoice, DeviceChoice, Engine, EngineOptions};
pub use error::{Error, ErrorKind, Result};
pub use model::{Estimate, HeadBits, Load, LoadBudget, LoadOptions, LoadProgress, LoadStage, Model, ModelConfig};
pub use session::sampler::Sampling;
pub use session::{Batch, CancelToken, GenerateOptions, Generation, Grammar, Session, SessionOptions, StopReason};
