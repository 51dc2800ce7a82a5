// out[t, h, :] = softmax(scale * q[t, h] k) v over the cached positions that token t sees, for many tokens, on matrix
// units: 16x16x16 products of half precision, summed in f32. A cache of 8 bits is rounded to half precision.
//
// Mapping: a workgroup = (query head, tile of TILE tokens) on grid x, z; a subgroup of 32 has 16 of the tokens and goes over
// their positions SPAN at a time. The weights of a span are exp(score - top); top, a bound that the subgroup keeps for each
// token, is raised only if a score exceeds it by SLACK, because accumulators, which have no addressable elements, must
// then pass through workgroup memory to be corrected. The subgroups share the keys and values of a span in workgroup
// memory, while those of the next one are on their way.
// Traffic: keys and values once per TILE tokens and query head.

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
@group(0) @binding(3) var<storage, read> k_cache: array<KvWords>;      // (context in whole spans, kv_heads, head_dim)
@group(0) @binding(4) var<storage, read> v_cache: array<KvWords>;      // (context in whole spans, kv_heads, head_dim)
@group(0) @binding(5) var<storage, read_write> out: array<f32>;        // (n_tokens, out_stride)

const LOWEST: f32 = -3.0e38;
// Weights are at most exp(SLACK), which half precision holds.
const SLACK: f32 = 8.0;
const SUBGROUPS: u32 = WG / 32u;
// As many votes are looked at.
const_assert SUBGROUPS == 4u;
// How often an invocation fetches keys, or values, for a span, FETCH_VECS vec4s at once; the largest heads need them all.
const FETCHES: u32 = SPAN * HEAD_DIM_MAX / 4u / WG / FETCH_VECS;
// vec4s from one row to the next, so that the rows that a subgroup reads at once lie in different banks.
const Q_VECS: u32 = HEAD_DIM_MAX / 4u + 2u;
const P_VECS: u32 = SPAN / 4u + 1u;
const S_VECS: u32 = SPAN / 4u + 1u;

