//! Twin of `gemv_w4_swiglu.wgsl`; the formula and the mapping are in its header.

use crate::gemv_w4::{Case, Data, input};
use crate::trial::Expected;
use crate::w4::{self, Matrix};
use crate::*;

pub use crate::gemv_w4::{Params, cost};

/// Invocations of a workgroup.
pub const WG: u32 = 256;
/// Bytes of inputs in workgroup memory.
pub const X_BYTES: u32 = 8192;

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemv_w4_swiglu",
    body: include_str!("gemv_w4_swiglu.wgsl"),
    preludes: &[Prelude::Step, Prelude::W4, Prelude::Elem, Prelude::Reduce, Prelude::GemvW4],
    constants: &[("WG", WG), ("X_BYTES", X_BYTES)],
    large: &[("WG", 512), ("X_BYTES", 16384)],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` input rows.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    crate::grid((params.n / 2).div_ceil(w4::TILE_N as u32), rows)
}

/// Gate and up of output `i` in f64.
fn gate_up(params: &Params, x: &[f32], matrix: &Matrix, bias: &[f32], i: usize) -> [f64; 2] {
    let width = params.n as usize / 2;
    let bias = &bias[params.bias_offset as usize..];
    [i, width + i].map(|n| matrix.product(n, x) + w4::bias_of(params.flags, bias, n))
}

/// out = silu(gate) * up in f64, with the bindings of the kernel in order.
pub fn reference(
    params: &Params,
    step: &Step,
    x: &[f32],
    matrix: &Matrix,
    bias: &[f32],
    norm: &[f32],
    out: &mut [f32],
) {
    for row in 0..RowMode::from_u32(params.row_mode).count(step) {
        let x = input(params, step, x, norm, row);
        for i in 0..params.n as usize / 2 {
            let [gate, up] = gate_up(params, &x, matrix, bias, i);
            out[(row * params.out_stride + params.out_offset) as usize + i] =
                (gate / (1.0 + (-gate).exp()) * up) as f32;
        }
    }
}

/// Ragged widths, groups that cut a chunk, several rows, more inputs than workgroup memory holds at once.
pub fn cases() -> Vec<Case> {
    let all = RowMode::All;
    let case = |n, k, group_size, tokens, flags| Case { n, k, group_size, tokens, row_mode: all, flags };
    vec![
        case(2, 8, 8, 1, 0),
        case(70, 64, 32, 3, FLAG_BIAS | FLAG_NORM),
        case(14, 72, 24, 2, FLAG_OFFSET_IS_BIAS),
        case(66, 4352, 128, 1, FLAG_NORM),
        case(10, 8704, 64, 1, FLAG_NORM | FLAG_SUMS),
    ]
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let f16 = variant.elem == Elem::F16;
    let one = |case: Case, rng: &mut Rng| {
        let width = case.n / 2;
        let mut data = Data::random(case, width, rng);
        // Gates of some tens, not thousands: beyond that silu is the identity or zero.
        data.x.iter_mut().for_each(|v| *v *= 0.05);
        let Data { params, step, rows, x, matrix, bias, norm } = &data;
        let mut out = trial::poisoned((rows * params.out_stride) as usize);
        let mut storage = data.storage();
        storage.push(trial::words(&out));
        reference(params, step, x, matrix, bias, norm, &mut out);
        let mut tolerance = vec![0.0; out.len()];
        for row in 0..*rows {
            let x = input(params, step, x, norm, row);
            for i in 0..width as usize {
                let [gate, up] = gate_up(params, &x, matrix, bias, i).map(|v| v.abs() as f32);
                let [gate_off, up_off] =
                    [i, width as usize + i].map(|n| matrix.tolerance(n, &x, f16) + 1e-6 * (gate + up + 20.0));
                // silu is at most |v| + 0.3 and changes at most 1.1 times as fast as its argument.
                let at = (row * params.out_stride + params.out_offset) as usize + i;
                tolerance[at] = 1.1 * gate_off * (up + up_off) + up_off * (gate + 0.3) + 1e-5 * out[at].abs();
            }
        }
        Trial {
            label: format!("{case:?}"),
            params: bytemuck::bytes_of(params).to_vec(),
            step: *step,
            storage,
            grid: grid(params, *rows),
            expected: vec![Expected::close(7, out, tolerance)],
        }
    };
    cases().into_iter().map(|case| one(case, rng)).collect()
}
