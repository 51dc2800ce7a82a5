// One split of softmax(scale * q k) v for the query heads of one kv head: unnormalised output, largest score m and
// sum l of exp(score - m), over the positions of the split that the token may see, max(0, pos - window + 1)..=pos. Scores
// are bounded by params.cap (prelude/softcap.wgsl) if it is above 0.
//
// Keys and values of the first `prefix` positions, of which there may be none, lie in buffers of their own, which several
// sessions share; the others follow in the session's.
//
// Splits are numbered from the first one the token sees and begin at multiples of split_len in absolute positions, so
// a token's partial results do not depend on how its prompt was cut into steps.
// Mapping: a workgroup = (kv head and HEADS of its query heads, split, row) on grid x, y, z. Scores: four invocations
// share the elements of one of TILE positions, a vec4 holds the HEADS query heads. Output: an invocation owns two
// elements of the head for every slices-th position of the tile.
// Traffic: the split's keys and values once for HEADS query heads. Online softmax in f32.

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
@group(0) @binding(2) var<storage, read> qkv: array<f32>;                    // (n_tokens, qkv_stride), q first
@group(0) @binding(3) var<storage, read> k_cache: array<u32>;                // (context - prefix, kv_heads, head_dim)
@group(0) @binding(4) var<storage, read> v_cache: array<u32>;                // (context - prefix, kv_heads, head_dim)
@group(0) @binding(5) var<storage, read_write> partial_out: array<f32>;      // (n_tokens, heads, splits_max, head_dim)
@group(0) @binding(6) var<storage, read_write> partial_ml: array<vec2<f32>>; // (n_tokens, heads, splits_max): m, l
@group(0) @binding(7) var<storage, read> k_prefix: array<u32>;               // (prefix, kv_heads, head_dim)
@group(0) @binding(8) var<storage, read> v_prefix: array<u32>;               // (prefix, kv_heads, head_dim)

const LOWEST: f32 = -3.0e38;
const PARTS: u32 = WG / TILE;

var<workgroup> q_tile: array<vec4<f32>, HEAD_DIM_MAX>;   // by element: the HEADS query heads, times scale
var<workgroup> scratch: array<vec4<f32>, WG>;
var<workgroup> scores: array<vec4<f32>, TILE>;
var<workgroup> weights: array<vec4<f32>, TILE>;

// A part of the cache: the shared one or the session's own, and how many rows it has.
struct Lines {
    are_shared: bool,
    count: u32,
}

// Two elements of a key and of a value, of row `row` of a part.
fn key(row: u32, pair: u32, lines: Lines) -> vec2<f32> {
    let pairs = params.head_dim / 2u;
    let first = kv_first(row, pair, pairs);
    let last = kv_last(row, pair, pairs, lines.count);
    if (lines.are_shared) {
        return kv_pair(k_prefix[first], k_prefix[last], pair, pairs);
    }
    return kv_pair(k_cache[first], k_cache[last], pair, pairs);
}

