//! Twin of `bias.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 64;

params! {
    /// Uniform at binding 0.
    Params {
        /// Scores in the row.
        vocab: u32,
        /// First score, in elements.
        offset: u32,
        /// Tokens with a bias.
        n: u32,
        /// Unused.
        pad: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "bias",
    body: include_str!("bias.wgsl"),
    preludes: &[],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for the tokens with a bias; nothing to dispatch when there are none.
pub fn grid(params: &Params) -> [u32; 3] {
    [params.n.div_ceil(WG), 1, 1]
}

/// Adds the biases, (id, f32 bits), in place.
pub fn reference(params: &Params, biases: &[[u32; 2]], scores: &mut [f32]) {
    for &[id, bias] in &biases[..params.n as usize] {
        if id < params.vocab {
            scores[(params.offset + id) as usize] += f32::from_bits(bias);
        }
    }
}

/// The biases and their scores.
pub fn cost(params: &Params) -> Cost {
    let n = u64::from(params.n);
    Cost { bytes: 16 * n, flops: n }
}

/// (vocab, tokens with a bias): one, a part of a workgroup, several, all.
pub fn cases() -> Vec<(u32, u32)> {
    vec![(1, 1), (50, 10), (1000, 130), (65, 65)]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (vocab, n) in cases() {
        let params = Params { vocab, offset: 5, n, pad: 0 };
        // Distinct ids from a random start on, the last one behind the vocabulary.
        let start = rng.below(vocab);
        let mut biases: Vec<[u32; 2]> = (0..n)
            .map(|i| {
                [
                    (start + i) % vocab,
                    if rng.below(4) == 0 { f32::NEG_INFINITY } else { rng.range(-9.0, 9.0) }.to_bits(),
                ]
            })
            .collect();
        if n > 1 {
            biases[n as usize - 1][0] = vocab;
        }
        let mut scores = rng.values((params.offset + vocab + 3) as usize, 20.0);
        let storage = vec![biases.as_flattened().to_vec(), trial::words(&scores)];
        reference(&params, &biases, &mut scores);
        trials.push(Trial {
            label: format!("vocab {vocab}, {n} biases"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step: Step::default(),
            storage,
            grid: grid(&params),
            expected: vec![Expected::exact(3, trial::words(&scores))],
        });
    }
    trials
}
