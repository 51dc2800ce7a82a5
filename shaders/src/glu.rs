//! Twin of `glu.wgsl`; the formula and the mapping are in its header.

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
        /// [`crate::Activation`].
        activation: u32,
        /// Rows of a token.
        per_token: u32,
        /// Unused.
        pad: [u32; 3],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "glu",
    body: include_str!("glu.wgsl"),
    preludes: &[Prelude::Step, Prelude::Activation],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` tokens.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    [params.width.div_ceil(WG), 1, rows]
}

/// Device exponentials are good to a few units in the last place of their argument, of which GELU's has a cube.
const TOLERANCE: [f32; 2] = [1e-5, 5e-5];
/// The kernel's activation is not smaller than a gate times exp(-80) = 1.8e-35; the trials multiply it by at most 1500 * 1500.
const TAIL: f32 = 1e-28;
/// An approximation of erf, relative to the gate.
const ERF: f32 = 2e-7;

/// out = activation(gate) * up in f64, with the bindings of the kernel in order.
pub fn reference(params: &Params, step: &Step, x: &[f32], out: &mut [f32]) {
    let width = params.width as usize;
    let activation = Activation::from_u32(params.activation);
    for token in 0..(step.n_tokens * params.per_token) as usize {
        let row = &x[token * params.x_stride as usize..];
        for i in 0..width {
            let gate = f64::from(row[i]);
            out[token * params.out_stride as usize + i] = (activation.of(gate) * f64::from(row[width + i])) as f32;
        }
    }
}

/// Both inputs and the output once.
pub fn cost(params: &Params, rows: u32) -> Cost {
    let elements = u64::from(params.width) * u64::from(rows);
    Cost { bytes: trial::word_bytes(3 * elements), flops: 4 * elements }
}

/// (width, tokens, activation): one element, less and more than a workgroup, every activation.
pub fn cases() -> Vec<(u32, u32, Activation)> {
    vec![
        (1, 1, Activation::Silu),
        (100, 3, Activation::Silu),
        (1030, 5, Activation::GeluTanh),
        (257, 2, Activation::Gelu),
    ]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (width, n_tokens, activation) in cases() {
        let mut params = Params {
            width,
            x_stride: 2 * width + 1,
            out_stride: width + 2,
            activation: activation as u32,
            per_token: 1,
            pad: [0; 3],
        };
        let mut step = Step { n_tokens, ..Step::default() };
        if n_tokens % 3 == 0 {
            (params.per_token, step.n_tokens) = (3, n_tokens / 3);
        }
        // Gates of some units, where the activations differ, among others.
        let x: Vec<f32> = rng.activations((n_tokens * params.x_stride) as usize).iter().map(|v| v * 3.0).collect();
        let mut out = trial::poisoned((n_tokens * params.out_stride) as usize);
        let storage = vec![trial::words(&x), trial::words(&out)];
        reference(&params, &step, &x, &mut out);
        let relative = TOLERANCE[usize::from(activation != Activation::Silu)];
        let erf = if activation == Activation::Gelu { ERF } else { 0.0 };
        let tolerance = (0..out.len())
            .map(|at| {
                let (token, i) = (at / params.out_stride as usize, at % params.out_stride as usize);
                if i >= width as usize {
                    return 0.0;
                }
                let row = &x[token * params.x_stride as usize..];
                relative * out[at].abs() + TAIL + erf * (row[i] * row[width as usize + i]).abs()
            })
            .collect();
        trials.push(Trial {
            label: format!("width {width}, {n_tokens} tokens, {activation:?}"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step,
            storage,
            grid: grid(&params, n_tokens),
            expected: vec![Expected::close(3, out, tolerance)],
        });
    }
    trials
}
