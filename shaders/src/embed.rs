//! Twin of `embed.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
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
        /// Factor on the elements.
        scale: f32,
        /// Unused.
        pad: [u32; 2],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "embed",
    body: include_str!("embed.wgsl"),
    preludes: &[Prelude::Step, Prelude::Dense],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` tokens.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    [params.width.div_ceil(WG), 1, rows]
}

/// Copies the rows of the tokens, times the scale, that this part of the table holds, with the bindings of the kernel in order.
pub fn reference(params: &Params, step: &Step, dense: Dense, tokens: &[u32], table: &[u32], out: &mut [f32]) {
    for (t, &token) in tokens.iter().take(step.n_tokens as usize).enumerate() {
        let Some(row) = token.checked_sub(params.first_row).filter(|&row| row < params.n_rows) else { continue };
        let words = &table[(row * params.row_words) as usize..];
        for i in 0..params.width as usize {
            out[t * params.out_stride as usize + i] = params.scale * dense.element(words, i);
        }
    }
}

/// A table row in the smaller precision and an output row a token.
pub fn cost(params: &Params, rows: u32) -> Cost {
    Cost { bytes: trial::word_bytes(u64::from(rows) * u64::from(params.row_words + params.width)), flops: 0 }
}

/// (width, first_row, n_rows, tokens): odd and wide rows, parts that hold some or none of the tokens.
pub fn cases() -> Vec<(u32, u32, u32, u32)> {
    vec![(1, 0, 1, 1), (33, 0, 50, 4), (600, 20, 10, 7), (8, 50, 7, 3)]
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (i, (width, first_row, n_rows, n_tokens)) in cases().into_iter().enumerate() {
        let row_words = width.div_ceil(variant.dense.per_word());
        let scale = if i % 2 == 0 { 1.0 } else { 8.5 };
        let params = Params { width, row_words, first_row, n_rows, out_stride: width + 1, scale, pad: [0; 2] };
        let step = Step { n_tokens, ..Step::default() };
        let tokens: Vec<u32> = (0..n_tokens).map(|_| rng.below(first_row + n_rows + 5)).collect();
        // Clears the top exponent bit of both halves, so that no element is a NaN of which bits may change.
        let table: Vec<u32> = (0..n_rows * row_words).map(|_| rng.next_u32() & 0xbfff_bfff).collect();
        let mut out = trial::poisoned((n_tokens * params.out_stride) as usize);
        let storage = vec![tokens.clone(), table.clone(), trial::words(&out)];
        reference(&params, &step, variant.dense, &tokens, &table, &mut out);
        // Subnormal numbers may become zero on a device.
        let tolerance = out.iter().map(|v| 1e-36 + 1e-7 * if v.is_nan() { 0.0 } else { v.abs() }).collect();
        trials.push(Trial {
            label: format!("width {width}, rows {first_row} + {n_rows}, {n_tokens} tokens"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step,
            storage,
            grid: grid(&params, n_tokens),
            expected: vec![Expected::close(4, out, tolerance)],
        });
    }
    trials
}