var<workgroup> q_tile: array<vec4<f16>, TILE * Q_VECS>;
var<workgroup> scores: array<vec4<f32>, TILE * S_VECS>;
var<workgroup> p_tile: array<vec4<f16>, TILE * P_VECS>;
var<workgroup> k_tile: array<vec4<f16>, SPAN * Q_VECS>;
var<workgroup> v_tile: array<vec4<f16>, SPAN * Q_VECS>;
// By subgroup: 1 if a bound has to be raised.
var<workgroup> votes: array<u32, SUBGROUPS>;

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
    let q_at = subgroup * 16u * Q_VECS;
    let score_at = subgroup * 16u * S_VECS;

    // The softmax: two invocations a token, each for half of a span.
    let row = subgroup * 16u + lane / 2u;
    let part = lane % 2u * (SPAN / 2u);
    let my_scores = row * S_VECS + part / 4u;
    let position = step.position + min(token_start + row, step.n_tokens - 1u);
    let first = first_seen(position);
    var top = LOWEST;
    var sum = 0.0;
    var o0 = coop_mat16x16<f32,C>();
    var o1 = coop_mat16x16<f32,C>();
    var o2 = coop_mat16x16<f32,C>();
    var o3 = coop_mat16x16<f32,C>();
    var o4 = coop_mat16x16<f32,C>();
    var o5 = coop_mat16x16<f32,C>();
    var o6 = coop_mat16x16<f32,C>();
    var o7 = coop_mat16x16<f32,C>();

    // Fetches beyond a row's end, where heads are smaller, repeat the last one: branches would keep them apart.
    let per_row = vecs / FETCH_VECS;
    let fetches = SPAN * per_row - 1u;
    var keys: array<Fetched, FETCHES>;
    var values: array<Fetched, FETCHES>;
    let first_row = kv_row(begin, kv_head, params.context, params.kv_heads);
    for (var i = 0u; i < FETCHES; i++) {
        let index = min(i * WG + local_index, fetches);
        keys[i] = fetch_key(first_row, index, per_row);
        values[i] = fetch_value(first_row, index, per_row);
    }
    for (var span = begin; span <= last; span += SPAN) {
        for (var i = 0u; i < FETCHES; i++) {
            let index = min(i * WG + local_index, fetches);
            let at = index / per_row * Q_VECS + index % per_row * FETCH_VECS;
            for (var v = 0u; v < FETCH_VECS; v++) {
                k_tile[at + v] = fetched(keys[i], v, index, per_row);
                v_tile[at + v] = fetched(values[i], v, index, per_row);
            }
        }
        // Orders the writes of keys and values before their reads.
        workgroupBarrier();
        let next = kv_row(min(span + SPAN, last / SPAN * SPAN), kv_head, params.context, params.kv_heads);
        for (var i = 0u; i < FETCHES; i++) {
            let index = min(i * WG + local_index, fetches);
            keys[i] = fetch_key(next, index, per_row);
            values[i] = fetch_value(next, index, per_row);
        }
        var s0 = coop_mat16x16<f32,C>();
        var s1 = coop_mat16x16<f32,C>();
        for (var d = 0u; d < vecs; d += 4u) {
            let q = coopLoadT<coop_mat16x16<f16,A>>(&q_tile[q_at + d], Q_VECS);
            s0 = coopMultiplyAdd(q, coopLoad<coop_mat16x16<f16,B>>(&k_tile[d], Q_VECS), s0);
            s1 = coopMultiplyAdd(q, coopLoad<coop_mat16x16<f16,B>>(&k_tile[16u * Q_VECS + d], Q_VECS), s1);
        }
        coopStoreT(s0, &scores[score_at], S_VECS);
        coopStoreT(s1, &scores[score_at + 4u], S_VECS);
        // Orders the subgroup's scores before their reads.
        subgroupBarrier();
        var span_scores: array<vec4<f32>, SPAN / 8u>;
        var largest = vec4<f32>(LOWEST);
        for (var i = 0u; i < SPAN / 8u; i++) {
            span_scores[i] = seen_scores(scores[my_scores + i], span + part + 4u * i, first, position);
            largest = max(largest, span_scores[i]);
        }
        let pair_largest = max(largest.xy, largest.zw);
        let own_largest = max(pair_largest.x, pair_largest.y);
        let new_top = max(top, max(own_largest, subgroupShuffleXor(own_largest, 1u)));
        let vote = subgroupAny(new_top > top + SLACK);
        if (lane == 0u) {
            votes[subgroup] = u32(vote);
        }
        // All of the workgroup together, because matrix operations need uniform control flow.
        let raised = workgroupUniformLoad(&votes);
        if ((raised[0] | raised[1] | raised[2] | raised[3]) != 0u) {
            let factor = exp(max(top - new_top, -100.0));
            top = new_top;
            sum *= factor;
            o0 = corrected(o0, score_at, row, lane, factor);
            o1 = corrected(o1, score_at, row, lane, factor);
            o2 = corrected(o2, score_at, row, lane, factor);
            o3 = corrected(o3, score_at, row, lane, factor);
            o4 = corrected(o4, score_at, row, lane, factor);
            o5 = corrected(o5, score_at, row, lane, factor);
            o6 = corrected(o6, score_at, row, lane, factor);
            o7 = corrected(o7, score_at, row, lane, factor);
        }
        var sums = vec4<f32>(0.0);
        for (var i = 0u; i < SPAN / 8u; i++) {
            // A token that has seen nothing yet has no bound.
            let weights = exp(max(span_scores[i] - top, vec4<f32>(-100.0)));
            let seen_weights = select(weights, vec4<f32>(0.0), span_scores[i] == vec4<f32>(LOWEST));
            sums += seen_weights;
            p_tile[row * P_VECS + part / 4u + i] = vec4<f16>(seen_weights);
        }
        sum += dot(sums, vec4<f32>(1.0));
        // Orders the subgroup's weights before their reads.
        subgroupBarrier();
        for (var k = 0u; k < SPAN; k += 16u) {
            let p = coopLoadT<coop_mat16x16<f16,A>>(&p_tile[subgroup * 16u * P_VECS + k / 4u], P_VECS);
            let v_at = k * Q_VECS;
            if (params.head_dim > 0u) {
                o0 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&v_tile[v_at], Q_VECS), o0);
            }
            if (params.head_dim > 16u) {
                o1 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&v_tile[v_at + 4u], Q_VECS), o1);
            }
            if (params.head_dim > 32u) {
                o2 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&v_tile[v_at + 8u], Q_VECS), o2);
            }
            if (params.head_dim > 48u) {
                o3 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&v_tile[v_at + 12u], Q_VECS), o3);
            }
            if (params.head_dim > 64u) {
                o4 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&v_tile[v_at + 16u], Q_VECS), o4);
            }
            if (params.head_dim > 80u) {
                o5 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&v_tile[v_at + 20u], Q_VECS), o5);
            }
            if (params.head_dim > 96u) {
                o6 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&v_tile[v_at + 24u], Q_VECS), o6);
            }
            if (params.head_dim > 112u) {
                o7 = coopMultiplyAdd(p, coopLoadT<coop_mat16x16<f16,B>>(&v_tile[v_at + 28u], Q_VECS), o7);
            }
        }
        // Orders the reads of keys and values before the next writes.
        workgroupBarrier();
    }

    let inverse_sum = 1.0 / (sum + subgroupShuffleXor(sum, 1u));
    let target_row = Row(token_start + row, head * params.head_dim, inverse_sum);
    store(o0, 0u, score_at, row, lane, target_row);
    store(o1, 16u, score_at, row, lane, target_row);
    store(o2, 32u, score_at, row, lane, target_row);
    store(o3, 48u, score_at, row, lane, target_row);
    store(o4, 64u, score_at, row, lane, target_row);
    store(o5, 80u, score_at, row, lane, target_row);
    store(o6, 96u, score_at, row, lane, target_row);
    store(o7, 112u, score_at, row, lane, target_row);
}

