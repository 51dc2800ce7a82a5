//! Twin of `group.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
use crate::*;

pub use crate::route::EXPERTS_MAX;

/// Invocations of the workgroup.
pub const WG: u32 = 256;
/// Pairs of a tile: rows of a tiled product.
pub const TILE: u32 = gemm_w4::TILE;

params! {
    /// Uniform at binding 0.
    Params {
        /// Experts of a layer, at most [`EXPERTS_MAX`].
        experts: u32,
        /// Experts of a token.
        top_k: u32,
        /// Elements of a row of routes.
        routes_stride: u32,
        /// Tiles written.
        tiles_max: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "group",
    body: include_str!("group.wgsl"),
    preludes: &[Prelude::Step],
    constants: &[("WG", WG), ("EXPERTS_MAX", EXPERTS_MAX), ("TILE", TILE)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Tiles that `tokens` tokens can need, whichever experts they choose.
pub fn tiles(experts: u32, top_k: u32, tokens: u32) -> u32 {
    let pairs = tokens.saturating_mul(top_k);
    pairs / TILE + experts.min(pairs)
}

/// Dispatch for any number of tokens.
pub fn grid() -> [u32; 3] {
    [1, 1, 1]
}

/// The pairs in the order of their experts, and the tiles.
pub fn reference(params: &Params, step: &Step, routes: &[f32], pairs: &mut [u32], tiles: &mut [[u32; 4]]) {
    let (top_k, n) = (params.top_k as usize, (step.n_tokens * params.top_k) as usize);
    let expert = |pair: &u32| {
        let (token, i) = (*pair as usize / top_k, *pair as usize % top_k);
        routes[token * params.routes_stride as usize + top_k + i] as u32
    };
    let mut order: Vec<u32> = (0..n as u32).collect();
    order.sort_by_key(expert);
    pairs[..n].copy_from_slice(&order);
    let mut filled = 0;
    for own in order.chunk_by(|a, b| expert(a) == expert(b)) {
        for part in own.chunks(TILE as usize) {
            let first = order.iter().position(|pair| *pair == part[0]).unwrap_or(0);
            tiles[filled] = [expert(&part[0]), first as u32, part.len() as u32, 0];
            filled += 1;
        }
    }
    tiles[filled..params.tiles_max as usize].fill([0; 4]);
}

/// The routes twice an expert, mostly from cache.
pub fn cost(params: &Params, rows: u32) -> Cost {
    let pairs = u64::from(rows) * u64::from(params.top_k);
    Cost { bytes: trial::word_bytes(2 * pairs), flops: 2 * pairs * u64::from(params.experts) }
}

/// (experts, top_k, tokens): one, more experts than invocations, more pairs of an expert than a tile.
pub fn cases() -> Vec<(u32, u32, u32)> {
    vec![(1, 1, 1), (8, 2, 40), (300, 4, 9), (2, 2, 150), (3, 1, 200)]
}

/// Random routes of distinct experts a token; weights in [0, 1).
pub(crate) fn random_routes(experts: u32, top_k: u32, tokens: u32, stride: u32, rng: &mut Rng) -> Vec<f32> {
    let mut routes = trial::poisoned((tokens * stride) as usize);
    for row in routes.chunks_mut(stride as usize) {
        let mut left: Vec<u32> = (0..experts).collect();
        for i in 0..top_k as usize {
            row[i] = rng.range(0.0, 1.0);
            row[top_k as usize + i] = left.swap_remove(rng.below(left.len() as u32) as usize) as f32;
        }
    }
    routes
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (experts, top_k, n_tokens) in cases() {
        let params =
            Params { experts, top_k, routes_stride: 2 * top_k + 1, tiles_max: tiles(experts, top_k, n_tokens) + 2 };
        let step = Step { n_tokens, ..Step::default() };
        let routes = random_routes(experts, top_k, n_tokens, params.routes_stride, rng);
        let mut pairs = vec![trial::POISON; (n_tokens * top_k + 3) as usize];
        let mut found = vec![[trial::POISON; 4]; params.tiles_max as usize + 1];
        let storage = vec![trial::words(&routes), pairs.clone(), found.as_flattened().to_vec()];
        reference(&params, &step, &routes, &mut pairs, &mut found);
        trials.push(Trial {
            label: format!("{top_k} of {experts} experts, {n_tokens} tokens"),
            params: bytemuck::bytes_of(&params).to_vec(),
            step,
            storage,
            grid: grid(),
            expected: vec![Expected::exact(3, pairs), Expected::exact(4, found.as_flattened().to_vec())],
        });
    }
    trials
}
