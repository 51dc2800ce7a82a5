//! Twin of `mask.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0.
    Params {
        /// Scores in the row.
        vocab: u32,
        /// First score, in elements.
        offset: u32,
        /// Words of the mask.
        words: u32,
        /// Unused.
        pad: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "mask",
    body: include_str!("mask.wgsl"),
    preludes: &[],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Words of a mask over `vocab` tokens.
pub const fn words(vocab: u32) -> u32 {
    vocab.div_ceil(32)
}

/// Dispatch: an invocation a score.
pub fn grid(params: &Params) -> [u32; 3] {
    [params.vocab.div_ceil(WG), 1, 1]
}

/// Takes away the scores that `mask` does not allow, in place.
pub fn reference(params: &Params, mask: &[u32], scores: &mut [f32]) {
    let mask = &mask[..params.words as usize];
    for (score, id) in scores[params.offset as usize..][..params.vocab as usize].iter_mut().zip(0u32..) {
        let word = mask.get(id as usize / 32).copied().unwrap_or(0);
        if word >> (id % 32) & 1 == 0 {
            *score = f32::NEG_INFINITY;
        }
    }
}

/// The mask, and the scores at most.
pub fn cost(params: &Params) -> Cost {
    Cost { bytes: trial::word_bytes(u64::from(params.words) + u64::from(params.vocab)), flops: 0 }
}

/// (vocab, words of the mask): one token, whole and ragged words, a mask that ends early, one that goes on.
pub fn cases() -> Vec<(u32, u32)> {
    vec![(1, 1), (64, 2), (1001, 32), (5003, 100), (300, 12)]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (vocab, words) in cases() {
        let params = Params { vocab, offset: 3, words, pad: 0 };
        let mask: Vec<u32> = (0..words)
            .map(|_| match rng.below(4) {
                0 => 0,
                1 => u32::MAX,
                _ => rng.next_u32(),
            })
            .collect();
        let mut scores = crate::argmax::awkward_scores((params.offset + vocab + 3) as usize, rng);
        let storage = vec![mask.clone(), trial::words(&scores)];
        reference(&params, &mask, &mut scores);
        trials.push(Trial {
            label: format!("vocab {vocab}, {words} words"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step: Step::default(),
            storage,
            grid: grid(&params),
            expected: vec![Expected::exact(3, trial::words(&scores))],
        });
    }
    trials
}
