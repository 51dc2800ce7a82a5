//! Twin of `halve.wgsl`; the formula and the mapping are in its header.

use crate::trial::{Expected, Values};
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0.
    Params {
        /// Inputs; a multiple of 8.
        k: u32,
        /// Chunks of 32 inputs of a row of the output, the last one padded.
        chunks: u32,
        /// Elements of a row of x; a multiple of 4.
        x_stride: u32,
        /// [`crate::RowMode`].
        row_mode: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "halve",
    body: include_str!("halve.wgsl"),
    preludes: &[Prelude::Step, Prelude::Halve],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` rows.
pub fn grid(_params: &Params, rows: u32) -> [u32; 3] {
    [1, 1, rows]
}

/// A row as (halves in the order of the output with padding, scale).
pub fn reference(x: &[f32]) -> (Vec<f32>, f32) {
    let scale = x.iter().fold(1.2e-38_f32, |m, v| m.max(v.abs()));
    let mut halves = vec![0.0; x.len().next_multiple_of(32)];
    for (i, value) in x.iter().enumerate() {
        halves[i / 8 * 8 + i % 4 * 2 + i % 8 / 4] = value / scale;
    }
    (halves, scale)
}

/// What the kernel leaves of these rows: words with `padded` rows, of which those that pad hold NaN, and scales.
pub(crate) fn prepared(rows: &[Vec<f32>], padded: usize) -> (Vec<u32>, Vec<f32>) {
    let chunks = rows.first().map_or(0, |row| row.len().div_ceil(32));
    let (halves, scales): (Vec<_>, Vec<_>) = rows.iter().map(|row| reference(row)).unzip();
    let mut words: Vec<u32> = halves.iter().flat_map(|row| trial::pack_halves(row)).collect();
    words.resize(padded * chunks * 16, trial::POISON_F16);
    (words, scales)
}

/// A buffer for the halves of rows like these.
pub(crate) fn empty(rows: &[Vec<f32>]) -> Vec<u32> {
    vec![trial::POISON_F16; rows.iter().map(|row| row.len().next_multiple_of(32) / 2).sum()]
}

/// What bindings `binding`, the halves, and the one behind it, the scales, hold of these rows: halves of rows, each of
/// which is then multiplied with its factor; inputs are off by `error` of the largest at most.
pub(crate) fn expected(binding: u32, rows: &[Vec<f32>], factors: &[f32], error: f32) -> Vec<Expected> {
    let (mut halves, mut scales) = (Vec::new(), Vec::new());
    for (row, factor) in rows.iter().zip(factors) {
        let (row_halves, scale) = reference(row);
        halves.extend(row_halves);
        scales.push(scale * factor);
    }
    let tolerance = halves.iter().map(|v| 1e-3 * v.abs() + 2.0 * error + 1e-7).collect();
    let halves = Expected { values: Values::F16(halves), ..Expected::close(binding, Vec::new(), tolerance) };
    vec![halves, Expected::near(binding + 1, scales, error + 1e-6)]
}

/// x once, the halves once.
pub fn cost(params: &Params, rows: u32) -> Cost {
    let elements = u64::from(params.k) * u64::from(rows);
    Cost { bytes: 6 * elements, flops: 2 * elements }
}

/// (k, tokens, row mode): a padded chunk, several rows, zeros.
pub fn cases() -> Vec<(u32, u32, RowMode)> {
    vec![(8, 1, RowMode::All), (72, 3, RowMode::All), (4096, 2, RowMode::Compacted), (160, 5, RowMode::Logits)]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (k, tokens, row_mode) in cases() {
        let chunks = k.div_ceil(32);
        let params = Params { k, chunks, x_stride: k + 4, row_mode: row_mode as u32 };
        let step = Step { n_tokens: tokens, position: 0, logits_start: tokens / 2, logits_rows: tokens - tokens / 2 };
        let mut x = trial::poisoned((tokens * params.x_stride) as usize);
        for (token, row) in x.chunks_mut(params.x_stride as usize).enumerate() {
            // The last row is zeros.
            let values = if token + 1 == tokens as usize { vec![0.0; k as usize] } else { rng.activations(k as usize) };
            row[..k as usize].copy_from_slice(&values);
        }
        let rows = row_mode.count(&step);
        let inputs: Vec<Vec<f32>> = (0..rows)
            .map(|row| {
                let at = (row_mode.input_row(&step, row) * params.x_stride) as usize;
                x[at..at + k as usize].to_vec()
            })
            .collect();
        trials.push(Trial {
            label: format!("{k} inputs, {tokens} tokens, {row_mode:?}"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step,
            storage: vec![trial::words(&x), empty(&inputs), trial::words(&trial::poisoned(rows as usize))],
            grid: grid(&params, rows),
            expected: expected(3, &inputs, &vec![1.0; inputs.len()], 0.0),
        });
    }
    trials
}
