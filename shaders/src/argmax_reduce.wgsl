// The id of the best of n candidates, written to result[0]; 0 if none of them can be chosen.
//
// Mapping: one workgroup. Traffic: the candidates once.

struct Params {
    n: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> candidates: array<vec2<u32>>;    // (n): key, id
@group(0) @binding(3) var<storage, read_write> result: array<u32>;        // (1)

var<workgroup> best: array<vec2<u32>, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(local_invocation_index) local_index: u32) {
    var mine = vec2<u32>(0u, NO_ID);
    for (var i = local_index; i < params.n; i += WG) {
        if (comes_before(candidates[i], mine)) {
            mine = candidates[i];
        }
    }
    best[local_index] = mine;
    // Orders the writes before the tree, and below one level of the tree before the next.
    workgroupBarrier();
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        if (local_index < half && comes_before(best[local_index + half], best[local_index])) {
            best[local_index] = best[local_index + half];
        }
        workgroupBarrier();
    }
    if (local_index == 0u) {
        result[0] = select(0u, best[0].y, best[0].x > NEVER_KEY);
    }
}
