//! Twin of `arrange.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0.
    Params {
        /// Elements of a row.
        width: u32,
        /// Elements of a row of x.
        x_stride: u32,
        /// Elements of a row of out.
        out_stride: u32,
        /// Bits [`crate::FLAG_ORDER`], [`crate::FLAG_FACTORS`].
        flags: u32,
        /// [`crate::RowMode`].
        row_mode: u32,
        /// Unused.
        pad: [u32; 3],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "arrange",
    body: include_str!("arrange.wgsl"),
    preludes: &[Prelude::Step],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    [params.width.div_ceil(WG), 1, rows]
}

/// Moves and scales the elements of the rows, with the bindings of the kernel in order.
pub fn reference(params: &Params, step: &Step, x: &[f32], order: &[u32], factors: &[f32], out: &mut [f32]) {
    let mode = RowMode::from_u32(params.row_mode);
    for row in 0..mode.count(step) {
        for i in 0..params.width as usize {
            let column = if params.flags & FLAG_ORDER != 0 { order[i] as usize } else { i };
            let value = x[(mode.input_row(step, row) * params.x_stride) as usize + column];
            let factor = if params.flags & FLAG_FACTORS != 0 { factors[i] } else { 1.0 };
            out[(row * params.out_stride) as usize + i] = value * factor;
        }
    }
}

/// A row in and out, the order and the factors once.
pub fn cost(params: &Params, rows: u32) -> Cost {
    let words = u64::from(params.width) * (2 * u64::from(rows) + 2);
    Cost { bytes: trial::word_bytes(words), flops: u64::from(params.width) * u64::from(rows) }
}

/// (width, tokens, rows, flags).
pub fn cases() -> Vec<(u32, u32, RowMode, u32)> {
    vec![
        (1, 1, RowMode::All, FLAG_ORDER),
        (300, 3, RowMode::All, FLAG_ORDER | FLAG_FACTORS),
        (37, 5, RowMode::Compacted, FLAG_FACTORS),
        (513, 4, RowMode::Logits, FLAG_ORDER),
    ]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (width, tokens, row_mode, flags) in cases() {
        let params =
            Params { width, x_stride: width + 3, out_stride: width + 1, flags, row_mode: row_mode as u32, pad: [0; 3] };
        let step = Step { n_tokens: tokens, position: 0, logits_start: tokens / 2, logits_rows: tokens - tokens / 2 };
        let rows = row_mode.count(&step);
        let x = rng.values((tokens * params.x_stride) as usize, 10.0);
        let mut order: Vec<u32> = (0..width).collect();
        for i in (1..width).rev() {
            order.swap(i as usize, rng.below(i + 1) as usize);
        }
        let factors = rng.values(width as usize, 3.0);
        let mut out = trial::poisoned((rows * params.out_stride) as usize);
        let storage = vec![trial::words(&x), order.clone(), trial::words(&factors), trial::words(&out)];
        reference(&params, &step, &x, &order, &factors, &mut out);
        let tolerance = vec![1e-5; out.len()];
        trials.push(Trial {
            label: format!("width {width}, {tokens} tokens, {row_mode:?}"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step,
            storage,
            grid: grid(&params, rows),
            expected: vec![Expected::close(5, out, tolerance)],
        });
    }
    trials
}
