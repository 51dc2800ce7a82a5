// Brings the rows that go through the same expert together: pairs (token * top_k + i) in the order of their experts, and
// the tiles of at most TILE pairs of one expert: (expert, first pair, number of pairs); the rest of the tiles has no pairs.
//
// Mapping: one workgroup; an invocation an expert, going over all routes twice. Traffic: the routes, from cache.

struct Params {
    experts: u32,
    top_k: u32,
    routes_stride: u32,
    tiles_max: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> routes: array<f32>;              // (n_tokens, routes_stride)
@group(0) @binding(3) var<storage, read_write> pairs: array<u32>;         // (n_tokens * top_k)
@group(0) @binding(4) var<storage, read_write> tiles: array<vec4<u32>>;   // (tiles_max)

// Pairs of every expert, then its first place.
var<workgroup> places: array<u32, EXPERTS_MAX>;

fn expert_of(pair: u32) -> u32 {
    return u32(routes[pair / params.top_k * params.routes_stride + params.top_k + pair % params.top_k]);
}

@compute @workgroup_size(WG)
fn main(@builtin(local_invocation_index) local_index: u32) {
    let n = step.n_tokens * params.top_k;
    for (var expert = local_index; expert < params.experts; expert += WG) {
        var count = 0u;
        for (var pair = 0u; pair < n; pair++) {
            count += select(0u, 1u, expert_of(pair) == expert);
        }
        places[expert] = count;
    }
    // Orders the counts before places are dealt.
    workgroupBarrier();
    if (local_index == 0u) {
        var place = 0u;
        var tile = 0u;
        for (var expert = 0u; expert < params.experts; expert++) {
            let count = places[expert];
            places[expert] = place;
            for (var done = 0u; done < count && tile < params.tiles_max; done += TILE) {
                tiles[tile] = vec4<u32>(expert, place + done, min(TILE, count - done), 0u);
                tile += 1u;
            }
            place += count;
        }
        for (; tile < params.tiles_max; tile++) {
            tiles[tile] = vec4<u32>(0u);
        }
    }
    // Orders the places before they are taken.
    workgroupBarrier();
    for (var expert = local_index; expert < params.experts; expert += WG) {
        var place = places[expert];
        for (var pair = 0u; pair < n; pair++) {
            if (expert_of(pair) == expert) {
                pairs[place] = pair;
                place += 1u;
            }
        }
    }
}
