//! Twin of `round_groups.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 64;

params! {
    /// Uniform at binding 0.
    Params {
        /// Rows.
        n: u32,
        /// Columns; a multiple of `group_size`.
        k: u32,
        /// Words of a row of w and out.
        row_words: u32,
        /// Columns that share a step.
        group_size: u32,
        /// Largest code.
        max_code: f32,
        /// Whether the zero point is the middle of the codes.
        symmetric: u32,
        /// Unused.
        pad: [u32; 2],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "round_groups",
    body: include_str!("round_groups.wgsl"),
    preludes: &[],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch.
pub fn grid(params: &Params, _rows: u32) -> [u32; 3] {
    crate::grid(params.n * (params.k / params.group_size), 1)
}

/// The rounded matrix (n, k) and the steps of its groups.
pub fn reference(params: &Params, w: &[f32], s: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (k, group) = (params.k as usize, params.group_size as usize);
    let (mut out, mut steps) = (Vec::new(), Vec::new());
    for row in w.chunks_exact(k) {
        for (w, s) in row.chunks_exact(group).zip(s.chunks_exact(group)) {
            let scaled: Vec<f32> = w.iter().zip(s).map(|(w, s)| w * s).collect();
            let low = scaled.iter().fold(0f32, |m, &v| m.min(v));
            let high = scaled.iter().fold(0f32, |m, &v| m.max(v));
            let symmetric = params.symmetric != 0;
            let range = if symmetric { 2.0 * high.max(-low) } else { high - low };
            let step = range.max(1e-5) / params.max_code;
            let zero = match symmetric {
                true => (params.max_code + 1.0) / 2.0,
                false => (-low / step).round_ties_even().clamp(0.0, params.max_code),
            };
            out.extend(scaled.iter().zip(s).map(|(v, s)| {
                let code = ((v / step).round_ties_even() + zero).clamp(0.0, params.max_code);
                (code - zero) * step / s
            }));
            steps.push(step);
        }
    }
    (out, steps)
}

/// Weights once in and once out.
pub fn cost(params: &Params, _rows: u32) -> Cost {
    let elements = u64::from(params.n) * u64::from(params.k);
    Cost { bytes: 8 * elements, flops: 12 * elements }
}

/// (n, k, group size, bits, symmetric): small and large groups, several rows, every width.
pub fn cases() -> Vec<(u32, u32, u32, u32, bool)> {
    vec![
        (1, 8, 8, 4, false),
        (3, 96, 32, 2, false),
        (5, 256, 128, 3, true),
        (2, 640, 640, 8, false),
        (7, 64, 64, 4, true),
    ]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (n, k, group_size, bits, symmetric) in cases() {
        let (row_words, max_code) = (k + 4, ((1u32 << bits) - 1) as f32);
        let params = Params { n, k, row_words, group_size, max_code, symmetric: symmetric.into(), pad: [0; 2] };
        // Away from the middle between two codes, where a last bit decides; and a group of zeros.
        let mut w = rng.values((n * k) as usize, 1.0);
        w[..group_size as usize / 2].fill(0.0);
        let s: Vec<f32> = (0..k).map(|_| rng.range(0.5, 2.0)).collect();
        let (values, steps) = reference(&params, &w, &s);
        let mut tolerance = Vec::new();
        for (i, value) in values.iter().enumerate() {
            let (step, scale) = (steps[i / group_size as usize], s[i % k as usize]);
            let place = w[i] * scale / step;
            // On a boundary either neighbour is right.
            let undecided = (place - place.floor() - 0.5).abs() < 1e-3;
            tolerance.push(if undecided { 1.01 * step / scale } else { 1e-5 * value.abs() + 1e-6 });
        }
        let mut padded_w = trial::poisoned((n * row_words) as usize);
        let mut padded = padded_w.clone();
        let mut padded_tolerance = vec![0.0; padded.len()];
        for row in 0..n as usize {
            let (at, from) = (row * row_words as usize, row * k as usize);
            padded_w[at..at + k as usize].copy_from_slice(&w[from..from + k as usize]);
            padded[at..at + k as usize].copy_from_slice(&values[from..from + k as usize]);
            padded_tolerance[at..at + k as usize].copy_from_slice(&tolerance[from..from + k as usize]);
        }
        trials.push(Trial {
            label: format!("{n} x {k}, groups of {group_size}, {bits} bits, symmetric {symmetric}"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step: Step { n_tokens: 1, position: 0, logits_start: 0, logits_rows: 1 },
            storage: vec![trial::words(&padded_w), trial::words(&s), trial::words(&trial::poisoned(padded.len()))],
            grid: grid(&params, 1),
            expected: vec![Expected::close(4, padded, padded_tolerance)],
        });
    }
    trials
}
