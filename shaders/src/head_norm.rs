//! Twin of `head_norm.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 64;

params! {
    /// Uniform at binding 0.
    Params {
        /// Elements of a segment.
        dim: u32,
        /// Segments of a row.
        segments: u32,
        /// Elements of a row of x.
        stride: u32,
        /// First column of the first segment.
        offset: u32,
        /// Added to the mean of squares.
        eps: f32,
        /// Bits [`crate::FLAG_CENTER`], [`crate::FLAG_SEGMENTS`].
        flags: u32,
        /// Unused.
        pad: [u32; 2],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "head_norm",
    body: include_str!("head_norm.wgsl"),
    preludes: &[Prelude::Step, Prelude::Reduce],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    [params.segments, 1, rows]
}

/// Normalises every segment in place, with the bindings of the kernel in order.
pub fn reference(params: &Params, step: &Step, x: &mut [f32], weight: &[f32]) {
    let dim = params.dim as usize;
    for token in 0..step.n_tokens {
        for segment in 0..params.segments {
            let start = (token * params.stride + params.offset + segment * params.dim) as usize;
            let weight_start = if params.flags & FLAG_SEGMENTS != 0 { segment as usize * dim } else { 0 };
            let run = &mut x[start..start + dim];
            let normalised = crate::norm::normalise(run, &weight[weight_start..], params.eps, params.flags);
            run.iter_mut().zip(normalised).for_each(|(x, value)| *x = value as f32);
        }
    }
}

/// Input, output and weight once.
pub fn cost(params: &Params, rows: u32) -> Cost {
    let elements = u64::from(params.dim) * u64::from(params.segments) * u64::from(rows);
    Cost { bytes: trial::word_bytes(2 * elements + u64::from(params.dim)), flops: 4 * elements }
}

/// (dim, segments, tokens, flags): less and more than a workgroup, every flag.
pub fn cases() -> Vec<(u32, u32, u32, u32)> {
    vec![
        (2, 1, 1, 0),
        (48, 3, 2, FLAG_CENTER | FLAG_SEGMENTS),
        (128, 8, 5, 0),
        (257, 2, 3, FLAG_CENTER),
        (80, 5, 1, FLAG_SEGMENTS),
    ]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (dim, segments, n_tokens, flags) in cases() {
        let params = Params { dim, segments, stride: dim * segments + 7, offset: 3, eps: 1e-6, flags, pad: [0; 2] };
        let step = Step { n_tokens, ..Step::default() };
        let mut x = rng.activations((n_tokens * params.stride) as usize);
        let weights = if flags & FLAG_SEGMENTS != 0 { dim * segments } else { dim };
        let weight = rng.values(weights as usize, 2.0);
        let storage = vec![trial::words(&x), trial::words(&weight)];
        let before = x.clone();
        reference(&params, &step, &mut x, &weight);
        // Close to the mean a difference is small and its error is not.
        let center = if flags & FLAG_CENTER != 0 { 1.0 } else { 0.0 };
        // Columns outside the segments must keep their bits.
        let tolerance = x
            .iter()
            .zip(&before)
            .map(|(after, before)| if after == before { 0.0 } else { crate::norm::TOLERANCE * (after.abs() + center) })
            .collect();
        trials.push(Trial {
            label: format!("dim {dim}, {segments} segments, {n_tokens} tokens"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step,
            storage,
            grid: grid(&params, n_tokens),
            expected: vec![Expected::close(2, x, tolerance)],
        });
    }
    trials
}
