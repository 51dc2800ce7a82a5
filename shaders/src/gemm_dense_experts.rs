//! Twin of `gemm_dense_experts.wgsl`; the formula and the mapping are in its header.

use crate::gemm_w4_experts::Pairs;
use crate::gemv_w4_experts::Case;
use crate::trial::Expected;
use crate::*;

pub use crate::gemm_w4_experts::{cases, grid};

/// Invocations of a workgroup.
pub const WG: u32 = gemm_dense::WG;
/// Pairs and outputs of a workgroup.
pub const TILE: u32 = gemm_dense::TILE;
/// Inputs held in workgroup memory.
pub const K_STEP: u32 = gemm_dense::K_STEP;

params! {
    /// Uniform at binding 0.
    Params {
        /// Outputs of an expert.
        n: u32,
        /// Inputs.
        k: u32,
        /// Words of a row of `weight`, a multiple of 4; the padding must hold finite numbers (zeros).
        row_words: u32,
        /// Elements of a row of x; a multiple of 4.
        x_stride: u32,
        /// Elements of a row of out.
        out_stride: u32,
        /// First output column.
        out_offset: u32,
        /// Not read.
        bias_offset: u32,
        /// Not read: none apply.
        flags: u32,
        /// Experts of a token.
        top_k: u32,
        /// 1 if the experts of a token share its input row.
        shared_input: u32,
        /// First expert of this part.
        first_expert: u32,
        /// Experts of this part.
        experts: u32,
        /// Rows from one expert to the next.
        expert_rows: u32,
        /// Unused.
        pad: [u32; 3],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemm_dense_experts",
    body: include_str!("gemm_dense_experts.wgsl"),
    preludes: &[
        Prelude::Step,
        Prelude::Dense,
        Prelude::Weights8,
        Prelude::Weights8Dense,
        Prelude::Gemm,
        Prelude::GemmPairs,
    ],
    constants: &[("WG", WG), ("TILE", TILE), ("K_STEP", K_STEP)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// As [`gemv_dense::cost`] for every expert of every token.
pub fn cost(params: &Params, rows: u32) -> Cost {
    let one = gemv_dense::Params { n: params.n, k: params.k, row_words: params.row_words, ..Default::default() };
    gemv_dense::cost(&one, rows * params.top_k)
}

fn trial(case: Case, dense: Dense, rng: &mut Rng) -> Trial {
    let Case { n, k, part: (first_expert, here), top_k, tokens, shared_input, .. } = case;
    let k = k + 1;
    let weight: Vec<u32> =
        (0..here * n).flat_map(|_| gemv_dense::pack_row(dense, &rng.values(k as usize, 0.1))).collect();
    let row_words = weight.len() as u32 / (here * n);
    let params = Params {
        n,
        k,
        row_words,
        x_stride: (k + 4).next_multiple_of(4),
        out_stride: n + 3,
        out_offset: 2,
        bias_offset: 0,
        flags: 0,
        top_k,
        shared_input: u32::from(shared_input),
        first_expert,
        experts: here,
        expert_rows: n,
        pad: [0; 3],
    };
    let pairs = Pairs::random(case, rng);
    let inputs = if shared_input { tokens } else { tokens * top_k };
    let x = rng.activations((inputs * params.x_stride) as usize);
    let mut out = trial::poisoned((tokens * top_k * params.out_stride) as usize);
    let storage =
        vec![trial::words(&x), weight.clone(), vec![0], trial::words(&out), pairs.pairs.clone(), pairs.tiles.clone()];
    let mut tolerance = vec![0.0; out.len()];
    for (pair, (row, expert)) in pairs.of.iter().enumerate() {
        let Some(expert) = expert else { continue };
        let x = &x[row * params.x_stride as usize..][..k as usize];
        for i in 0..n {
            let weights = &weight[((expert * n + i) * row_words) as usize..];
            let products = x.iter().enumerate().map(|(k, x)| f64::from(*x) * f64::from(dense.element(weights, k)));
            let at = pair * params.out_stride as usize + (params.out_offset + i) as usize;
            out[at] = products.clone().sum::<f64>() as f32;
            tolerance[at] = 3e-6 * products.map(f64::abs).sum::<f64>() as f32;
        }
    }
    Trial {
        label: format!("{case:?}"),
        params: bytemuck::bytes_of(&params).to_vec(),
        step: Step { n_tokens: tokens, ..Step::default() },
        storage,
        grid: grid(n, pairs.tiles_max),
        expected: vec![Expected::close(5, out, tolerance)],
    }
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    cases().into_iter().map(|case| trial(case, variant.dense, rng)).collect()
}
