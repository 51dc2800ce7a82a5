//! Twin of `scale.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0.
    Params {
        /// Columns worked on.
        width: u32,
        /// Elements of a row.
        stride: u32,
        /// Factor.
        scale: f32,
        /// Bound of the magnitude; 0 for none.
        cap: f32,
        /// [`crate::RowMode`]: all rows, or compacted ones.
        row_mode: u32,
        /// Unused.
        pad: [u32; 3],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "scale",
    body: include_str!("scale.wgsl"),
    preludes: &[Prelude::Step, Prelude::Softcap],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    [params.width.div_ceil(WG), 1, rows]
}

/// cap * tanh(value / cap), or the value itself for a cap of 0.
pub fn softcap(value: f64, cap: f32) -> f64 {
    if cap > 0.0 { f64::from(cap) * (value / f64::from(cap)).tanh() } else { value }
}

/// The formula of the kernel in f64.
pub fn reference(params: &Params, step: &Step, x: &mut [f32]) {
    for row in 0..RowMode::from_u32(params.row_mode).count(step) {
        for value in &mut x[(row * params.stride) as usize..][..params.width as usize] {
            *value = softcap(f64::from(*value) * f64::from(params.scale), params.cap) as f32;
        }
    }
}

/// The elements read and written.
pub fn cost(params: &Params, rows: u32) -> Cost {
    let elements = u64::from(params.width) * u64::from(rows);
    Cost { bytes: trial::word_bytes(2 * elements), flops: 2 * elements }
}

/// Relative to a value, and for caps relative to the cap: tanh of devices is good to some units in the last place of 1.
const TOLERANCE: f32 = 2e-6;

/// (width, tokens, scale, cap, row mode): a factor alone, caps that bound little and much.
pub fn cases() -> Vec<(u32, u32, f32, f32, RowMode)> {
    vec![(1, 1, 0.125, 0.0, RowMode::All), (300, 3, 1.0, 30.0, RowMode::Compacted), (513, 4, 0.25, 0.5, RowMode::All)]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (width, n_tokens, scale, cap, row_mode) in cases() {
        let params = Params { width, stride: width + 3, scale, cap, row_mode: row_mode as u32, pad: [0; 3] };
        let step = Step { n_tokens, position: 0, logits_start: n_tokens / 2, logits_rows: n_tokens - n_tokens / 2 };
        let mut x = rng.activations((n_tokens * params.stride) as usize);
        let storage = vec![trial::words(&x)];
        reference(&params, &step, &mut x);
        let tolerance = x.iter().map(|v| TOLERANCE * (v.abs() + cap)).collect();
        trials.push(Trial {
            label: format!("width {width}, {n_tokens} tokens, scale {scale}, cap {cap}, {row_mode:?}"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step,
            storage,
            grid: grid(&params, row_mode.count(&step)),
            expected: vec![Expected::close(2, x, tolerance)],
        });
    }
    trials
}
