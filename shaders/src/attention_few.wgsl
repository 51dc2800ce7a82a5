// As attention.wgsl, for few tokens and heads of whole eights: unnormalised output, largest score m and sum l of
// exp(score - m) of one split for the query heads of one kv head.
//
// Mapping: a workgroup = (kv head and HEADS of its query heads, split, row) on grid x, y, z. LANES = head_dim / 8
// invocations share a position, eight elements each, so that WG / LANES positions are read at once and PASSES times that
// many before anyone waits; a vec4 holds the HEADS query heads.
// Traffic: the split's keys and values once for HEADS query heads. Online softmax in f32 over tiles of positions.

struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    qkv_stride: u32,
    context: u32,
    scale: f32,
    window: u32,
    splits_max: u32,
    split_len: u32,
    cap: f32,
    prefix: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> qkv: array<vec4<f32>>;              // (n_tokens, qkv_stride / 4), q first
@group(0) @binding(3) var<storage, read> k_cache: array<KvEight>;            // (kv_heads, context - prefix, head_dim)
@group(0) @binding(4) var<storage, read> v_cache: array<KvEight>;            // (kv_heads, context - prefix, head_dim)
@group(0) @binding(5) var<storage, read_write> partial_out: array<f32>;      // (n_tokens, heads, splits_max, head_dim)
@group(0) @binding(6) var<storage, read_write> partial_ml: array<vec2<f32>>; // (n_tokens, heads, splits_max): m, l
@group(0) @binding(7) var<storage, read> k_prefix: array<KvEight>;           // (kv_heads, prefix, head_dim)
@group(0) @binding(8) var<storage, read> v_prefix: array<KvEight>;           // (kv_heads, prefix, head_dim)

const LOWEST: f32 = -3.0e38;

var<workgroup> scratch: array<vec4<f32>, PASSES * WG>;
var<workgroup> scores: array<vec4<f32>, PASSES * WG / 2u>;

// Of a key and of a value, in the shared part or the session's own.
fn key(at: vec4<u32>, is_shared: bool) -> Eight {
    if (is_shared) {
        return kv_eight(k_prefix[at.x], k_prefix[at.y], k_prefix[at.z], at.w);
    }
    return kv_eight(k_cache[at.x], k_cache[at.y], k_cache[at.z], at.w);
}

fn value(at: vec4<u32>, is_shared: bool) -> Eight {
    if (is_shared) {
        return kv_eight(v_prefix[at.x], v_prefix[at.y], v_prefix[at.z], at.w);
    }
    return kv_eight(v_cache[at.x], v_cache[at.y], v_cache[at.z], at.w);
}

// Dot products of eight elements with those of the HEADS query heads.
fn scores_of(k: Eight, q_lo: mat4x4<f32>, q_hi: mat4x4<f32>) -> vec4<f32> {
    return k.lo * q_lo + k.hi * q_hi;
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local_index: u32) {
    let token = group.z;
    let heads = heads_of(group.x);
    if (token >= step.n_tokens || heads.kv >= params.kv_heads) {
        return;
    }
    let position = step.position + token;
    let split = split_of(position, group.y);
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
        let is_shared = tile < params.prefix;
        count = min(tile_len, select(split.end, min(split.end, params.prefix), is_shared) - tile);
        let own = heads.kv * (params.context - params.prefix) + tile - params.prefix;
        let cache_start = select(own, heads.kv * params.prefix + tile, is_shared);
        let lines = params.kv_heads * select(params.context - params.prefix, params.prefix, is_shared);
        var values: array<Eight, PASSES>;
        for (var pass_index = 0u; pass_index < PASSES; pass_index++) {
            // Positions beyond the last one repeat it and get no weight.
            let line = cache_start + min(pass_index * at_once + slot, count - 1u);
            let at = kv_eight_place(line, lane, lanes, lines);
            scratch[pass_index * WG + local_index] = scores_of(key(at, is_shared), q_lo, q_hi);
            values[pass_index] = value(at, is_shared);
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
