//! Twin of `halve_norm.wgsl`; the formula and the mapping are in its header.

use crate::*;

/// Invocations of a workgroup.
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
        /// Added to the mean of squares.
        eps: f32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "halve_norm",
    body: include_str!("halve_norm.wgsl"),
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

/// x once, the halves once.
pub fn cost(params: &Params, rows: u32) -> Cost {
    let elements = u64::from(params.k) * u64::from(rows);
    Cost { bytes: 6 * elements, flops: 5 * elements }
}

/// (k, tokens): a padded chunk, several rows.
pub fn cases() -> Vec<(u32, u32)> {
    vec![(8, 1), (72, 3), (4096, 2)]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let one = |(k, tokens): (u32, u32), rng: &mut Rng| {
        let params = Params { k, chunks: k.div_ceil(32), x_stride: k + 4, eps: 1e-5 };
        let weight = staged::random_norm(k as usize, rng);
        let mut x = trial::poisoned((tokens * params.x_stride) as usize);
        let (mut rows, mut factors) = (Vec::new(), Vec::new());
        for (token, row) in x.chunks_mut(params.x_stride as usize).enumerate() {
            // The last of several rows is zeros.
            let zeros = tokens > 1 && token + 1 == tokens as usize;
            let values = if zeros { vec![0.0; k as usize] } else { rng.activations(k as usize) };
            row[..k as usize].copy_from_slice(&values);
            let squares: f64 = values.iter().map(|v| f64::from(*v).powi(2)).sum();
            factors.push((1.0 / (squares / f64::from(k) + f64::from(params.eps)).sqrt()) as f32);
            rows.push(values.iter().zip(&weight).map(|(v, w)| v * w).collect::<Vec<f32>>());
        }
        Trial {
            label: format!("{k} inputs, {tokens} tokens"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step: Step { n_tokens: tokens, ..Step::default() },
            storage: vec![
                trial::words(&x),
                trial::words(&weight),
                halve::empty(&rows),
                trial::words(&trial::poisoned(tokens as usize)),
            ],
            grid: grid(&params, tokens),
            // A sum of squares and an inverse root in single precision.
            expected: halve::expected(4, &rows, &factors, 5e-6),
        }
    };
    cases().into_iter().map(|case| one(case, rng)).collect()
}
