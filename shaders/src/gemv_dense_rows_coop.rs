//! Twin of `gemv_dense_rows_coop.wgsl`; the formula and the mapping are in its header.

use crate::gemv_dense::{self, Case};
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;
/// Rows of a workgroup.
pub const ROWS: u32 = 16;
/// Outputs of a workgroup.
pub const WIDTH: u32 = 32;

params! {
    /// Uniform at binding 0.
    Params {
        /// As in [`gemv_dense::Params`].
        n: u32,
        /// Inputs; a multiple of 8.
        k: u32,
        /// As in [`gemv_dense::Params`].
        row_words: u32,
        /// Chunks of 32 inputs, the last one padded with zeros in x.
        chunks: u32,
        /// As in [`gemv_dense::Params`], as are the following.
        out_stride: u32,
        /// First output column of this part.
        out_offset: u32,
        /// First element of the bias of these outputs.
        bias_offset: u32,
        /// Bits [`crate::FLAG_ACCUMULATE`], [`crate::FLAG_BIAS`].
        flags: u32,
        /// [`crate::RowMode`].
        row_mode: u32,
        /// Unused.
        pad: [u32; 3],
    }
}

impl Params {
    /// For the product that these describe to [`gemv_dense`].
    pub fn of(plain: &gemv_dense::Params) -> Self {
        Self {
            n: plain.n,
            k: plain.k,
            row_words: plain.row_words,
            chunks: plain.k.div_ceil(32),
            out_stride: plain.out_stride,
            out_offset: plain.out_offset,
            bias_offset: plain.bias_offset,
            flags: plain.flags,
            row_mode: plain.row_mode,
            pad: [0; 3],
        }
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemv_dense_rows_coop",
    body: include_str!("gemv_dense_rows_coop.wgsl"),
    preludes: &[Prelude::Step, Prelude::Coop, Prelude::CoopRows],
    constants: &[("WG", WG), ("ROWS", ROWS)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Whether the kernel takes so many inputs in half precision.
pub fn handles(dense: Dense, k: u32) -> bool {
    dense == Dense::F16 && k.is_multiple_of(8)
}

/// Dispatch for `rows` input rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    crate::grid(params.n.div_ceil(WIDTH) * rows.div_ceil(ROWS), 1)
}

/// As [`gemv_dense::cost`].
pub fn cost(params: &Params, rows: u32) -> Cost {
    let Params { n, k, row_words, .. } = *params;
    gemv_dense::cost(&gemv_dense::Params { n, k, row_words, ..Default::default() }, rows)
}

/// Ragged outputs and rows, a padded chunk, an odd number of chunks, more chunks than subgroups, all flags and row modes.
pub fn cases() -> Vec<Case> {
    let case = |n, k, tokens, row_mode, flags| Case { n, k, tokens, row_mode, flags };
    vec![
        case(1, 8, 1, RowMode::All, 0),
        case(40, 104, 8, RowMode::All, FLAG_BIAS),
        case(32, 1024, 13, RowMode::Compacted, FLAG_ACCUMULATE),
        case(70, 640, 35, RowMode::Logits, FLAG_ACCUMULATE | FLAG_BIAS),
        case(33, 1568, 16, RowMode::All, 0),
    ]
}

/// Largest error of a number from -1 to 1 in half precision, relative and absolute.
const HALF: [f32; 2] = [4.9e-4, 3e-8];

fn trial(case: Case, rng: &mut Rng) -> Trial {
    let mut trial = gemv_dense::trial(case, Dense::F16, |_, _| [0; 3], rng);
    let rows = case.row_mode.count(&trial.step);
    let plain: gemv_dense::Params = bytemuck::pod_read_unaligned(&trial.params);
    let row = |row| {
        let at = (case.row_mode.input_row(&trial.step, row) * plain.x_stride) as usize;
        trial.storage[0][at..at + case.k as usize].iter().map(|w| f32::from_bits(*w)).collect()
    };
    let x: Vec<Vec<f32>> = (0..rows).map(row).collect();
    let (halves, scales) = halve::prepared(&x, rows.next_multiple_of(ROWS) as usize);
    for (row, (x, scale)) in x.iter().zip(&scales).enumerate() {
        for n in 0..plain.n as usize {
            let weights = &trial.storage[1][n * plain.row_words as usize..];
            let error = x.iter().enumerate().map(|(k, x)| {
                let weight = Dense::F16.element(weights, k).abs();
                weight * (HALF[0] * x.abs()).max(HALF[1] * scale)
            });
            let at = row * plain.out_stride as usize + plain.out_offset as usize + n;
            trial.expected[0].tolerance[at] += error.sum::<f32>();
        }
    }
    let params = Params::of(&plain);
    trial.params = bytemuck::bytes_of(&params).to_vec();
    trial.grid = grid(&params, rows);
    trial.storage[0] = halves;
    trial.storage.push(trial::words(&scales));
    trial
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    cases().into_iter().map(|case| trial(case, rng)).collect()
}
