//! Twin of `argmax_each.wgsl`; the formula and the mapping are in its header.

use crate::argmax::{awkward_scores, blocks, cases};
use crate::trial::Expected;
use crate::*;

pub use crate::argmax::{BLOCK, WG};
pub use crate::attention_each::MEMBERS;

params! {
    /// Uniform at binding 0.
    Params {
        /// Scores of a session.
        n: u32,
        /// Row of the first session.
        first_row: u32,
        /// Unused.
        pad: [u32; 2],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "argmax_each",
    body: include_str!("argmax_each.wgsl"),
    preludes: &[Prelude::Order, Prelude::Best],
    constants: &[("WG", WG), ("BLOCK", BLOCK), ("MEMBERS", MEMBERS)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `members` sessions: a workgroup a block and session.
pub fn grid(params: &Params, members: u32) -> [u32; 3] {
    [blocks(params.n), members, 1]
}

/// The scores once.
pub fn cost(params: &Params, members: u32) -> Cost {
    Cost { bytes: trial::word_bytes(u64::from(params.n) * u64::from(members)), flops: 0 }
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let each = cases().into_iter().flat_map(|n| [(n, 1, 0), (n, 3, 2), (n, MEMBERS, MEMBERS)]);
    each.map(|(n, members, first_row)| trial(n, members, first_row, rng)).collect()
}

fn trial(n: u32, members: u32, first_row: u32, rng: &mut Rng) -> Trial {
    let params = Params { n, first_row, pad: [0; 2] };
    let rows: Vec<Vec<f32>> = (0..members).map(|_| awkward_scores(n as usize, rng)).collect();
    let mut candidates = vec![trial::POISON; 2 * (first_row * blocks(n)) as usize];
    for row in &rows {
        candidates.extend(argmax::reference(&argmax::Params { n, ..Default::default() }, row).as_flattened());
    }
    let mut storage: Vec<Vec<u32>> = rows.iter().map(|row| trial::words(row)).collect();
    // The places of sessions that are not there hold somebody's scores.
    storage.extend((members..MEMBERS).map(|_| vec![trial::POISON; n as usize]));
    storage.push(vec![trial::POISON; candidates.len()]);
    Trial {
        label: format!("{n} scores of {members} sessions from row {first_row} on"),
        params: bytemuck::bytes_of(&params).to_vec(),
        step: Step::default(),
        storage,
        grid: grid(&params, members),
        expected: vec![Expected::exact(2 + MEMBERS, candidates)],
    }
}
