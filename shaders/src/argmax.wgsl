// The best (key, id) of every block of scores: the largest score, the lowest id among equals, NaN behind everything.
//
// Mapping: a workgroup a block of BLOCK scores; grid x numbers blocks. Traffic: the scores once.

struct Params {
    n: u32,
    offset: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> scores: array<u32>;                    // (offset + n): f32 bits
@group(0) @binding(3) var<storage, read_write> candidates: array<vec2<u32>>;    // (blocks): key, id

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local_index: u32) {
    let start = group.x * BLOCK;
    if (start >= params.n) {
        return;
    }
    var mine = vec2<u32>(0u, NO_ID);
    let end = min(params.n, start + BLOCK);
    for (var i = start + local_index; i < end; i += WG) {
        let candidate = vec2<u32>(sort_key(scores[params.offset + i]), i);
        if (comes_before(candidate, mine)) {
            mine = candidate;
        }
    }
    let first = best_of_all(local_index, mine);
    if (local_index == 0u) {
        candidates[group.x] = first;
    }
}
