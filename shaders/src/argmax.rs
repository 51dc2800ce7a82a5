//! Twin of `argmax.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;
/// Scores of a workgroup.
pub const BLOCK: u32 = 1024;

params! {
    /// Uniform at binding 0.
    Params {
        /// Scores.
        n: u32,
        /// First score, in elements.
        offset: u32,
        /// Unused.
        pad: [u32; 2],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "argmax",
    body: include_str!("argmax.wgsl"),
    preludes: &[Prelude::Order, Prelude::Best],
    constants: &[("WG", WG), ("BLOCK", BLOCK)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Candidates that the kernel writes, the `n` of [`crate::argmax_reduce`].
pub fn blocks(n: u32) -> u32 {
    n.div_ceil(BLOCK)
}

/// Dispatch: a workgroup a block.
pub fn grid(params: &Params) -> [u32; 3] {
    [blocks(params.n), 1, 1]
}

/// Id of a place that holds no candidate.
pub const NO_ID: u32 = u32::MAX;

/// Key of negative infinity: it, NaN and empty places are never chosen.
pub const NEVER_KEY: u32 = 0x007f_ffff;

/// Key of a score: larger keys are larger scores, equal scores (also the two zeros) have equal keys, NaN has 0.
pub fn sort_key(score: f32) -> u32 {
    match score.to_bits() {
        _ if score.is_nan() => 0,
        _ if score == 0.0 => 1 << 31,
        bits if bits >> 31 == 1 => !bits,
        bits => bits | 1 << 31,
    }
}

/// Score of the key of a number.
pub fn key_score(key: u32) -> f32 {
    f32::from_bits(if key >> 31 == 1 { key & !(1 << 31) } else { !key })
}

/// (key, id) of the best score of every block.
pub fn reference(params: &Params, scores: &[f32]) -> Vec<[u32; 2]> {
    let scores = &scores[params.offset as usize..][..params.n as usize];
    let keyed: Vec<[u32; 2]> = scores.iter().zip(0..).map(|(&score, id)| [sort_key(score), id]).collect();
    keyed.chunks(BLOCK as usize).map(best).collect()
}

/// The first of candidates: largest key, then lowest id.
pub fn best(candidates: &[[u32; 2]]) -> [u32; 2] {
    candidates.iter().copied().min_by_key(|&[key, id]| (!key, id)).unwrap_or([0, NO_ID])
}

/// The scores once.
pub fn cost(params: &Params) -> Cost {
    Cost { bytes: trial::word_bytes(u64::from(params.n)), flops: 0 }
}

/// Sizes: less than a workgroup, whole and ragged blocks.
pub fn cases() -> Vec<u32> {
    vec![1, 100, 1024, 5000]
}

/// Scores with ties, both zeros, infinities and NaN.
pub(crate) fn awkward_scores(n: usize, rng: &mut Rng) -> Vec<f32> {
    let only_nan = rng.below(8) == 0;
    (0..n)
        .map(|_| match rng.below(12) {
            _ if only_nan => f32::NAN,
            0 => f32::NAN,
            1 => f32::NEG_INFINITY,
            2 => -0.0,
            3 => 0.0,
            4 | 5 => 7.5,
            _ => rng.range(-20.0, 8.0),
        })
        .collect()
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for n in cases().into_iter().flat_map(|n| [n; 3]) {
        let params = Params { n, offset: 3, pad: [0; 2] };
        let scores = awkward_scores((params.offset + n) as usize, rng);
        let candidates = reference(&params, &scores);
        let storage = vec![trial::words(&scores), vec![trial::POISON; 2 * candidates.len()]];
        trials.push(Trial {
            label: format!("{n} scores"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step: Step::default(),
            storage,
            grid: grid(&params),
            expected: vec![Expected::exact(3, candidates.as_flattened().to_vec())],
        });
    }
    trials
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_order_like_scores() {
        let scores = [f32::NEG_INFINITY, f32::MIN, -1.5, -1e-40, -0.0, 1e-40, 2.0, 3.0, f32::MAX, f32::INFINITY];
        for pair in scores.windows(2) {
            assert!(sort_key(pair[0]) < sort_key(pair[1]), "{pair:?}");
        }
        assert_eq!(sort_key(f32::NEG_INFINITY), NEVER_KEY);
        assert_eq!(sort_key(0.0), sort_key(-0.0));
        assert!(sort_key(f32::NAN) < sort_key(f32::NEG_INFINITY) && sort_key(-f32::NAN) == 0);
        assert!(scores.iter().all(|&score| key_score(sort_key(score)) == score));
    }

    #[test]
    fn ties_go_to_the_lowest_id() {
        let params = Params { n: 4, offset: 0, pad: [0; 2] };
        assert_eq!(reference(&params, &[1.0, 3.0, 3.0, f32::NAN])[0][1], 1);
        assert_eq!(reference(&params, &[f32::NAN; 4])[0], [0, 0]);
    }
}
