//! What the user says and hears: tokens, prompts, sampling, text.

pub mod sampler;
