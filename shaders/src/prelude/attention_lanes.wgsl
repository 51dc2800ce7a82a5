// Attention over one split of the positions, a position shared by lanes of a subgroup: the body of attention_subgroup.wgsl
// and attention_subgroup_each.wgsl, which say where keys and values lie. They define `params` and the bindings qkv,
// partial_out, partial_ml, out and staged. lane_*.wgsl and sweep_*.wgsl read the cache, heads_*.wgsl hold what there is of
// each query head.

const LOWEST: f32 = -3.0e38;

// What the subgroups found: weighted sums of one query head, largest scores and sums of weights of all.
var<workgroup> parts: array<vec4<f32>, 2u * WG>;
var<workgroup> found: array<vec2<f32>, HEADS * WG / 8u>;
// The output of one query head.
var<workgroup> head_out: array<vec4<f32>, HEAD_DIM_MAX / 4u>;

// exp(score - top) without overflow of what counts as nothing.
fn fade(score: PerHead, top: PerHead) -> PerHead {
    return exp(max(score - top, PerHead(-100.0)));
}

// An invocation among the subgroups of a workgroup, whose lanes hold `slots` positions at once.
struct Spot {
    subgroup: u32,
    subgroups: u32,
    slots: u32,
    lane: u32,
}

// What an invocation found: largest scores, sums of weights, and weighted sums of its elements.
struct Found {
    top: PerHead,
    weights: PerHead,
    sums: OfHeads,
}

// Scores of one position with `scale` times the elements `k`: the sum over the lanes that share it, LOWEST where it is not
// seen.
fn score_of(k: Part, scale: f32, query: OfHeads, lanes: u32, is_seen: bool) -> PerHead {
    var score = products(k, query) * scale;
    score += subgroupShuffleXor(score, 1u);
    if (lanes > 2u) {
        score += subgroupShuffleXor(score, 2u);
    }
    if (lanes > 4u) {
        score += subgroupShuffleXor(score, 4u);
    }
    if (lanes > 8u) {
        score += subgroupShuffleXor(score, 8u);
    }
    if (lanes > 16u) {
        score += subgroupShuffleXor(score, 16u);
    }
    return select(PerHead(LOWEST), capped(score, params.cap), is_seen);
}

// Adds `scale` times the values `v` of a position whose score is `score`, not above `found.top`.
fn add(found: ptr<function, Found>, score: PerHead, v: Part, scale: f32) {
    // Nothing seen yet leaves nothing: the difference would be 0.
    let weight = select(fade(score, (*found).top), PerHead(0.0), score == PerHead(LOWEST));
    (*found).weights += weight;
    var sums = (*found).sums;
    add_weighted(&sums, weight * scale, v);
    (*found).sums = sums;
}

