//! Twin of `argmax_reduce.wgsl`; the formula and the mapping are in its header.

use crate::argmax::NEVER_KEY;
use crate::trial::Expected;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0.
    Params {
        /// Candidates of a row.
        n: u32,
        /// Bit `i`: row `i` is reduced, of 32 at most.
        rows: u32,
        /// Unused.
        pad: [u32; 2],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "argmax_reduce",
    body: include_str!("argmax_reduce.wgsl"),
    preludes: &[Prelude::Order, Prelude::Best],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch: a workgroup a row, up to the last one that is reduced.
pub fn grid(params: &Params) -> [u32; 3] {
    [u32::BITS - params.rows.leading_zeros(), 1, 1]
}

/// Id of the best candidate of a row; 0 if none of them can be chosen.
pub fn reference(candidates: &[[u32; 2]]) -> u32 {
    let [key, id] = crate::argmax::best(candidates);
    if key > NEVER_KEY { id } else { 0 }
}

/// The candidates once.
pub fn cost(params: &Params) -> Cost {
    Cost { bytes: 8 * u64::from(params.n) * u64::from(params.rows.count_ones()), flops: 0 }
}

/// Numbers of candidates: less and more than the workgroup.
pub fn cases() -> Vec<u32> {
    vec![1, 126, 700]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let lowest = [NEVER_KEY + 1, NEVER_KEY - 3, NEVER_KEY - 1];
    let each = cases().into_iter().flat_map(|n| lowest.map(|lowest| (n, lowest)));
    each.zip([0b1, 0b1011, 0b10].into_iter().cycle()).map(|((n, lowest), rows)| trial(n, lowest, rows, rng)).collect()
}

fn trial(n: u32, lowest: u32, rows: u32, rng: &mut Rng) -> Trial {
    let params = Params { n, rows, pad: [0; 2] };
    let [all, ..] = grid(&params);
    // Few distinct keys, so that the id decides.
    let mut row = || (0..n).map(|i| [lowest + rng.below(4), (n - i) * 10 + rng.below(10)]).collect::<Vec<_>>();
    let candidates: Vec<Vec<[u32; 2]>> = (0..all).map(|_| row()).collect();
    let result = |i: u32| if rows >> i & 1 == 1 { reference(&candidates[i as usize]) } else { trial::POISON };
    let mut expected: Vec<u32> = (0..all).map(result).collect();
    expected.resize(all.next_multiple_of(4) as usize, trial::POISON);
    Trial {
        label: format!("rows {rows:#b} of {n} candidates from key {lowest:#x} on"),
        params: bytemuck::bytes_of(&params).to_vec(),
        step: Step::default(),
        storage: vec![candidates.concat().as_flattened().to_vec(), vec![trial::POISON; expected.len()]],
        grid: [all, 1, 1],
        expected: vec![Expected::exact(3, expected)],
    }
}
