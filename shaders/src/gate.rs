//! Twin of `gate.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0.
    Params {
        /// Columns.
        width: u32,
        /// Elements of a row of x.
        stride: u32,
        /// Elements of a row of the gate.
        gate_stride: u32,
        /// Unused.
        pad: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gate",
    body: include_str!("gate.wgsl"),
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

/// The formula of the kernel in f64.
pub fn reference(params: &Params, step: &Step, x: &mut [f32], gate: &[f32]) {
    for token in 0..step.n_tokens as usize {
        let factor = 1.0 / (1.0 + (-f64::from(gate[token * params.gate_stride as usize])).exp());
        for value in &mut x[token * params.stride as usize..][..params.width as usize] {
            *value = (f64::from(*value) * factor) as f32;
        }
    }
}

/// The elements read and written.
pub fn cost(params: &Params, rows: u32) -> Cost {
    let elements = u64::from(params.width) * u64::from(rows);
    Cost { bytes: trial::word_bytes(2 * elements), flops: 4 * elements }
}

/// (width, tokens): one element, less and more than a workgroup.
pub fn cases() -> Vec<(u32, u32)> {
    vec![(1, 1), (100, 3), (600, 2)]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (width, n_tokens) in cases() {
        let params = Params { width, stride: width + 3, gate_stride: 4, pad: 0 };
        let step = Step { n_tokens, ..Step::default() };
        let mut x = rng.activations((n_tokens * params.stride) as usize);
        let gate = rng.values((n_tokens * params.gate_stride) as usize, 20.0);
        let storage = vec![trial::words(&x), trial::words(&gate)];
        reference(&params, &step, &mut x, &gate);
        let tolerance = x.iter().map(|v| 1e-5 * v.abs()).collect();
        trials.push(Trial {
            label: format!("width {width}, {n_tokens} tokens"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step,
            storage,
            grid: grid(&params, n_tokens),
            expected: vec![Expected::close(2, x, tolerance)],
        });
    }
    trials
}
