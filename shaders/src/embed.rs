//! Twin of `embed.wgsl`; the formula and the mapping are in its header.

use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0.
    Params {
        /// Elements of a table row.
        width: u32,
        /// Words of a table row.
        row_words: u32,
        /// First table row of this part.
        first_row: u32,
        /// Table rows of this part.
        n_rows: u32,
        /// Elements of a row of out.
        out_stride: u32,
        /// Unused.
        pad: [u32; 3],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "embed",
    body: include_str!("embed.wgsl"),
    preludes: &[Prelude::Step, Prelude::Dense],
    constants: &[("WG", WG)],
    params: Params::FIELDS,
    trials: |_, _| Vec::new(),
};

/// Dispatch for `rows` tokens.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    [params.width.div_ceil(WG), 1, rows]
}
