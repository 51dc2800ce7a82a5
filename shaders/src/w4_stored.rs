//! Twin of `w4_stored.wgsl`; the layouts and the mapping are in its header.

use crate::trial::Expected;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0.
    Params {
        /// Outputs of what is stored, a multiple of 8.
        n: u32,
        /// Inputs that are stored.
        inputs: u32,
        /// Outputs in front of those that are wanted, a multiple of [`w4::TILE_N`].
        skip: u32,
        /// Outputs that are wanted.
        rows: u32,
        /// The first one's in the matrix, a multiple of [`w4::TILE_N`].
        first_row: u32,
        /// First chunk or group.
        first: u32,
        /// Chunks or groups of a row of the matrix.
        per_row: u32,
        /// Where scales begin, in words; 0 for codes.
        scales: u32,
        /// Where zero points begin, in words.
        zeros: u32,
        /// Unused.
        pad: [u32; 3],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "w4_stored",
    body: include_str!("w4_stored.wgsl"),
    preludes: &[Prelude::W4],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `count` chunks or groups, at most [`MAX_GROUPS`].
pub fn grid(params: &Params, count: u32) -> [u32; 3] {
    [params.rows.div_ceil(WG), 1, count]
}

/// Nibble of a word that holds output `n`.
fn nibble(word: u32, n: u32) -> u32 {
    word >> (4 * [0, 4, 1, 5, 2, 6, 3, 7][n as usize % 8]) & 15
}

/// Lays out `count` chunks or groups, with the bindings of the kernel in order.
pub fn reference(params: &Params, count: u32, stored: &[u32], codes: &mut [u32], group_params: &mut [u32]) {
    let tile = w4::TILE_N as u32;
    let at = |row: u32, i: u32| ((row / tile * params.per_row + i) * tile + row % tile) as usize;
    for i in 0..count {
        for output in 0..params.rows {
            let (n, row) = (params.skip + output, params.first_row + output);
            let code = |line: u32| nibble(stored[(line * (params.n / 8) + n / 8) as usize], n);
            let place = at(row, params.first + i);
            if params.scales == 0 {
                for (w, word) in codes[4 * place..][..4].iter_mut().enumerate() {
                    let inputs = (0..8).map(|t| (t, i * 32 + w as u32 * 8 + t)).filter(|(_, k)| *k < params.inputs);
                    *word = inputs.map(|(t, k)| code(k) << (4 * t)).sum();
                }
            } else {
                let pair = stored[(params.scales + (i * params.n + n) / 2) as usize];
                let zero = nibble(stored[(params.zeros + i * (params.n / 8) + n / 8) as usize], n);
                let zero = u32::from(half::f16::from_f32(zero as f32).to_bits());
                group_params[place] = pair >> (16 * (n % 2)) & 0xffff | zero << 16;
            }
        }
    }
}

/// (n, inputs, skip, rows, first_row, first, per_row, groups or 0 for codes).
pub fn cases() -> Vec<[u32; 8]> {
    vec![
        [32, 32, 0, 32, 0, 0, 1, 0],
        [96, 72, 32, 64, 64, 1, 5, 0],
        [320, 128, 0, 320, 32, 2, 6, 0],
        [96, 72, 32, 64, 64, 1, 5, 3],
        [320, 128, 0, 320, 0, 0, 4, 4],
    ]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for case @ [n, inputs, skip, rows, first_row, first, per_row, groups] in cases() {
        let scales = if groups == 0 { 0 } else { inputs * n / 8 };
        let zeros = scales + groups * n / 2;
        let params = Params { n, inputs, skip, rows, first_row, first, per_row, scales, zeros, pad: [0; 3] };
        let stored: Vec<u32> = (0..inputs * n / 8 + groups * (n / 2 + n / 8)).map(|_| rng.next_u32()).collect();
        let places = ((first_row + rows).next_multiple_of(w4::TILE_N as u32) * per_row) as usize;
        let (mut codes, mut group_params) = (vec![trial::POISON; 4 * places], vec![trial::POISON; places]);
        let storage = vec![stored.clone(), codes.clone(), group_params.clone()];
        let count = if groups == 0 { inputs.div_ceil(32) } else { groups };
        reference(&params, count, &stored, &mut codes, &mut group_params);
        trials.push(Trial {
            label: format!("{case:?}"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step: Step::default(),
            storage,
            grid: grid(&params, count),
            expected: vec![Expected::exact(3, codes), Expected::exact(4, group_params)],
        });
    }
    trials
}
