//! Shared parts of the workspace tests.

pub mod constraints;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod decoder;
pub mod generated;
#[cfg(unix)]
pub mod hosts;
pub mod oracle;
pub mod runners;
