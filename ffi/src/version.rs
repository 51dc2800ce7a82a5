//! The numbers of the ABI; `build.rs` reads the major one for the SONAME.

/// Raised when a function or structure changes incompatibly; part of the SONAME.
pub const AWQUA_ABI_MAJOR: u32 = 1;
/// Raised when functions or fields are appended.
pub const AWQUA_ABI_MINOR: u32 = 2;
