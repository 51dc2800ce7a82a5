// out[t, h, :] = softmax(scale * q[t, h] k) v over the cached positions that token t sees, for many tokens, on matrix
// units: 16x16x16 products of half precision, summed in f32.
//
// Mapping: a workgroup = (query head, tile of TILE tokens) on grid x, z; a subgroup of 32 has 16 of the tokens and goes over
// their positions SPAN at a time, twice: first for the largest score and the sum of exp(score - largest) of each token,
// then for the weighted sum of the values. So accumulators, which have no addressable elements, need no correction.
// The subgroups share the keys or values of a span in workgroup memory.
// Traffic: keys twice and values once per TILE tokens and query head.

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
@group(0) @binding(3) var<storage, read> k_cache: array<KvQuad>;       // (kv_heads, context, head_dim), then SPAN rows
@group(0) @binding(4) var<storage, read> v_cache: array<KvQuad>;       // (kv_heads, context, head_dim), then SPAN rows
@group(0) @binding(5) var<storage, read_write> out: array<f32>;        // (n_tokens, out_stride)

const LOWEST: f32 = -3.0e38;
const SUBGROUPS: u32 = WG / 32u;
// vec4s from one row to the next, so that the rows that a subgroup reads at once lie in different banks.
const Q_VECS: u32 = HEAD_DIM_MAX / 4u + 2u;
const P_VECS: u32 = SPAN / 4u + 2u;
const S_VECS: u32 = SPAN / 4u + 1u;

var<workgroup> q_tile: array<vec4<f16>, TILE * Q_VECS>;
var<workgroup> scores: array<vec4<f32>, TILE * S_VECS>;
var<workgroup> p_tile: array<vec4<f16>, TILE * P_VECS>;
// Keys or values of a span.
var<workgroup> kv_tile: array<vec4<f16>, SPAN * Q_VECS>;
// By token: largest score, sum of exp(score - largest), of each half of the positions of a span.
var<workgroup> found: array<vec2<f32>, 2u * TILE>;

