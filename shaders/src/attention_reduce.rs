//! Twin of `attention_reduce.wgsl`; the formula and the mapping are in its header.

use crate::staged::Layout;
use crate::trial::Expected;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0.
    Params {
        /// Query heads.
        heads: u32,
        /// Elements of a head.
        head_dim: u32,
        /// Elements of a row of out.
        out_stride: u32,
        /// As in [`crate::attention::Params`].
        window: u32,
        /// As in [`crate::attention::Params`].
        splits_max: u32,
        /// As in [`crate::attention::Params`].
        split_len: u32,
        /// Bits [`crate::FLAG_STAGE`], [`crate::FLAG_EACH`], [`crate::FLAG_WHOLE`].
        flags: u32,
        /// Quads of a staged row.
        stage_quads: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "attention_reduce",
    body: include_str!("attention_reduce.wgsl"),
    preludes: &[Prelude::Step, Prelude::Window, Prelude::Elem, Prelude::Stage, Prelude::StageEight, Prelude::StageOut],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` tokens.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    [(params.heads * params.head_dim).div_ceil(32), 1, rows]
}

/// Exponentials and sums of a few partial results in single precision, relative to the largest output.
const TOLERANCE: f32 = 1e-5;

/// Combines the partial results in f64, with the bindings of the kernel in order.
pub fn reference(params: &Params, step: &Step, partial_out: &[f32], partial_ml: &[[f32; 2]], out: &mut [f32]) {
    let dim = params.head_dim as usize;
    for token in 0..step.n_tokens {
        let (first, last) = crate::attention::visible(params.window, step.position + token);
        let splits = (last / params.split_len - first / params.split_len + 1).min(params.splits_max) as usize;
        for head in 0..params.heads {
            let row = ((token * params.heads + head) * params.splits_max) as usize;
            let ml = &partial_ml[row..row + splits];
            let largest = ml.iter().map(|ml| ml[0]).fold(f32::NEG_INFINITY, f32::max);
            let factors: Vec<f64> = ml.iter().map(|ml| (f64::from(ml[0]) - f64::from(largest)).exp()).collect();
            let sum: f64 = ml.iter().zip(&factors).map(|(ml, f)| f64::from(ml[1]) * f).sum();
            for d in 0..dim {
                let value: f64 =
                    factors.iter().enumerate().map(|(s, f)| f * f64::from(partial_out[(row + s) * dim + d])).sum();
                out[(token * params.out_stride + head * params.head_dim) as usize + d] = (value / sum) as f32;
            }
        }
    }
}

/// The partial results of `splits` splits once.
pub fn cost(params: &Params, splits: u32, rows: u32) -> Cost {
    let elements = u64::from(params.heads) * u64::from(params.head_dim) * u64::from(splits) * u64::from(rows);
    Cost { bytes: trial::word_bytes(elements), flops: 2 * elements }
}

/// (heads, head_dim, position, tokens, window, split_len): one and many splits, a window. From `OF_ONE` on, tokens are
/// of different sessions at positions up to this one; in the last case of either kind, those of one split are left alone.
pub fn cases() -> Vec<[u32; 6]> {
    vec![
        [1, 2, 0, 1, 0, 64],
        [3, 128, 200, 2, 0, 32],
        [2, 80, 90, 3, 0, 512],
        [2, 64, 300, 1, 70, 32],
        [2, 64, 126, 4, 0, 128],
        [3, 64, 400, 5, 0, 32],
        [2, 32, 400, 5, 70, 32],
        [2, 64, 60, 6, 0, 32],
    ]
}

/// How many of [`cases`] are of one session.
const OF_ONE: usize = 5;

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (i, [heads, head_dim, position, n_tokens, window, split_len]) in cases().into_iter().enumerate() {
        let splits_max = crate::attention::splits_max(window, split_len, position + n_tokens);
        let columns = (heads * head_dim) as usize;
        let out_stride = columns as u32 + 1;
        let layout = Layout { k: columns, elem: variant.elem };
        let leaves_whole = i + 1 == OF_ONE || i + 1 == cases().len();
        let flag = |condition: bool, flag: u32| if condition { flag } else { 0 };
        let flags = flag(i % 2 == 0, FLAG_STAGE) | flag(i >= OF_ONE, FLAG_EACH) | flag(leaves_whole, FLAG_WHOLE);
        let stage_quads = layout.quads() as u32;
        let params = Params { heads, head_dim, out_stride, window, splits_max, split_len, flags, stage_quads };
        let step = Step { n_tokens, position, ..Step::default() };
        let rows = (n_tokens * heads * splits_max) as usize;
        let partial = rng.values(rows * head_dim as usize, 20.0);
        let ml: Vec<[f32; 2]> = (0..rows).map(|_| [rng.range(-10.0, 10.0), rng.range(1.0, 30.0)]).collect();
        let mut out = trial::poisoned((n_tokens * out_stride) as usize);
        let staged = layout.empty(n_tokens as usize);
        let positions: Vec<u32> = match i < OF_ONE {
            true => (position..position + n_tokens).collect(),
            false => (0..n_tokens).map(|token| if token == 2 { position } else { rng.below(position) }).collect(),
        };
        let places: Vec<u32> = positions.iter().flat_map(|position| [*position, 0, 0, 0]).collect();
        let storage =
            vec![trial::words(&partial), trial::words(ml.as_flattened()), trial::words(&out), staged.clone(), places];
        let is_left = |position: u32| {
            let (first, last) = attention::visible(window, position);
            leaves_whole && first / split_len == last / split_len
        };
        for (token, &position) in positions.iter().enumerate().filter(|(_, position)| !is_left(**position)) {
            let of_row = |n: usize| token * n..(token + 1) * n;
            let splits = rows / n_tokens as usize;
            reference(
                &params,
                &Step { n_tokens: 1, position, ..step },
                &partial[of_row(splits * head_dim as usize)],
                &ml[of_row(splits)],
                &mut out[of_row(out_stride as usize)],
            );
        }
        let mut expected = Vec::new();
        if flags & FLAG_STAGE == 0 {
            expected.push(Expected::exact(5, staged));
        } else {
            let rows = out.chunks(out_stride as usize).enumerate();
            for (token, row) in rows.filter(|(token, _)| !is_left(positions[*token])) {
                expected.extend(layout.expected(5, token, &row[..columns], None, TOLERANCE * 20.0));
            }
        }
        expected.push(Expected::near(4, out, TOLERANCE));
        trials.push(Trial {
            label: format!("{heads} heads of {head_dim}, {n_tokens} at {position}, window {window}, split {split_len}"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step,
            storage,
            grid: grid(&params, n_tokens),
            expected,
        });
    }
    trials
}
