//! Twin of `combine.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0.
    Params {
        /// Columns.
        width: u32,
        /// Experts of a token.
        top_k: u32,
        /// Elements of a row of x.
        x_stride: u32,
        /// Elements of a row of routes.
        routes_stride: u32,
        /// Elements of a row of out.
        out_stride: u32,
        /// Unused.
        pad: [u32; 3],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "combine",
    body: include_str!("combine.wgsl"),
    preludes: &[Prelude::Step],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` tokens.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    [params.width.div_ceil(WG), 1, rows]
}

/// The weighted sums in f64.
pub fn reference(params: &Params, step: &Step, x: &[f32], routes: &[f32], out: &mut [f32]) {
    for token in 0..step.n_tokens as usize {
        for i in 0..params.width as usize {
            let part = |e: usize| {
                let row = token * params.top_k as usize + e;
                f64::from(routes[token * params.routes_stride as usize + e])
                    * f64::from(x[row * params.x_stride as usize + i])
            };
            let out = &mut out[token * params.out_stride as usize + i];
            *out = (f64::from(*out) + (0..params.top_k as usize).map(part).sum::<f64>()) as f32;
        }
    }
}

/// Every row read once, the sum read and written.
pub fn cost(params: &Params, rows: u32) -> Cost {
    let elements = u64::from(params.width) * u64::from(rows);
    let top_k = u64::from(params.top_k);
    Cost { bytes: trial::word_bytes(elements * (top_k + 2)), flops: 2 * elements * top_k }
}

/// Sums of a few products, relative to the largest value.
const TOLERANCE: f32 = 2e-6;

/// (width, top_k, tokens): one element, less and more than a workgroup.
pub fn cases() -> Vec<(u32, u32, u32)> {
    vec![(1, 1, 1), (100, 2, 3), (300, 8, 2)]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (width, top_k, n_tokens) in cases() {
        let (x_stride, routes_stride, out_stride) = (width + 2, 2 * top_k + 1, width + 3);
        let params = Params { width, top_k, x_stride, routes_stride, out_stride, pad: [0; 3] };
        let step = Step { n_tokens, ..Step::default() };
        let x = rng.activations((n_tokens * top_k * x_stride) as usize);
        let routes = group::random_routes(2 * top_k, top_k, n_tokens, routes_stride, rng);
        let mut out = rng.values((n_tokens * out_stride) as usize, 10.0);
        let storage = vec![trial::words(&x), trial::words(&routes), trial::words(&out)];
        reference(&params, &step, &x, &routes, &mut out);
        trials.push(Trial {
            label: format!("width {width}, {top_k} experts, {n_tokens} tokens"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step,
            storage,
            grid: grid(&params, n_tokens),
            expected: vec![Expected::near(4, out, TOLERANCE)],
        });
    }
    trials
}