// Bounded scores of the four positions from `at` on, LOWEST where a token at `position` that sees those from `first` on
// does not see them.
fn seen_scores(score: vec4<f32>, at: u32, first: u32, position: u32) -> vec4<f32> {
    let positions = vec4<u32>(at, at + 1u, at + 2u, at + 3u);
    let seen = (positions >= vec4<u32>(first)) & (positions <= vec4<u32>(position));
    return select(vec4<f32>(LOWEST), softcap4(score, params.cap), seen);
}

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
    let begin = first_seen(step.position + token_start) / SPAN * SPAN;
    let k_start = kv_head * params.context;
    let lines = params.kv_heads * params.context;
    let q_at = subgroup * 16u * Q_VECS;
    let score_at = subgroup * 16u * S_VECS;

    // The softmax: two invocations a token, each for half of a span.
    let row = subgroup * 16u + lane / 2u;
    let part = lane % 2u * (SPAN / 2u);
    let my_scores = row * S_VECS + part / 4u;
    let position = step.position + min(token_start + row, step.n_tokens - 1u);
    let first = first_seen(position);
    var largest = LOWEST;
    var sum = 0.0;

    for (var span = begin; span <= last; span += SPAN) {
        var s0 = coop_mat16x16<f32,C>();
        var s1 = coop_mat16x16<f32,C>();
        for (var i = local_index; i < SPAN * vecs; i += WG) {
            let at = kv_quad_place(k_start + span + i / vecs, i % vecs, vecs, lines);
            kv_tile[i / vecs * Q_VECS + i % vecs] = kv_quad(k_cache[at.x], k_cache[at.y], at.z);
        }
        // Orders the keys' writes before their reads.
        workgroupBarrier();
        for (var d = 0u; d < vecs; d += 4u) {
            let q = coopLoadT<coop_mat16x16<f16,A>>(&q_tile[q_at + d], Q_VECS);
            s0 = coopMultiplyAdd(q, coopLoad<coop_mat16x16<f16,B>>(&kv_tile[d], Q_VECS), s0);
            s1 = coopMultiplyAdd(q, coopLoad<coop_mat16x16<f16,B>>(&kv_tile[16u * Q_VECS + d], Q_VECS), s1);
        }
        coopStoreT(s0, &scores[score_at], S_VECS);
        coopStoreT(s1, &scores[score_at + 4u], S_VECS);
        // Orders the scores' writes before their reads.
        workgroupBarrier();
        var span_scores: array<vec4<f32>, SPAN / 8u>;
        var span_largest = vec4<f32>(LOWEST);
        for (var i = 0u; i < SPAN / 8u; i++) {
            span_scores[i] = seen_scores(scores[my_scores + i], span + part + 4u * i, first, position);
            span_largest = max(span_largest, span_scores[i]);
        }
        let pair_largest = max(span_largest.xy, span_largest.zw);
        let new_largest = max(largest, max(pair_largest.x, pair_largest.y));
        if (new_largest > LOWEST) {
            sum *= exp(max(largest - new_largest, -100.0));
            largest = new_largest;
            var sums = vec4<f32>(0.0);
            for (var i = 0u; i < SPAN / 8u; i++) {
                sums += exp(max(span_scores[i] - largest, vec4<f32>(-100.0)));
            }
            sum += dot(sums, vec4<f32>(1.0));
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
        for (var i = local_index; i < SPAN * vecs; i += WG) {
            let at = kv_quad_place(k_start + span + i / vecs, i % vecs, vecs, lines);
            kv_tile[i / vecs * Q_VECS + i % vecs] = kv_quad(k_cache[at.x], k_cache[at.y], at.z);
        }
        // Orders the keys' writes before their reads.
        workgroupBarrier();
        for (var d = 0u; d < vecs; d += 4u) {
            let q = coopLoadT<coop_mat16x16<f16,A>>(&q_tile[q_at + d], Q_VECS);
            s0 = coopMultiplyAdd(q, coopLoad<coop_mat16x16<f16,B>>(&kv_tile[d], Q_VECS), s0);
            s1 = coopMultiplyAdd(q, coopLoad<coop_mat16x16<f16,B>>(&kv_tile[16u * Q_VECS + d], Q_VECS), s1);
        }
        coopStoreT(s0, &scores[score_at], S_VECS);
        coopStoreT(s1, &scores[score_at + 4u], S_VECS);
        // Orders the scores' writes before their reads.
        workgroupBarrier();
        for (var i = 0u; i < SPAN / 8u; i++) {
            let score = seen_scores(scores[my_scores + i], span + part + 4u * i, first, position);
            let weights = exp(max(score - joined, vec4<f32>(-100.0))) * inverse_sum;
            p_tile[row * P_VECS + part / 4u + i] = vec4<f16>(weights);
        }
        // The barrier behind the scores orders the keys' reads before these writes.
        for (var i = local_index; i < SPAN * vecs; i += WG) {
            let at = kv_quad_place(k_start + span + i / vecs, i % vecs, vecs, lines);
            kv_tile[i / vecs * Q_VECS + i % vecs] = kv_quad(v_cache[at.x], v_cache[at.y], at.z);
        }
        // Orders the weights' and the values' writes before their reads, and the scores' reads before the next ones.
        workgroupBarrier();
        for (var k = 0u; k < SPAN; k += 16u) {
            let p = coopLoadT<coop_mat16x16<f16,A>>(&p_tile[subgroup * 16u * P_VECS + k / 4u], P_VECS);
            let v_at = k * Q_VECS;
            if (params.head_dim > 0u) {
                o0 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&kv_tile[v_at], Q_VECS), o0);
            }
            if (params.head_dim > 16u) {
                o1 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&kv_tile[v_at + 4u], Q_VECS), o1);
            }
            if (params.head_dim > 32u) {
                o2 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&kv_tile[v_at + 8u], Q_VECS), o2);
            }
            if (params.head_dim > 48u) {
                o3 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&kv_tile[v_at + 12u], Q_VECS), o3);
            }
            if (params.head_dim > 64u) {
                o4 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&kv_tile[v_at + 16u], Q_VECS), o4);
            }
            if (params.head_dim > 80u) {
                o5 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&kv_tile[v_at + 20u], Q_VECS), o5);
            }
            if (params.head_dim > 96u) {
                o6 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&kv_tile[v_at + 24u], Q_VECS), o6);
            }
            if (params.head_dim > 112u) {
                o7 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&kv_tile[v_at + 28u], Q_VECS), o7);
            }
        }
        // Orders these reads before the next weights.
        workgroupBarrier();
    }

    // Sixteen columns at a time through workgroup memory.
    if (params.head_dim > 0u) {
        coopStoreT(o0, &scores[score_at], S_VECS);
        workgroupBarrier();
        store(subgroup, lane, token_start, head * params.head_dim);
        workgroupBarrier();
    }
    if (params.head_dim > 16u) {
        coopStoreT(o1, &scores[score_at], S_VECS);
        workgroupBarrier();
        store(subgroup, lane, token_start, head * params.head_dim + 16u);
        workgroupBarrier();
    }
    if (params.head_dim > 32u) {
        coopStoreT(o2, &scores[score_at], S_VECS);
        workgroupBarrier();
        store(subgroup, lane, token_start, head * params.head_dim + 32u);
        workgroupBarrier();
    }
    if (params.head_dim > 48u) {
        coopStoreT(o3, &scores[score_at], S_VECS);
        workgroupBarrier();
        store(subgroup, lane, token_start, head * params.head_dim + 48u);
        workgroupBarrier();
    }
    if (params.head_dim > 64u) {
        coopStoreT(o4, &scores[score_at], S_VECS);
        workgroupBarrier();
        store(subgroup, lane, token_start, head * params.head_dim + 64u);
        workgroupBarrier();
    }
    if (params.head_dim > 80u) {
        coopStoreT(o5, &scores[score_at], S_VECS);
        workgroupBarrier();
        store(subgroup, lane, token_start, head * params.head_dim + 80u);
        workgroupBarrier();
    }
    if (params.head_dim > 96u) {
        coopStoreT(o6, &scores[score_at], S_VECS);
        workgroupBarrier();
        store(subgroup, lane, token_start, head * params.head_dim + 96u);
        workgroupBarrier();
    }
    if (params.head_dim > 112u) {
        coopStoreT(o7, &scores[score_at], S_VECS);
        workgroupBarrier();
        store(subgroup, lane, token_start, head * params.head_dim + 112u);
        workgroupBarrier();
    }
}

// Stores 16 columns from `column` on of the subgroup's 16 tokens: an invocation has eight of a token.
fn store(subgroup: u32, lane: u32, token_start: u32, column: u32) {
    let row = subgroup * 16u + lane / 2u;
    let token = token_start + row;
    if (token < step.n_tokens) {
        let at = token * params.out_stride + column + lane % 2u * 8u;
        for (var i = 0u; i < 2u; i++) {
            let values = scores[row * S_VECS + lane % 2u * 2u + i];
            for (var e = 0u; e < 4u; e++) {
                out[at + 4u * i + e] = values[e];
            }
        }
    }
}
