// out[t, h, :] = softmax(scale * q[t, h] k) v over the cached positions that token t sees, for many tokens, on matrix
// units: 16x16x16 products of half precision, summed in f32.
//
// Mapping: a workgroup = (query head, tile of TILE tokens) on grid x, z; a subgroup of 32 has 16 of the tokens and goes over
// their positions SPAN at a time, twice: first for the largest score and the sum of exp(score - largest) of each token,
// then for the weighted sum of the values. So accumulators, which have no addressable elements, need no correction.
// Traffic: keys twice and values once per TILE tokens and query head, from cache after the first subgroup.

struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    qkv_stride: u32,
    out_stride: u32,
    context: u32,
    scale: f32,
    window: u32,
    cap: f32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> qkv: array<f32>;              // (n_tokens, qkv_stride), q first
@group(0) @binding(3) var<storage, read> k_cache: array<vec4<f16>>;    // (kv_heads, context, head_dim), then SPAN rows
@group(0) @binding(4) var<storage, read> v_cache: array<vec4<f16>>;    // (kv_heads, context, head_dim), then SPAN rows
@group(0) @binding(5) var<storage, read_write> out: array<f32>;        // (n_tokens, out_stride)

const LOWEST: f32 = -3.0e38;
const SUBGROUPS: u32 = WG / 32u;
// vec4s from one row to the next, so that the rows that a subgroup reads at once lie in different banks.
const Q_VECS: u32 = HEAD_DIM_MAX / 4u + 2u;
const P_VECS: u32 = SPAN / 4u + 2u;

