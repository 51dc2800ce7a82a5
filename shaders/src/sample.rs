//! Twin of `sample.wgsl`; the formula and the mapping are in its header.

use crate::argmax::NEVER_KEY;
use crate::trial::Expected;
use crate::*;

/// Invocations of the workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0.
    Params {
        /// Scores in the row.
        vocab: u32,
        /// First score, in elements.
        offset: u32,
        /// Recent tokens.
        n_recent: u32,
        /// Candidates kept; 1 to [`crate::sample::MAX_TOP_K`].
        top_k: u32,
        /// Above 0.
        temperature: f32,
        /// Mass of the prefix kept; 1 keeps all.
        top_p: f32,
        /// Least probability relative to the first; 0 keeps all.
        min_p: f32,
        /// Uniform in [0, 1).
        uniform_number: f32,
        /// Repetition penalty; 1 changes nothing.
        repetition: f32,
        /// Presence penalty.
        presence: f32,
        /// Frequency penalty.
        frequency: f32,
        /// Unused.
        pad: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "sample",
    body: include_str!("sample.wgsl"),
    preludes: &[Prelude::Order],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Most candidates that the kernels keep.
pub const MAX_TOP_K: u32 = WG;

/// Dispatch: one workgroup.
pub fn grid() -> [u32; 3] {
    [1, 1, 1]
}

/// Id of the picked candidate, as the kernel computes it in f32 with additions in candidate order.
pub fn reference(params: &Params, candidates: &[[u32; 2]]) -> u32 {
    if candidates[0][0] <= NEVER_KEY {
        return 0;
    }
    // A softmax over infinities is not defined; the order still is.
    if !crate::argmax::key_score(candidates[0][0]).is_finite() {
        return candidates[0][1];
    }
    let count = params.top_k.min(params.vocab).clamp(1, MAX_TOP_K) as usize;
    let weights = weights(params, &candidates[..count]);
    let total: f32 = weights.iter().sum();
    let (kept, mass) = prefix(params, candidates, &weights, total);
    let mut cumulated = 0.0;
    for (weight, candidate) in weights[..kept].iter().zip(candidates) {
        cumulated += weight;
        if cumulated > params.uniform_number * mass {
            return candidate[1];
        }
    }
    candidates[kept.max(1) - 1][1]
}

/// exp((score - first score) / temperature) of every candidate.
fn weights(params: &Params, candidates: &[[u32; 2]]) -> Vec<f32> {
    let score = |key: u32| if key == 0 { -1e38 } else { crate::argmax::key_score(key).clamp(-1e38, 1e38) };
    let first = score(candidates[0][0]);
    candidates.iter().map(|&[key, _]| ((score(key) - first) / params.temperature).max(-100.0).exp()).collect()
}

/// Candidates that top_p and min_p keep, and their mass.
fn prefix(params: &Params, candidates: &[[u32; 2]], weights: &[f32], total: f32) -> (usize, f32) {
    let (mut kept, mut mass) = (0, 0.0);
    for (&weight, &[key, _]) in weights.iter().zip(candidates) {
        let enough = kept > 0 && params.top_p < 1.0 && mass >= params.top_p * total;
        if enough || weight < params.min_p || key <= NEVER_KEY {
            break;
        }
        mass += weight;
        kept += 1;
    }
    (kept, mass)
}

/// The candidates once.
pub fn cost(params: &Params) -> Cost {
    Cost { bytes: 8 * u64::from(params.top_k), flops: 4 * u64::from(params.top_k) }
}

/// (vocab, top_k, temperature, top_p, min_p): one candidate, a vocabulary below k, every filter alone and together.
pub fn cases() -> Vec<(u32, u32, f32, f32, f32)> {
    vec![
        (100, 1, 1.0, 1.0, 0.0),
        (5, 40, 0.7, 1.0, 0.0),
        (1000, 40, 0.7, 0.9, 0.0),
        (1000, 256, 2.0, 1.0, 0.05),
        (1000, 100, 1.3, 0.8, 0.1),
        (1000, 50, 0.01, 0.95, 0.0),
    ]
}

/// Whether rounding could decide differently: a cumulated weight near a threshold.
fn is_delicate(params: &Params, candidates: &[[u32; 2]]) -> bool {
    let weights = weights(params, candidates);
    let total: f32 = weights.iter().sum();
    let (_, mass) = prefix(params, candidates, &weights, total);
    let mut cumulated = 0.0;
    weights.iter().any(|&weight| {
        cumulated += weight;
        let near = |threshold: f32| (cumulated - threshold).abs() < 1e-3 * total;
        (params.top_p < 1.0 && near(params.top_p * total))
            || near(params.uniform_number * mass)
            || (weight / params.min_p - 1.0).abs() < 1e-3
    })
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (vocab, top_k, temperature, top_p, min_p) in cases().into_iter().flat_map(|case| [case; 4]) {
        let count = top_k.min(vocab) as usize;
        let mut drawn = None;
        // A few draws suffice: thresholds are near for a small part of the uniform numbers only.
        for _ in 0..100 {
            let uniform_number = rng.range(0.0, 1.0);
            let params = Params { vocab, top_k, temperature, top_p, min_p, uniform_number, ..Params::default() };
            let mut candidates: Vec<[u32; 2]> =
                (0..count).map(|_| [crate::argmax::sort_key(rng.range(-8.0, 8.0)), rng.below(vocab)]).collect();
            match rng.below(12) {
                0 => candidates[0][0] = crate::argmax::sort_key(f32::INFINITY),
                1 => candidates.iter_mut().for_each(|candidate| candidate[0] = 0),
                2 => candidates.iter_mut().for_each(|candidate| candidate[0] = NEVER_KEY),
                // Most are taken away.
                3..6 => {
                    let left = 1 + rng.below(count.min(8) as u32) as usize;
                    candidates[left.min(count)..].iter_mut().for_each(|candidate| candidate[0] = NEVER_KEY);
                }
                _ => {}
            }
            candidates.sort_by_key(|&[key, id]| (!key, id));
            if !is_delicate(&params, &candidates) {
                drawn = Some((params, candidates));
                break;
            }
        }
        let Some((params, candidates)) = drawn else { continue };
        let expected = vec![reference(&params, &candidates), trial::POISON, trial::POISON, trial::POISON];
        trials.push(Trial {
            label: format!("vocab {vocab}, k {top_k}, t {temperature}, p {top_p}, min {min_p}"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step: Step::default(),
            storage: vec![candidates.as_flattened().to_vec(), vec![trial::POISON; 4]],
            grid: grid(),
            expected: vec![Expected::exact(3, expected)],
        });
    }
    trials
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pick(top_p: f32, min_p: f32, uniform_number: f32) -> u32 {
        // Probabilities 1/2, 1/4, 1/8, 1/8.
        let candidates: Vec<[u32; 2]> = [(4.0, 9), (2.0, 5), (1.0, 1), (1.0, 7)]
            .map(|(p, id): (f32, u32)| [crate::argmax::sort_key(p.ln()), id])
            .to_vec();
        let params = Params { vocab: 4, top_k: 4, temperature: 1.0, top_p, min_p, uniform_number, ..Params::default() };
        reference(&params, &candidates)
    }

    #[test]
    fn walks_the_kept_mass() {
        assert_eq!([0.0, 0.49, 0.51, 0.74, 0.76, 0.88, 0.999].map(|u| pick(1.0, 0.0, u)), [9, 9, 5, 5, 1, 7, 7]);
        assert_eq!([0.0, 0.66, 0.67, 0.999].map(|u| pick(0.7, 0.0, u)), [9, 9, 5, 5]);
        assert_eq!([0.66, 0.68, 0.999].map(|u| pick(1.0, 0.3, u)), [9, 5, 5]);
        assert_eq!(pick(0.01, 1.0, 0.999), 9);
    }
}
