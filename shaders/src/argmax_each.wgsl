// As argmax.wgsl, for the scores of up to MEMBERS sessions, a buffer each: rows first_row.. of the candidates.
//
// Mapping: a workgroup a block of BLOCK scores; grid x numbers blocks, y sessions. Traffic: the scores once.

struct Params {
    n: u32,
    first_row: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
// By session: (n) f32 bits.
@group(0) @binding(2) var<storage, read> s0: array<u32>;
@group(0) @binding(3) var<storage, read> s1: array<u32>;
@group(0) @binding(4) var<storage, read> s2: array<u32>;
@group(0) @binding(5) var<storage, read> s3: array<u32>;
@group(0) @binding(6) var<storage, read> s4: array<u32>;
@group(0) @binding(7) var<storage, read> s5: array<u32>;
@group(0) @binding(8) var<storage, read> s6: array<u32>;
@group(0) @binding(9) var<storage, read> s7: array<u32>;
@group(0) @binding(10) var<storage, read_write> candidates: array<vec2<u32>>;    // (rows, blocks): key, id

fn score(session: u32, at: u32) -> u32 {
    switch session {
        case 0u: { return s0[at]; }
        case 1u: { return s1[at]; }
        case 2u: { return s2[at]; }
        case 3u: { return s3[at]; }
        case 4u: { return s4[at]; }
        case 5u: { return s5[at]; }
        case 6u: { return s6[at]; }
        default: { return s7[at]; }
    }
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local_index: u32) {
    let start = group.x * BLOCK;
    if (start >= params.n || group.y >= MEMBERS) {
        return;
    }
    var mine = vec2<u32>(0u, NO_ID);
    let end = min(params.n, start + BLOCK);
    for (var i = start + local_index; i < end; i += WG) {
        let candidate = vec2<u32>(sort_key(score(group.y, i)), i);
        if (comes_before(candidate, mine)) {
            mine = candidate;
        }
    }
    let first = best_of_all(local_index, mine);
    if (local_index == 0u) {
        let blocks = (params.n + BLOCK - 1u) / BLOCK;
        candidates[(params.first_row + group.y) * blocks + group.x] = first;
    }
}
