//! Twin of `embed_packed.wgsl`; the formula and the mapping are in its header.

use crate::packed::{self, Matrix};
use crate::trial::Expected;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 64;

params! {
    /// Uniform at binding 0.
    Params {
        /// Table rows of this part.
        n: u32,
        /// Elements of a table row.
        k: u32,
        /// [`Packed::row_words`].
        row_words: u32,
        /// Elements of a group: a multiple of 8, or at least `k`. Blocks have none.
        group_size: u32,
        /// Groups of a row.
        groups: u32,
        /// First table row of this part.
        first_row: u32,
        /// Elements of a row of out.
        out_stride: u32,
        /// Bits [`crate::FLAG_OFFSET_IS_BIAS`], [`crate::FLAG_WIDE`], [`crate::FLAG_BF16`],
        /// [`crate::FLAG_ROUND_PRODUCTS`].
        flags: u32,
        /// Factor on the elements.
        scale: f32,
        /// Unused.
        pad: [u32; 3],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "embed_packed",
    body: include_str!("embed_packed.wgsl"),
    preludes: &[Prelude::Step, Prelude::Weights8, Prelude::Packed],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` tokens.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    [params.k.div_ceil(8).div_ceil(WG), 1, rows]
}

/// Expands the rows of the tokens that this part of the table holds.
pub fn reference(params: &Params, step: &Step, matrix: &Matrix, tokens: &[u32], out: &mut [f32]) {
    for (t, &token) in tokens.iter().take(step.n_tokens as usize).enumerate() {
        let Some(row) = token.checked_sub(params.first_row).filter(|&row| row < params.n) else { continue };
        for k in 0..params.k as usize {
            out[t * params.out_stride as usize + k] = params.scale * matrix.weight(row as usize, k);
        }
    }
}

/// A packed table row and an output row a token.
pub fn cost(params: &Params, rows: u32) -> Cost {
    let words = params.row_words + params.groups + params.k;
    Cost { bytes: trial::word_bytes(u64::from(rows) * u64::from(words)), flops: 0 }
}

/// (k, group size, first row, rows, tokens, flags): odd and wide rows, parts that hold some or none of the tokens.
pub fn cases() -> Vec<(u32, u32, u32, u32, u32, u32)> {
    vec![
        (8, 8, 0, 1, 1, 0),
        (33, 40, 0, 50, 4, FLAG_WIDE),
        (600, 120, 20, 40, 7, FLAG_OFFSET_IS_BIAS),
        (1024, 64, 50, 7, 3, 0),
    ]
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (k, group_size, first_row, n, n_tokens, flags) in cases() {
        if !packed::fits(variant.packed, k, group_size) {
            continue;
        }
        let matrix = Matrix::random(variant.packed, (n as usize, k as usize, group_size as usize), flags, rng);
        let params = Params {
            n,
            k,
            row_words: variant.packed.row_words(k as usize) as u32,
            group_size,
            groups: matrix.groups() as u32,
            first_row,
            out_stride: k + 1,
            flags: matrix.flags,
            scale: 1.0 + k as f32 / 1000.0,
            pad: [0; 3],
        };
        let step = Step { n_tokens, ..Step::default() };
        let tokens: Vec<u32> = (0..n_tokens).map(|_| rng.below(first_row + n + 5)).collect();
        let mut out = trial::poisoned((n_tokens * params.out_stride) as usize);
        let numbers = if matrix.params.is_empty() { vec![0; 4] } else { matrix.params.clone() };
        let storage = vec![tokens.clone(), matrix.codes.clone(), numbers, trial::words(&out)];
        reference(&params, &step, &matrix, &tokens, &mut out);
        // Weights are some tenths; sums of a product and an offset lose the last bits, and the twin of w4 rounds.
        let absolute = if variant.packed == Packed::W4 { 1e-3 } else { 1e-6 };
        let tolerance = vec![absolute; out.len()];
        trials.push(Trial {
            label: format!("{n} x {k} from row {first_row}, {n_tokens} tokens"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step,
            storage,
            grid: grid(&params, n_tokens),
            expected: vec![Expected::close(5, out, tolerance)],
        });
    }
    trials
}
