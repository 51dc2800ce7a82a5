//! Shared parts of the workspace tests.

pub mod generated;
pub mod oracle;
