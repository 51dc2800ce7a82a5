//! What naga reflects from every composed kernel; generated into `catalogue/entries.rs` and compared by a test.
//!
//! `AWQUA_BLESS=1 cargo test -p awqua-shaders` rewrites the entries. All variants of a kernel have the same bindings
//! and workgroup size; the workgroup memory is that of the hungriest variant.

use crate::Field;

mod entries;
pub use entries::ENTRIES;

/// How a shader uses a binding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BindingKind {
    /// Uniform block.
    Uniform,
    /// Storage buffer, read only.
    StorageRead,
    /// Storage buffer, read and written.
    StorageReadWrite,
}

/// One binding of group 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Binding {
    /// Index in the group.
    pub index: u32,
    /// Variable name in WGSL.
    pub name: &'static str,
    /// Address space and access.
    pub kind: BindingKind,
    /// Smallest buffer size in bytes: the block, or one element of the runtime-sized array.
    pub min_size: u32,
}

/// What one kernel needs from a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Name of the kernel.
    pub name: &'static str,
    /// Bindings by index.
    pub bindings: &'static [Binding],
    /// Invocations of a workgroup in x, y, z.
    pub workgroup_size: [u32; 3],
    /// Bytes of workgroup memory.
    pub workgroup_memory: u32,
    /// Fields of the uniform at binding 0.
    pub params: &'static [Field],
}
