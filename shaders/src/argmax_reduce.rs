//! Twin of `argmax_reduce.wgsl`; the formula and the mapping are in its header.

use crate::argmax::NEVER_KEY;
use crate::trial::Expected;
use crate::*;

/// Invocations of the workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0.
    Params {
        /// Candidates.
        n: u32,
        /// Unused.
        pad: [u32; 3],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "argmax_reduce",
    body: include_str!("argmax_reduce.wgsl"),
    preludes: &[Prelude::Order],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch: one workgroup.
pub fn grid() -> [u32; 3] {
    [1, 1, 1]
}

/// Id of the best candidate; 0 if none of them can be chosen.
pub fn reference(params: &Params, candidates: &[[u32; 2]]) -> u32 {
    let [key, id] = crate::argmax::best(&candidates[..params.n as usize]);
    if key > NEVER_KEY { id } else { 0 }
}

/// The candidates once.
pub fn cost(params: &Params) -> Cost {
    Cost { bytes: 8 * u64::from(params.n), flops: 0 }
}

/// Numbers of candidates: less and more than the workgroup.
pub fn cases() -> Vec<u32> {
    vec![1, 126, 700]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (n, lowest) in cases().into_iter().flat_map(|n| [(n, NEVER_KEY + 1), (n, NEVER_KEY - 3), (n, NEVER_KEY - 1)]) {
        let params = Params { n, pad: [0; 3] };
        // Few distinct keys, so that the id decides.
        let candidates: Vec<[u32; 2]> = (0..n).map(|i| [lowest + rng.below(4), (n - i) * 10 + rng.below(10)]).collect();
        trials.push(Trial {
            label: format!("{n} candidates from key {lowest:#x} on"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step: Step::default(),
            storage: vec![candidates.as_flattened().to_vec(), vec![trial::POISON; 4]],
            grid: grid(),
            expected: vec![Expected::exact(
                3,
                vec![reference(&params, &candidates), trial::POISON, trial::POISON, trial::POISON],
            )],
        });
    }
    trials
}
