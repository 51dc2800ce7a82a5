//! Twin of `gemm_w4_coop.wgsl`; the formula and the mapping are in its header.

use crate::gemm_w4::Case;
use crate::*;

pub use crate::gemm_w4::{Params, cost};

/// Invocations of a workgroup.
pub const WG: u32 = 256;
/// Rows and outputs of a workgroup; rows of x are padded to a multiple of it.
pub const TILE: u32 = 128;
/// Bytes of workgroup memory.
pub const MEMORY: u32 = 48 << 10;

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemm_w4_coop",
    body: include_str!("gemm_w4_coop.wgsl"),
    preludes: &[Prelude::Step, Prelude::W4, Prelude::Coop, Prelude::CoopWeights],
    constants: &[("WG", WG), ("TILE", TILE)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Whether the kernel takes groups of this size: whole chunks.
pub fn handles(group_size: u32, k: u32) -> bool {
    group_size.is_multiple_of(32) || group_size == k
}

/// Dispatch for `rows` input rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    [params.n.div_ceil(TILE), 1, rows.div_ceil(TILE)]
}

/// Ragged tiles in every direction, a padded chunk, all flags.
pub fn cases() -> Vec<Case> {
    let all = RowMode::All;
    let case = |n, k, group_size, tokens, row_mode, flags| Case { n, k, group_size, tokens, row_mode, flags };
    vec![
        case(128, 128, 32, 128, all, FLAG_BIAS),
        case(1, 40, 40, 3, all, 0),
        case(200, 384, 128, 70, all, FLAG_ACCUMULATE | FLAG_SUMS),
        case(33, 256, 64, 150, RowMode::Compacted, FLAG_OFFSET_IS_BIAS | FLAG_BIAS),
        case(260, 512, 512, 40, RowMode::Logits, FLAG_ACCUMULATE),
    ]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let one = |case: Case, rng: &mut Rng| {
        let mut trial = crate::gemm_w4::trial(case, grid, true, rng);
        // The inputs as the kernel before leaves them.
        let rows = case.row_mode.count(&trial.step);
        let x_stride = case.k + 4;
        let row = |row| {
            let at = (case.row_mode.input_row(&trial.step, row) * x_stride) as usize;
            trial.storage[0][at..at + case.k as usize].iter().map(|w| f32::from_bits(*w)).collect()
        };
        let x: Vec<Vec<f32>> = (0..rows).map(row).collect();
        let (halves, scales) = halve::prepared(&x, rows.next_multiple_of(TILE) as usize);
        trial.storage[0] = halves;
        trial.storage.push(trial::words(&scales));
        trial
    };
    cases().into_iter().map(|case| one(case, rng)).collect()
}
