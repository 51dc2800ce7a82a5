//! Twin of `penalize.wgsl`; the formula and the mapping are in its header.

use crate::*;

pub use crate::sample::Params;

/// Invocations of a workgroup.
pub const WG: u32 = 64;

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "penalize",
    body: include_str!("penalize.wgsl"),
    preludes: &[],
    constants: &[("WG", WG)],
    params: Params::FIELDS,
    trials: |_, _| Vec::new(),
};

/// Dispatch for the recent tokens; nothing to dispatch when there are none.
pub fn grid(params: &Params) -> [u32; 3] {
    [params.n_recent.div_ceil(WG), 1, 1]
}