fn value(row: u32, pair: u32, lines: Lines) -> vec2<f32> {
    let pairs = params.head_dim / 2u;
    let first = kv_first(row, pair, pairs);
    let last = kv_last(row, pair, pairs, lines.count);
    if (lines.are_shared) {
        return kv_pair(v_prefix[first], v_prefix[last], pair, pairs);
    }
    return kv_pair(v_cache[first], v_cache[last], pair, pairs);
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

    let pairs = params.head_dim / 2u;
    for (var i = local_index; i < params.head_dim; i += WG) {
        let q_start = token * params.qkv_stride + heads.first * params.head_dim + i;
        var q = vec4<f32>(0.0);
        for (var h = 0u; h < heads.count; h++) {
            q[h] = qkv[q_start + h * params.head_dim] * params.scale;
        }
        q_tile[i] = q;
    }
    // Orders the writes of q before its reads.
    workgroupBarrier();

    let score_slot = local_index / PARTS;
    let score_part = local_index % PARTS;
    // Several invocations own the same pair when the head is small, each for its slice of the positions.
    let slices = min(WG / pairs, TILE);
    let slice = local_index / pairs;
    let pair = local_index % pairs;
    var even = vec4<f32>(0.0);
    var odd = vec4<f32>(0.0);
    var largest = vec4<f32>(LOWEST);
    var sum = vec4<f32>(0.0);

    var count = 0u;
    for (var tile = split.begin; tile < split.end; tile += count) {
        // A tile lies in one part.
        let is_shared = tile < params.prefix;
        count = min(TILE, select(split.end, min(split.end, params.prefix), is_shared) - tile);
        let positions = select(params.context - params.prefix, params.prefix, is_shared);
        let first = kv_row(tile - select(params.prefix, 0u, is_shared), heads.kv, positions, params.kv_heads);
        let step_rows = kv_step(params.kv_heads);
        let lines = Lines(is_shared, params.kv_heads * positions);
        var partial = vec4<f32>(0.0);
        if (score_slot < count) {
            for (var i = score_part; i < pairs; i += PARTS) {
                let k = key(first + score_slot * step_rows, i, lines);
                partial = fma(q_tile[2u * i], vec4<f32>(k.x), partial);
                partial = fma(q_tile[2u * i + 1u], vec4<f32>(k.y), partial);
            }
        }
        scratch[local_index] = partial;
        // Orders the partial scores before their sums.
        workgroupBarrier();
        if (local_index < TILE) {
            var score = vec4<f32>(LOWEST);
            if (local_index < count) {
                score = scratch[local_index * PARTS];
                for (var i = 1u; i < PARTS; i++) {
                    score += scratch[local_index * PARTS + i];
                }
                score = softcap4(score, params.cap);
            }
            scores[local_index] = score;
        }
        // Orders the scores before every invocation looks for the largest.
        workgroupBarrier();
        var new_largest = largest;
        for (var i = 0u; i < count; i++) {
            new_largest = max(new_largest, scores[i]);
        }
        if (local_index < count) {
            weights[local_index] = exp(scores[local_index] - new_largest);
        }
        let correction = exp(max(largest - new_largest, vec4<f32>(-100.0)));
        largest = new_largest;
        even *= correction;
        odd *= correction;
        sum *= correction;
        // Orders the weights before their use.
        workgroupBarrier();
        if (slice < slices) {
            for (var i = slice; i < count; i += slices) {
                let v = value(first + i * step_rows, pair, lines);
                even = fma(weights[i], vec4<f32>(v.x), even);
                odd = fma(weights[i], vec4<f32>(v.y), odd);
                sum += weights[i];
            }
        }
        // The next tile writes scores and weights only behind barriers that follow these reads.
    }

    // Invocation (slice 0, pair) adds up what the slices of its pair hold: even elements, odd elements, sums.
    even = sum_of_slices(even, local_index, pairs, slices);
    odd = sum_of_slices(odd, local_index, pairs, slices);
    sum = sum_of_slices(sum, local_index, pairs, slices);
    if (slice == 0u) {
        for (var h = 0u; h < heads.count; h++) {
            let row = (token * params.heads + heads.first + h) * params.splits_max + group.y;
            partial_out[row * params.head_dim + 2u * pair] = even[h];
            partial_out[row * params.head_dim + 2u * pair + 1u] = odd[h];
            if (pair == 0u) {
                partial_ml[row] = vec2<f32>(largest[h], sum[h]);
            }
        }
    }
}

// Sum over the slices of a pair, for the invocations of slice 0; call in uniform control flow.
fn sum_of_slices(value: vec4<f32>, local_index: u32, pairs: u32, slices: u32) -> vec4<f32> {
    // Orders earlier reads of scratch before these writes, and these before the reads.
    workgroupBarrier();
    scratch[local_index] = value;
    workgroupBarrier();
    var total = value;
    if (local_index < pairs) {
        for (var i = 1u; i < slices; i++) {
            total += scratch[i * pairs + local_index];
        }
    }
    return total;
}
