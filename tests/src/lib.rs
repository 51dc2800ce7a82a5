//! Shared parts of the workspace tests.

pub mod generated;
#[cfg(unix)]
pub mod hosts;
pub mod oracle;
