//! Twin of `stage.wgsl`; the formula and the mapping are in its header.

use crate::staged::{self, Layout};
use crate::*;

/// Invocations of a workgroup: inputs of a chunk.
pub const WG: u32 = 32;

params! {
    /// Uniform at binding 0.
    Params {
        /// Inputs.
        k: u32,
        /// Elements of a row of x.
        x_stride: u32,
        /// First input column.
        x_offset: u32,
        /// Bit [`crate::FLAG_NORM`].
        flags: u32,
        /// [`crate::RowMode`].
        row_mode: u32,
        /// Quads of a staged row.
        quads: u32,
        /// Rows of a token.
        per_token: u32,
        /// Unused.
        pad: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "stage",
    body: include_str!("stage.wgsl"),
    preludes: &[Prelude::Step, Prelude::Elem, Prelude::Stage, Prelude::StageEight, Prelude::StageOut],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    crate::grid(params.k.div_ceil(WG), rows)
}

/// The inputs twice.
pub fn cost(params: &Params, rows: u32) -> Cost {
    let elements = u64::from(params.k) * u64::from(rows);
    Cost { bytes: trial::word_bytes(2 * elements), flops: 4 * elements }
}

/// (k, tokens, flags, row mode): a padded chunk, a padded quad, several rows.
pub fn cases() -> Vec<(u32, u32, u32, RowMode)> {
    vec![
        (8, 1, 0, RowMode::All),
        (72, 3, FLAG_NORM, RowMode::All),
        (4096, 1, FLAG_NORM, RowMode::All),
        (160, 5, 0, RowMode::Logits),
    ]
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (k, tokens, flags, row_mode) in cases() {
        let layout = Layout { k: k as usize, elem: variant.elem };
        let params = Params {
            k,
            x_stride: k + 5,
            x_offset: 3,
            flags,
            row_mode: row_mode as u32,
            quads: layout.quads() as u32,
            per_token: 1,
            pad: 0,
        };
        let step = Step { n_tokens: tokens, position: 0, logits_start: tokens / 2, logits_rows: tokens - tokens / 2 };
        let mut x = trial::poisoned((tokens * params.x_stride) as usize);
        for row in x.chunks_mut(params.x_stride as usize) {
            row[3..3 + k as usize].copy_from_slice(&rng.activations(k as usize));
        }
        let norm = staged::random_norm(k as usize, rng);
        let rows = row_mode.count(&step);
        let factors = (flags & FLAG_NORM != 0).then_some(norm.as_slice());
        let mut expected = Vec::new();
        for row in 0..rows {
            let at = (row_mode.input_row(&step, row) * params.x_stride + params.x_offset) as usize;
            expected.extend(layout.expected(4, row as usize, &x[at..at + k as usize], factors, 0.0));
        }
        trials.push(Trial {
            label: format!("{k} inputs, {tokens} tokens, flags {flags}, {row_mode:?}"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step,
            storage: vec![trial::words(&x), trial::words(&norm), layout.empty(rows as usize)],
            grid: grid(&params, rows),
            expected,
        });
    }
    trials
}
