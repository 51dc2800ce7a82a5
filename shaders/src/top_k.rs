//! Twin of `top_k.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;
/// Items of a workgroup.
pub const BLOCK: u32 = 1024;

params! {
    /// Uniform at binding 0.
    Params {
        /// Scores or candidates of the input.
        n: u32,
        /// First score, in elements; 0 after the first pass.
        offset: u32,
        /// Candidates kept of a block; 1 to [`crate::sample::MAX_TOP_K`].
        k: u32,
        /// 1 in the first pass, 0 after it.
        from_scores: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "top_k",
    body: include_str!("top_k.wgsl"),
    preludes: &[Prelude::Order],
    constants: &[("WG", WG), ("BLOCK", BLOCK)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Candidates that a pass over `n` items writes, the `n` of the next pass; a pass whose result is `k` is the last.
pub fn kept(n: u32, k: u32) -> u32 {
    n.div_ceil(BLOCK) * k
}

/// Parameters of every pass over `n` scores, in order.
pub fn passes(n: u32, offset: u32, k: u32) -> Vec<Params> {
    let mut passes = vec![Params { n, offset, k, from_scores: 1 }];
    let mut left = kept(n, k);
    while left > k {
        passes.push(Params { n: left, offset: 0, k, from_scores: 0 });
        left = kept(left, k);
    }
    passes
}

/// Dispatch of a pass: a workgroup a block.
pub fn grid(params: &Params) -> [u32; 3] {
    [params.n.div_ceil(BLOCK), 1, 1]
}

/// The k first candidates of every block, (key, id), missing places filled.
pub fn reference(params: &Params, scores: &[f32], candidates: &[[u32; 2]]) -> Vec<[u32; 2]> {
    let n = params.n as usize;
    let items: Vec<[u32; 2]> = if params.from_scores != 0 {
        let scores = &scores[params.offset as usize..][..n];
        scores.iter().zip(0..).map(|(&score, id)| [crate::argmax::sort_key(score), id]).collect()
    } else {
        candidates[..n].to_vec()
    };
    let mut kept = Vec::new();
    for block in items.chunks(BLOCK as usize) {
        let mut block = block.to_vec();
        block.sort_by_key(|&[key, id]| (!key, id));
        block.resize(params.k as usize, [0, crate::argmax::NO_ID]);
        kept.extend(block);
    }
    kept
}

/// The input once and what is kept.
pub fn cost(params: &Params) -> Cost {
    let input = u64::from(params.n) * if params.from_scores != 0 { 4 } else { 8 };
    Cost { bytes: input + 8 * u64::from(kept(params.n, params.k)), flops: 0 }
}

/// (n, k, from_scores): fewer items than kept, ragged and whole blocks, first and following passes.
pub fn cases() -> Vec<(u32, u32, bool)> {
    vec![(3, 40, true), (1024, 256, true), (2500, 40, true), (1, 1, false), (3000, 256, false), (80, 40, false)]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (n, k, first) in cases() {
        let params = Params { n, offset: if first { 2 } else { 0 }, k, from_scores: first.into() };
        let scores = crate::argmax::awkward_scores((params.offset + n) as usize, rng);
        let candidates: Vec<[u32; 2]> =
            (0..n).map(|id| [rng.below(300), if rng.below(20) == 0 { crate::argmax::NO_ID } else { id }]).collect();
        let kept = reference(&params, &scores, &candidates);
        trials.push(Trial {
            label: format!("{n} items, k {k}, first pass {first}"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step: Step::default(),
            storage: vec![
                trial::words(&scores),
                candidates.as_flattened().to_vec(),
                vec![trial::POISON; 2 * kept.len()],
            ],
            grid: grid(&params),
            expected: vec![Expected::exact(4, kept.as_flattened().to_vec())],
        });
    }
    trials
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The passes over a vocabulary keep what one sort of all of it keeps.
    #[test]
    fn passes_end_with_the_first_k() {
        let mut rng = Rng::new(3);
        for (n, k) in [(1, 1), (40, 256), (1025, 256), (5000, 7), (32_000, 256)] {
            let scores = crate::argmax::awkward_scores(n as usize, &mut rng);
            let mut candidates = Vec::new();
            for params in passes(n, 0, k) {
                candidates = reference(&params, &scores, &candidates);
            }
            let mut all: Vec<[u32; 2]> =
                scores.iter().zip(0..).map(|(&s, id)| [crate::argmax::sort_key(s), id]).collect();
            all.sort_by_key(|&[key, id]| (!key, id));
            all.resize(k as usize, [0, crate::argmax::NO_ID]);
            assert_eq!(candidates, all[..k as usize]);
        }
    }
}
