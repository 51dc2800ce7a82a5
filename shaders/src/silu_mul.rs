//! Twin of `silu_mul.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0.
    Params {
        /// Elements of a row of the result.
        width: u32,
        /// Elements of a row of x.
        x_stride: u32,
        /// Elements of a row of out.
        out_stride: u32,
        /// Unused.
        pad: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "silu_mul",
    body: include_str!("silu_mul.wgsl"),
    preludes: &[Prelude::Step],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` tokens.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    [params.width.div_ceil(WG), 1, rows]
}

/// Device exponentials are good to a few units in the last place.
const TOLERANCE: f32 = 1e-5;
/// The kernel's silu is not smaller than a gate times exp(-80) = 1.8e-35; the trials multiply it by at most 500 * 500.
const TAIL: f32 = 5e-30;

/// out = silu(gate) * up in f64, with the bindings of the kernel in order.
pub fn reference(params: &Params, step: &Step, x: &[f32], out: &mut [f32]) {
    let width = params.width as usize;
    for token in 0..step.n_tokens as usize {
        let row = &x[token * params.x_stride as usize..];
        for i in 0..width {
            let gate = f64::from(row[i]);
            out[token * params.out_stride as usize + i] =
                (gate / (1.0 + (-gate).exp()) * f64::from(row[width + i])) as f32;
        }
    }
}

/// Both inputs and the output once.
pub fn cost(params: &Params, rows: u32) -> Cost {
    let elements = u64::from(params.width) * u64::from(rows);
    Cost { bytes: trial::word_bytes(3 * elements), flops: 4 * elements }
}

/// (width, tokens): one element, less and more than a workgroup.
pub fn cases() -> Vec<(u32, u32)> {
    vec![(1, 1), (100, 3), (1030, 5)]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (width, n_tokens) in cases() {
        let params = Params { width, x_stride: 2 * width + 1, out_stride: width + 2, pad: 0 };
        let step = Step { n_tokens, ..Step::default() };
        let x = rng.activations((n_tokens * params.x_stride) as usize);
        let mut out = trial::poisoned((n_tokens * params.out_stride) as usize);
        let storage = vec![trial::words(&x), trial::words(&out)];
        reference(&params, &step, &x, &mut out);
        let tolerance = out.iter().map(|v| TOLERANCE * v.abs() + TAIL).collect();
        trials.push(Trial {
            label: format!("width {width}, {n_tokens} tokens"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step,
            storage,
            grid: grid(&params, n_tokens),
            expected: vec![Expected::close(3, out, tolerance)],
        });
    }
    trials
}
