// Attention over one split of the positions, eight elements at a time: the body of attention_few.wgsl and
// attention_each.wgsl, which say where keys and values lie. They define `params` and the bindings qkv, partial_out and
// partial_ml.

// What four positions hold, PASSES of them.
struct Four {
    a: KvWords,
    b: KvWords,
    c: KvWords,
    d: KvWords,
}

const LOWEST: f32 = -3.0e38;

var<workgroup> scratch: array<vec4<f32>, PASSES * WG>;
var<workgroup> scores: array<vec4<f32>, PASSES * WG / 2u>;

// Of four positions.
fn eights(first: Four, last: Four, row: vec4<u32>, lane: u32, lanes: u32) -> array<Eight, PASSES> {
    return array<Eight, PASSES>(
        kv_eight(first.a, last.a, row.x, lane, lanes),
        kv_eight(first.b, last.b, row.y, lane, lanes),
        kv_eight(first.c, last.c, row.z, lane, lanes),
        kv_eight(first.d, last.d, row.w, lane, lanes),
    );
}

// Dot products of eight elements with those of the HEADS query heads.
fn scores_of(k: Eight, q_lo: mat4x4<f32>, q_hi: mat4x4<f32>) -> vec4<f32> {
    return k.lo * q_lo + k.hi * q_hi;
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local_index: u32) {
    let place = place_of(group.z);
    let token = place.row;
    let heads = heads_of(group.x);
    if (!place.is_there || heads.kv >= params.kv_heads) {
        return;
    }
    let split = split_of(place.position, group.y);
    if (split.begin >= split.end) {
        return;
    }

    let lanes = params.head_dim / 8u;
    // Invocations beyond the last whole position repeat lanes of it and are not counted.
    let at_once = min(WG / lanes, WG / 2u);
    let slot = min(local_index / lanes, at_once - 1u);
    let lane = local_index % lanes;
    let counts = local_index < at_once * lanes;

    // Columns are query heads; those beyond the last repeat it.
    var q_lo: mat4x4<f32>;
    var q_hi: mat4x4<f32>;
    for (var h = 0u; h < HEADS; h++) {
        let head = heads.first + min(h, heads.count - 1u);
        let q_at = token * params.qkv_stride / 4u + head * lanes * 2u + lane * 2u;
        q_lo[h] = qkv[q_at] * params.scale;
        q_hi[h] = qkv[q_at + 1u] * params.scale;
    }

    var out: array<vec4<f32>, 8>;
    for (var i = 0u; i < 8u; i++) {
        out[i] = vec4<f32>(0.0);
    }
    var largest = vec4<f32>(LOWEST);
    var sum = vec4<f32>(0.0);
    let tile_len = PASSES * at_once;
    var count = 0u;
    for (var tile = split.begin; tile < split.end; tile += count) {
        // A tile lies in one part.
        let is_shared = tile < place.prefix;
        count = min(tile_len, select(split.end, min(split.end, place.prefix), is_shared) - tile);
        let positions = select(place.context - place.prefix, place.prefix, is_shared);
        let first = kv_row(tile - select(place.prefix, 0u, is_shared), heads.kv, positions, params.kv_heads);
        // Positions beyond the last one repeat it and get no weight.
        let slots = vec4<u32>(slot, at_once + slot, 2u * at_once + slot, 3u * at_once + slot);
        let row = first + min(slots, vec4<u32>(count - 1u)) * kv_step(params.kv_heads);
        let rows = params.kv_heads * positions;
        let firsts = kv_firsts(row, lane, lanes);
        let lasts = kv_lasts(row, lane, lanes, rows);
        var keys =
            eights(four_keys(group.z, firsts, is_shared), four_keys(group.z, lasts, is_shared), row, lane, lanes);
        var values =
            eights(four_values(group.z, firsts, is_shared), four_values(group.z, lasts, is_shared), row, lane, lanes);
        for (var pass_index = 0u; pass_index < PASSES; pass_index++) {
            scratch[pass_index * WG + local_index] = scores_of(keys[pass_index], q_lo, q_hi);
        }
        // Orders the partial scores before their sums.
        workgroupBarrier();
        for (var i = local_index; i < count; i += WG) {
            let start = i / at_once * WG + i % at_once * lanes;
            var score = scratch[start];
            for (var l = 1u; l < lanes; l++) {
                score += scratch[start + l];
            }
            scores[i] = softcap4(score, params.cap);
        }
        // Orders the scores before every invocation looks for the largest.
        workgroupBarrier();
        var new_largest = largest;
        for (var i = 0u; i < count; i++) {
            new_largest = max(new_largest, scores[i]);
        }
        let correction = exp(max(largest - new_largest, vec4<f32>(-100.0)));
        largest = new_largest;
        sum *= correction;
        for (var i = 0u; i < 8u; i++) {
            out[i] *= correction;
        }
        for (var pass_index = 0u; pass_index < PASSES; pass_index++) {
            let i = pass_index * at_once + slot;
            if (counts && i < count) {
                let weight = exp(scores[i] - largest);
                sum += weight;
                let v = values[pass_index];
                for (var e = 0u; e < 4u; e++) {
                    out[e] = fma(weight, vec4<f32>(v.lo[e]), out[e]);
                    out[e + 4u] = fma(weight, vec4<f32>(v.hi[e]), out[e + 4u]);
                }
            }
        }
        // Orders these reads of the scores before the next tile's, and its partial scores.
        workgroupBarrier();
    }

    // Adds up what the slots hold, half of the elements at a time, then the sums.
    for (var half = 0u; half < 3u; half++) {
        for (var e = 0u; e < 4u; e++) {
            if (half < 2u) {
                scratch[local_index * 4u + e] = select(out[e], out[e + 4u], vec4<bool>(half == 1u));
            }
        }
        if (half == 2u) {
            scratch[local_index] = sum;
        }
        // Orders the parts before their sums.
        workgroupBarrier();
        let width = select(lanes * 4u, 1u, half == 2u);
        for (var i = local_index; i < width; i += WG) {
            let start = select(i, 0u, half == 2u);
            let stride = select(lanes * 4u, lanes, half == 2u);
            var total = scratch[start];
            for (var s = 1u; s < at_once; s++) {
                total += scratch[start + s * stride];
            }
            for (var h = 0u; h < heads.count; h++) {
                let row = (token * params.heads + heads.first + h) * params.splits_max + group.y;
                if (half == 2u) {
                    partial_ml[row] = vec2<f32>(largest[h], total[h]);
                } else {
                    partial_out[row * params.head_dim + i / 4u * 8u + half * 4u + i % 4u] = total[h];
                }
            }
        }
        // Orders these reads before the next parts.
        workgroupBarrier();
    }
}
