// out[t, h, :] = sum_s exp(m_s - m) o_s / sum_s exp(m_s - m) l_s over the splits s that row t has, m = max_s m_s; with
// FLAG_STAGE the row is staged (prelude/stage.wgsl) as the input of the next matrix, too. With FLAG_EACH rows are tokens of
// different sessions, at positions of their own, and with FLAG_WHOLE those of one split are left as they are.
//
// Mapping: a workgroup = (32 columns of out, row) on grid x, z; an invocation owns a column for every SLICES-th split.
// Traffic: the partial results once.

struct Params {
    heads: u32,
    head_dim: u32,
    out_stride: u32,
    window: u32,
    splits_max: u32,
    split_len: u32,
    flags: u32,
    stage_quads: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> partial_out: array<f32>;          // (n_tokens, heads, splits_max, head_dim)
@group(0) @binding(3) var<storage, read> partial_ml: array<vec2<f32>>;     // (n_tokens, heads, splits_max): m, l
@group(0) @binding(4) var<storage, read_write> out: array<f32>;            // (n_tokens, out_stride)
@group(0) @binding(5) var<storage, read_write> staged: array<vec4<u32>>;   // (n_tokens) of staged inputs
@group(0) @binding(6) var<storage, read> places: array<vec4<u32>>;         // (n_tokens): position

const SLICES: u32 = WG / 32u;

// What a slice found for its column: the largest score, the sum of weights and the weighted sum.
var<workgroup> found: array<vec3<f32>, WG>;

// Two such results as one.
fn merge(a: vec3<f32>, b: vec3<f32>) -> vec3<f32> {
    let largest = max(a.x, b.x);
    let factors = exp(max(vec2<f32>(a.x, b.x) - largest, vec2<f32>(-100.0)));
    return vec3<f32>(largest, factors.x * a.yz + factors.y * b.yz);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local_index: u32) {
    let columns = params.heads * params.head_dim;
    let chunk = group.x;
    let token = group.z;
    if (chunk * 32u >= columns || token >= step.n_tokens) {
        return;
    }
    var position = step.position + token;
    if ((params.flags & FLAG_EACH) != 0u) {
        position = places[token].x;
    }
    let first = first_seen(position);
    let splits = min(position / params.split_len - first / params.split_len + 1u, params.splits_max);
    if ((params.flags & FLAG_WHOLE) != 0u && splits == 1u) {
        return;
    }
    // Columns beyond the last one repeat it and are not stored.
    let column = chunk * 32u + local_index % 32u;
    let inside = column < columns;
    let at = min(column, columns - 1u);
    let row = (token * params.heads + at / params.head_dim) * params.splits_max;
    var result = vec3<f32>(-3.0e38, 0.0, 0.0);
    for (var s = local_index / 32u; s < splits; s += SLICES) {
        let ml = partial_ml[row + s];
        let value = partial_out[(row + s) * params.head_dim + at % params.head_dim];
        result = merge(result, vec3<f32>(ml.x, ml.y, value));
    }
    found[local_index] = result;
    // Orders the slices' results before they are merged.
    workgroupBarrier();
    var value = 0.0;
    if (local_index < 32u) {
        for (var i = 1u; i < min(SLICES, splits); i++) {
            result = merge(result, found[i * 32u + local_index]);
        }
        value = result.z / result.y;
        if (inside) {
            out[token * params.out_stride + column] = value;
        }
    }
    if ((params.flags & FLAG_STAGE) != 0u) {
        stage_chunk(local_index, select(0.0, value, inside), 1.0, chunk, token, params.stage_quads);
    }
}