fn raise(found: ptr<function, Found>, top: PerHead) {
    let correction = fade((*found).top, top);
    (*found).top = top;
    (*found).weights *= correction;
    (*found).sums = scaled((*found).sums, correction);
}

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) local_index: u32,
    @builtin(subgroup_size) width: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let place = place_of(group.z);
    let token = place.row;
    let heads = heads_of(group.x);
    if (!place.is_there || heads.kv >= params.kv_heads) {
        return;
    }
    let position = place.position;
    let split = split_of(position, group.y);
    if (split.begin >= split.end) {
        return;
    }
    let is_whole = first_seen(position) / params.split_len == position / params.split_len;

    let lanes = params.head_dim / (4u * LANE_VECS);
    let slots = width / lanes;
    let subgroup = local_index / width;
    let subgroups = WG / width;

    // Query heads beyond the last repeat it.
    var query: OfHeads;
    for (var h = 0u; h < HEADS; h++) {
        let head = heads.first + min(h, heads.count - 1u);
        let q_at = token * params.qkv_stride / 4u + (head * lanes + lane % lanes) * LANE_VECS;
        set_query(&query, h, query_part(q_at));
    }

    // First the positions of the split that lie in the shared part, then the token's own.
    let spot = Spot(subgroup, subgroups, slots, lane);
    let edge = clamp(place.prefix, split.begin, split.end);
    let own = place.context - place.prefix;
    var mine_found = Found(PerHead(LOWEST), PerHead(0.0), OfHeads());
    if (split.begin < edge) {
        let shared_lane = lane_place(lane % lanes, lanes, params.kv_heads * place.prefix, SHARED);
        let start = kv_row(0u, heads.kv, place.prefix, params.kv_heads);
        mine_found = sweep(mine_found, Split(split.begin, edge), start, spot, shared_lane, query);
    }
    if (edge < split.end) {
        let own_lane = lane_place(lane % lanes, lanes, params.kv_heads * own, group.z);
        let start = kv_row(0u - place.prefix, heads.kv, own, params.kv_heads);
        mine_found = sweep(mine_found, Split(edge, split.end), start, spot, own_lane, query);
    }

    // The slots of a subgroup.
    for (var m = lanes; m < width; m *= 2u) {
        raise(&mine_found, max(mine_found.top, subgroupShuffleXor(mine_found.top, m)));
        mine_found.weights += subgroupShuffleXor(mine_found.weights, m);
        mine_found.sums = with_neighbour(mine_found.sums, m);
    }
    if (lane == 0u) {
        for (var h = 0u; h < HEADS; h++) {
            found[h * subgroups + subgroup] = vec2<f32>(number_of(mine_found.top, h), number_of(mine_found.weights, h));
        }
    }
    // The subgroups, a query head at a time.
    for (var h = 0u; h < heads.count; h++) {
        let head = heads.first + h;
        let row = (token * params.heads + head) * params.splits_max + group.y;
        if (lane < lanes) {
            put_part(LANE_VECS * (subgroup * lanes + lane), of_head(mine_found.sums, h));
        }
        // Orders the parts before their sums.
        workgroupBarrier();
        if (local_index < LANE_VECS * lanes) {
            var top = LOWEST;
            for (var s = 0u; s < subgroups; s++) {
                top = max(top, found[h * subgroups + s].x);
            }
            var weights = 0.0;
            var total = vec4<f32>(0.0);
            for (var s = 0u; s < subgroups; s++) {
                let factor = exp(max(found[h * subgroups + s].x - top, -100.0));
                weights = fma(found[h * subgroups + s].y, factor, weights);
                total = fma(parts[s * LANE_VECS * lanes + local_index], vec4<f32>(factor), total);
            }
            if (is_whole) {
                total /= weights;
            } else if (local_index == 0u) {
                partial_ml[row] = vec2<f32>(top, weights);
            }
            head_out[local_index] = total;
            for (var e = 0u; e < 4u; e++) {
                let i = local_index * 4u + e;
                if (is_whole) {
                    out[token * params.out_stride + head * params.head_dim + i] = total[e];
                } else {
                    partial_out[row * params.head_dim + i] = total[e];
                }
            }
        }
        // Orders these reads before the next parts, and the output before it is staged.
        workgroupBarrier();
        if (is_whole && (params.flags & FLAG_STAGE) != 0u && local_index < params.head_dim / 8u) {
            // An invocation stages eight elements of a chunk.
            let chunk_start = local_index / 4u * 8u;
            var tops = vec4<f32>(0.0);
            var squares = vec4<f32>(0.0);
            for (var i = chunk_start; i < chunk_start + 8u; i++) {
                tops = max(tops, abs(head_out[i]));
                squares = fma(head_out[i], head_out[i], squares);
            }
            let top = max(max(tops.x, tops.y), max(tops.z, tops.w));
            let chunk = head * params.head_dim / 32u + local_index / 4u;
            let lo = head_out[2u * local_index];
            let hi = head_out[2u * local_index + 1u];
            stage_eight(local_index % 4u, lo, hi, top, dot(squares, vec4<f32>(1.0)), chunk, token, params.stage_quads);
        }
    }
}
