//! Twin of `halve_glu.wgsl`; the formula and the mapping are in its header.

use crate::*;

/// Invocations of a workgroup; the larger sizes have fewer rows under way, more of which is still in the cache when it is
/// read again.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0.
    Params {
        /// Inputs; a multiple of 8.
        k: u32,
        /// As in [`halve::Params`].
        chunks: u32,
        /// Elements of a row of x; a multiple of 4.
        x_stride: u32,
        /// [`crate::Activation`].
        activation: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "halve_glu",
    body: include_str!("halve_glu.wgsl"),
    preludes: &[Prelude::Step, Prelude::Activation, Prelude::Halve],
    constants: &[("WG", WG)],
    sizes: gemv_w4::SIZES,
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` rows.
pub fn grid(_params: &Params, rows: u32) -> [u32; 3] {
    [1, 1, rows]
}

/// Gates and ups once, the halves once.
pub fn cost(params: &Params, rows: u32) -> Cost {
    let elements = u64::from(params.k) * u64::from(rows);
    Cost { bytes: 10 * elements, flops: 8 * elements }
}

/// (k, tokens, activation): a padded chunk, several rows.
pub fn cases() -> Vec<(u32, u32, Activation)> {
    vec![
        (8, 1, Activation::Silu),
        (72, 3, Activation::GeluTanh),
        (4096, 2, Activation::Silu),
        (160, 5, Activation::Gelu),
    ]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let one = |(k, tokens, activation): (u32, u32, Activation), rng: &mut Rng| {
        let x_stride = 2 * k + 4;
        let params = Params { k, chunks: k.div_ceil(32), x_stride, activation: activation as u32 };
        let mut x = trial::poisoned((tokens * x_stride) as usize);
        let mut rows = Vec::new();
        for row in x.chunks_mut(x_stride as usize) {
            // Gates of a few units: far from zero an activation is the identity or nothing.
            let gates = rng.values(k as usize, 4.0);
            let ups = rng.activations(k as usize);
            row[..k as usize].copy_from_slice(&gates);
            row[k as usize..2 * k as usize].copy_from_slice(&ups);
            let value = |(gate, up): (&f32, &f32)| (activation.of(f64::from(*gate)) * f64::from(*up)) as f32;
            rows.push(gates.iter().zip(&ups).map(value).collect::<Vec<f32>>());
        }
        Trial {
            label: format!("{k} inputs, {tokens} tokens, {activation:?}"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step: Step { n_tokens: tokens, ..Step::default() },
            storage: vec![trial::words(&x), halve::empty(&rows), trial::words(&trial::poisoned(tokens as usize))],
            grid: grid(&params, tokens),
            // Device exponentials, and GELU's error function.
            expected: halve::expected(3, &rows, &vec![1.0; rows.len()], 1e-4),
        }
    };
    cases().into_iter().map(|case| one(case, rng)).collect()
}
