//! Twin of `penalize.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
use crate::*;

pub use crate::sample::Params;

/// Invocations of a workgroup.
pub const WG: u32 = 64;

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "penalize",
    body: include_str!("penalize.wgsl"),
    preludes: &[],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for the recent tokens; nothing to dispatch when there are none.
pub fn grid(params: &Params) -> [u32; 3] {
    [params.n_recent.div_ceil(WG), 1, 1]
}

/// Penalised score of a token that occurred `count` times: what the kernel and the CPU sampler compute.
pub fn penalized(params: &Params, score: f32, count: u32) -> f32 {
    let repeated = if score > 0.0 { score / params.repetition } else { score * params.repetition };
    repeated - params.presence - params.frequency * count as f32
}

/// Applies the penalties in place, with the bindings of the kernel in order.
pub fn reference(params: &Params, recent: &[[u32; 2]], scores: &mut [f32]) {
    for &[id, count] in &recent[..params.n_recent as usize] {
        if id < params.vocab {
            let score = &mut scores[(params.offset + id) as usize];
            *score = penalized(params, *score, count);
        }
    }
}

/// The recent tokens and their scores.
pub fn cost(params: &Params) -> Cost {
    let n = u64::from(params.n_recent);
    Cost { bytes: 16 * n, flops: 4 * n }
}

/// (vocab, recent tokens): none left over, several workgroups.
pub fn cases() -> Vec<(u32, u32)> {
    vec![(1, 1), (50, 10), (1000, 130)]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (vocab, n_recent) in cases() {
        let params = Params {
            vocab,
            offset: 5,
            n_recent,
            repetition: rng.range(0.8, 1.5),
            presence: rng.range(-1.0, 1.0),
            frequency: rng.range(-0.5, 0.5),
            ..Params::default()
        };
        // Distinct ids: every third of the vocabulary, from a random start, wrapped.
        let start = rng.below(vocab);
        let stride = if vocab.is_multiple_of(3) || vocab == 1 { 1 } else { 3 };
        let recent: Vec<[u32; 2]> = (0..n_recent).map(|i| [(start + i * stride) % vocab, 1 + rng.below(4)]).collect();
        let mut scores = rng.values((params.offset + vocab + 3) as usize, 20.0);
        let storage = vec![recent.as_flattened().to_vec(), trial::words(&scores)];
        reference(&params, &recent, &mut scores);
        trials.push(Trial {
            label: format!("vocab {vocab}, {n_recent} recent"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step: Step::default(),
            storage,
            grid: grid(&params),
            expected: vec![Expected::near(3, scores, 1e-6)],
        });
    }
    trials
}