// The accumulator `o` with this invocation's half of its row times `factor`.
fn corrected(o: coop_mat16x16<f32,C>, at: u32, row: u32, lane: u32, factor: f32) -> coop_mat16x16<f32,C> {
    // Orders earlier reads before this write, it before its correction, and that before it is taken back.
    subgroupBarrier();
    coopStoreT(o, &scores[at], S_VECS);
    subgroupBarrier();
    for (var i = 0u; i < 2u; i++) {
        scores[row * S_VECS + lane % 2u * 2u + i] *= factor;
    }
    subgroupBarrier();
    return coopLoadT<coop_mat16x16<f32,C>>(&scores[at], S_VECS);
}

// Where a row of the output goes, and what it is multiplied with.
struct Row {
    token: u32,
    column: u32,
    factor: f32,
}

// Stores the 16 columns from `column` on of the subgroup's 16 tokens: an invocation has eight of a token.
fn store(o: coop_mat16x16<f32,C>, column: u32, at: u32, row: u32, lane: u32, to: Row) {
    // Orders earlier reads before this write, and it before its reads.
    subgroupBarrier();
    coopStoreT(o, &scores[at], S_VECS);
    subgroupBarrier();
    if (to.token < step.n_tokens && column < params.head_dim) {
        let start = to.token * params.out_stride + to.column + column + lane % 2u * 8u;
        for (var i = 0u; i < 2u; i++) {
            let values = scores[row * S_VECS + lane % 2u * 2u + i] * to.factor;
            for (var e = 0u; e < 4u; e++) {
                out[start + 4u * i + e] = values[e];
            }
        }
    }
}
