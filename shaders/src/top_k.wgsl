// The k first candidates of every block of BLOCK, sorted by score descending, then id. The first pass reads scores,
// the following ones the candidates of the pass before, until one block is left. Missing places hold NO_ID.
//
// Mapping: a workgroup a block, bitonic sort in workgroup memory; grid x numbers blocks. Traffic: the input once,
// k / BLOCK of it out.

struct Params {
    n: u32,
    offset: u32,
    k: u32,
    from_scores: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> scores: array<u32>;                 // (offset + n): f32 bits, first pass
@group(0) @binding(3) var<storage, read> candidates: array<vec2<u32>>;       // (n): key, id, following passes
@group(0) @binding(4) var<storage, read_write> kept: array<vec2<u32>>;       // (blocks, k): key, id

var<workgroup> items: array<vec2<u32>, BLOCK>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local_index: u32) {
    let start = group.x * BLOCK;
    if (start >= params.n) {
        return;
    }
    for (var i = local_index; i < BLOCK; i += WG) {
        var item = vec2<u32>(0u, NO_ID);
        if (start + i < params.n) {
            if (params.from_scores != 0u) {
                item = vec2<u32>(sort_key(scores[params.offset + start + i]), start + i);
            } else {
                item = candidates[start + i];
            }
        }
        items[i] = item;
    }
    for (var run = 2u; run <= BLOCK; run *= 2u) {
        for (var distance = run / 2u; distance > 0u; distance /= 2u) {
            // Orders the previous exchanges (or the loading) before these.
            workgroupBarrier();
            for (var i = local_index; i < BLOCK / 2u; i += WG) {
                let low = i / distance * distance * 2u + i % distance;
                let high = low + distance;
                let ascends = (low & run) == 0u;
                let a = items[low];
                let b = items[high];
                if (comes_before(b, a) == ascends) {
                    items[low] = b;
                    items[high] = a;
                }
            }
        }
    }
    // Orders the last exchanges before the output.
    workgroupBarrier();
    for (var i = local_index; i < params.k; i += WG) {
        kept[group.x * params.k + i] = items[i];
    }
}