var<workgroup> q_tile: array<vec4<f16>, TILE * Q_VECS>;
var<workgroup> scores: array<f32, TILE * SPAN>;
var<workgroup> p_tile: array<vec4<f16>, TILE * P_VECS>;
// By token: largest score, sum of exp(score - largest), of each half of the positions of a span.
var<workgroup> found: array<vec2<f32>, 2u * TILE>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local_index: u32) {
    // Subgroups are 32 wide where this kernel runs, and fill a one-dimensional workgroup in order.
    let subgroup = local_index / 32u;
    let lane = local_index % 32u;
    let head = group.x;
    let kv_head = head / (params.heads / params.kv_heads);
    let token_start = group.z * TILE;
    let vecs = params.head_dim / 4u;

    // Tokens beyond the last one repeat it and are not stored.
    for (var i = local_index; i < TILE * vecs; i += WG) {
        let token = min(token_start + i / vecs, step.n_tokens - 1u);
        let at = token * params.qkv_stride + head * params.head_dim + i % vecs * 4u;
        let q = vec4<f32>(qkv[at], qkv[at + 1u], qkv[at + 2u], qkv[at + 3u]) * params.scale;
        q_tile[i / vecs * Q_VECS + i % vecs] = vec4<f16>(clamp(q, vec4<f32>(-65504.0), vec4<f32>(65504.0)));
    }
    // Orders the queries' writes before their reads.
    workgroupBarrier();

    // Positions of the whole tile, in whole spans from the first one.
    let last = step.position + min(token_start + TILE, step.n_tokens) - 1u;
    let first_token_position = step.position + token_start;
    var begin = 0u;
    if (params.window > 0u && first_token_position + 1u > params.window) {
        begin = (first_token_position + 1u - params.window) / SPAN * SPAN;
    }
    let k_start = kv_head * params.context;
    let q_at = subgroup * 16u * Q_VECS;
    let score_at = subgroup * 16u * SPAN;

    // The softmax: two invocations a token, each for half of a span.
    let row = subgroup * 16u + lane / 2u;
    let part = lane % 2u * (SPAN / 2u);
    let position = step.position + min(token_start + row, step.n_tokens - 1u);
    var first = 0u;
    if (params.window > 0u && position + 1u > params.window) {
        first = position + 1u - params.window;
    }
    var largest = LOWEST;
    var sum = 0.0;

    for (var span = begin; span <= last; span += SPAN) {
        var s0 = coop_mat16x16<f32,C>();
        var s1 = coop_mat16x16<f32,C>();
        let k_at = (k_start + span) * vecs;
        for (var d = 0u; d < vecs; d += 4u) {
            let q = coopLoadT<coop_mat16x16<f16,A>>(&q_tile[q_at + d], Q_VECS);
            s0 = coopMultiplyAdd(q, coopLoad<coop_mat16x16<f16,B>>(&k_cache[k_at + d], vecs), s0);
            s1 = coopMultiplyAdd(q, coopLoad<coop_mat16x16<f16,B>>(&k_cache[k_at + 16u * vecs + d], vecs), s1);
        }
        coopStoreT(s0, &scores[score_at], SPAN);
        coopStoreT(s1, &scores[score_at + 16u], SPAN);
        // Orders the scores' writes before their reads.
        workgroupBarrier();
        var span_largest = LOWEST;
        for (var i = 0u; i < SPAN / 2u; i++) {
            let at = span + part + i;
            if (at >= first && at <= position) {
                // An invocation bounds the scores that only it reads.
                let score = softcap(scores[row * SPAN + part + i], params.cap);
                scores[row * SPAN + part + i] = score;
                span_largest = max(span_largest, score);
            }
        }
        if (span_largest > LOWEST) {
            let new_largest = max(largest, span_largest);
            sum *= exp(max(largest - new_largest, -100.0));
            largest = new_largest;
            for (var i = 0u; i < SPAN / 2u; i++) {
                let at = span + part + i;
                if (at >= first && at <= position) {
                    sum += exp(scores[row * SPAN + part + i] - largest);
                }
            }
        }
        // Orders these reads before the next scores.
        workgroupBarrier();
    }
    found[local_index] = vec2<f32>(largest, sum);
    // Orders both halves' findings before they are joined.
    workgroupBarrier();
    let other = found[local_index ^ 1u];
    let joined = max(largest, other.x);
    let inverse_sum = 1.0 / (sum * exp(max(largest - joined, -100.0)) + other.y * exp(max(other.x - joined, -100.0)));
    var o0 = coop_mat16x16<f32,C>();
    var o1 = coop_mat16x16<f32,C>();
    var o2 = coop_mat16x16<f32,C>();
    var o3 = coop_mat16x16<f32,C>();
    var o4 = coop_mat16x16<f32,C>();
    var o5 = coop_mat16x16<f32,C>();
    var o6 = coop_mat16x16<f32,C>();
    var o7 = coop_mat16x16<f32,C>();
    for (var span = begin; span <= last; span += SPAN) {
        var s0 = coop_mat16x16<f32,C>();
        var s1 = coop_mat16x16<f32,C>();
        let k_at = (k_start + span) * vecs;
        for (var d = 0u; d < vecs; d += 4u) {
            let q = coopLoadT<coop_mat16x16<f16,A>>(&q_tile[q_at + d], Q_VECS);
            s0 = coopMultiplyAdd(q, coopLoad<coop_mat16x16<f16,B>>(&k_cache[k_at + d], vecs), s0);
            s1 = coopMultiplyAdd(q, coopLoad<coop_mat16x16<f16,B>>(&k_cache[k_at + 16u * vecs + d], vecs), s1);
        }
        coopStoreT(s0, &scores[score_at], SPAN);
        coopStoreT(s1, &scores[score_at + 16u], SPAN);
        // Orders the scores' writes before their reads.
        workgroupBarrier();
        for (var i = 0u; i < SPAN / 8u; i++) {
            var weights = vec4<f32>(0.0);
            for (var e = 0u; e < 4u; e++) {
                let at = span + part + i * 4u + e;
                if (at >= first && at <= position) {
                    let score = softcap(scores[row * SPAN + part + i * 4u + e], params.cap);
                    weights[e] = exp(score - joined) * inverse_sum;
                }
            }
            p_tile[row * P_VECS + part / 4u + i] = vec4<f16>(weights);
        }
        // Orders the weights' writes before their reads, and the scores' reads before the next ones.
        workgroupBarrier();
        for (var k = 0u; k < SPAN; k += 16u) {
            let p = coopLoadT<coop_mat16x16<f16,A>>(&p_tile[subgroup * 16u * P_VECS + k / 4u], P_VECS);
            let v_at = (k_start + span + k) * vecs;
            if (params.head_dim > 0u) {
                o0 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&v_cache[v_at], vecs), o0);
            }
            if (params.head_dim > 16u) {
                o1 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&v_cache[v_at + 4u], vecs), o1);
            }
            if (params.head_dim > 32u) {
                o2 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&v_cache[v_at + 8u], vecs), o2);
            }
            if (params.head_dim > 48u) {
                o3 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&v_cache[v_at + 12u], vecs), o3);
            }
            if (params.head_dim > 64u) {
                o4 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&v_cache[v_at + 16u], vecs), o4);
            }
            if (params.head_dim > 80u) {
                o5 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&v_cache[v_at + 20u], vecs), o5);
            }
            if (params.head_dim > 96u) {
                o6 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&v_cache[v_at + 24u], vecs), o6);
            }
            if (params.head_dim > 112u) {
                o7 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&v_cache[v_at + 28u], vecs), o7);
            }
        }
        // Orders these reads before the next weights.
        workgroupBarrier();
    }

    // Sixteen columns at a time through workgroup memory.
    if (params.head_dim > 0u) {
        coopStoreT(o0, &scores[score_at], 16u);
        workgroupBarrier();
        store(subgroup, lane, token_start, head * params.head_dim);
        workgroupBarrier();
    }
    if (params.head_dim > 16u) {
        coopStoreT(o1, &scores[score_at], 16u);
        workgroupBarrier();
        store(subgroup, lane, token_start, head * params.head_dim + 16u);
        workgroupBarrier();
    }
    if (params.head_dim > 32u) {
        coopStoreT(o2, &scores[score_at], 16u);
        workgroupBarrier();
        store(subgroup, lane, token_start, head * params.head_dim + 32u);
        workgroupBarrier();
    }
    if (params.head_dim > 48u) {
        coopStoreT(o3, &scores[score_at], 16u);
        workgroupBarrier();
        store(subgroup, lane, token_start, head * params.head_dim + 48u);
        workgroupBarrier();
    }
    if (params.head_dim > 64u) {
        coopStoreT(o4, &scores[score_at], 16u);
        workgroupBarrier();
        store(subgroup, lane, token_start, head * params.head_dim + 64u);
        workgroupBarrier();
    }
    if (params.head_dim > 80u) {
        coopStoreT(o5, &scores[score_at], 16u);
        workgroupBarrier();
        store(subgroup, lane, token_start, head * params.head_dim + 80u);
        workgroupBarrier();
    }
    if (params.head_dim > 96u) {
        coopStoreT(o6, &scores[score_at], 16u);
        workgroupBarrier();
        store(subgroup, lane, token_start, head * params.head_dim + 96u);
        workgroupBarrier();
    }
    if (params.head_dim > 112u) {
        coopStoreT(o7, &scores[score_at], 16u);
        workgroupBarrier();
        store(subgroup, lane, token_start, head * params.head_dim + 112u);
        workgroupBarrier();
    }
}

// Stores 16 columns from `column` on of the subgroup's 16 tokens.
fn store(subgroup: u32, lane: u32, token_start: u32, column: u32) {
    for (var i = lane / 16u; i < 16u; i += 2u) {
        let token = token_start + subgroup * 16u + i;
        if (token < step.n_tokens) {
            out[token * params.out_stride + column + lane % 16u] = scores[subgroup * 16u * SPAN + i * 16u + lane % 16u];
        }
    }
}
