//! Twin of `route.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 64;
/// Most experts of a layer.
pub const EXPERTS_MAX: u32 = 1024;

params! {
    /// Uniform at binding 0.
    Params {
        /// Experts of a layer, at most [`EXPERTS_MAX`].
        experts: u32,
        /// Experts of a token.
        top_k: u32,
        /// Elements of a row of logits.
        logits_stride: u32,
        /// Elements of a row of routes.
        routes_stride: u32,
        /// 1 to divide weights by their sum.
        renormalise: u32,
        /// Unused.
        pad: [u32; 3],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "route",
    body: include_str!("route.wgsl"),
    preludes: &[Prelude::Step],
    constants: &[("WG", WG), ("EXPERTS_MAX", EXPERTS_MAX)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` tokens.
pub fn grid(_params: &Params, rows: u32) -> [u32; 3] {
    [1, 1, rows]
}

/// The routes in f64.
pub fn reference(params: &Params, step: &Step, logits: &[f32], routes: &mut [f32]) {
    let top_k = params.top_k as usize;
    for token in 0..step.n_tokens as usize {
        let logits = &logits[token * params.logits_stride as usize..][..params.experts as usize];
        let mut order: Vec<usize> = (0..logits.len()).collect();
        // Both zeros are equal: adding one makes them the same.
        order.sort_by(|a, b| (logits[*b] + 0.0).total_cmp(&(logits[*a] + 0.0)));
        let weight = |i: usize| (f64::from(logits[i]) - f64::from(logits[order[0]])).exp();
        let among = if params.renormalise != 0 { top_k } else { logits.len() };
        let sum: f64 = order[..among].iter().map(|&i| weight(i)).sum();
        let row = &mut routes[token * params.routes_stride as usize..];
        for (i, &expert) in order[..top_k].iter().enumerate() {
            row[i] = (weight(expert) / sum) as f32;
            row[top_k + i] = expert as f32;
        }
    }
}

/// The logits once, an exponential each and the search.
pub fn cost(params: &Params, rows: u32) -> Cost {
    let elements = u64::from(params.experts) * u64::from(rows);
    Cost { bytes: trial::word_bytes(elements), flops: elements * (4 + u64::from(params.top_k)) }
}

/// (experts, top_k, tokens, renormalise): fewer and more experts than invocations, one, all, equal logits.
pub fn cases() -> Vec<(u32, u32, u32, bool)> {
    vec![(1, 1, 1, false), (8, 2, 5, true), (60, 4, 3, false), (128, 8, 2, true), (300, 16, 2, false), (5, 5, 2, true)]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (experts, top_k, n_tokens, renormalise) in cases() {
        let params = Params {
            experts,
            top_k,
            logits_stride: experts + 1,
            routes_stride: 2 * top_k + 2,
            renormalise: u32::from(renormalise),
            pad: [0; 3],
        };
        let step = Step { n_tokens, ..Step::default() };
        // Few different values, so that some are equal.
        let logits: Vec<f32> =
            (0..n_tokens * params.logits_stride).map(|_| rng.range(-9.0, 9.0).round() / 2.0).collect();
        let mut routes = trial::poisoned((n_tokens * params.routes_stride) as usize);
        let storage = vec![trial::words(&logits), trial::words(&routes)];
        reference(&params, &step, &logits, &mut routes);
        let is_weight = |at: usize| at % (params.routes_stride as usize) < top_k as usize;
        let tolerance = (0..routes.len()).map(|at| if is_weight(at) { 2e-6 } else { 0.0 }).collect();
        trials.push(Trial {
            label: format!("{top_k} of {experts} experts, {n_tokens} tokens, renormalise {renormalise}"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step,
            storage,
            grid: grid(&params, n_tokens),
            expected: vec![Expected::close(3, routes, tolerance)],
        });
    }
    trials
}
