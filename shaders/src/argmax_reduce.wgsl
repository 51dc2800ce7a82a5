// The id of the best of n candidates of every row, written to result[row] where bit `row` of `rows` is set; 0 if none of
// them can be chosen.
//
// Mapping: a workgroup a row. Traffic: the candidates once.

struct Params {
    n: u32,
    rows: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> candidates: array<vec2<u32>>;    // (rows, n): key, id
@group(0) @binding(3) var<storage, read_write> result: array<u32>;        // (rows)

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local_index: u32) {
    let start = group.x * params.n;
    var mine = vec2<u32>(0u, NO_ID);
    for (var i = local_index; i < params.n; i += WG) {
        let candidate = candidates[start + i];
        if (comes_before(candidate, mine)) {
            mine = candidate;
        }
    }
    let first = best_of_all(local_index, mine);
    if (local_index == 0u && (params.rows >> min(group.x, 31u) & 1u) == 1u) {
        result[group.x] = select(0u, first.y, first.x > NEVER_KEY);
    }
}
