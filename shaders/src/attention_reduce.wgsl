// out[t, h, :] = sum_s exp(m_s - m) o_s / sum_s exp(m_s - m) l_s over the splits s that row t has, m = max_s m_s.
//
// Mapping: a workgroup = (head, row) on grid x, z; an invocation owns every WG-th element. Traffic: the partial
// results once.

struct Params {
    heads: u32,
    head_dim: u32,
    out_stride: u32,
    window: u32,
    splits_max: u32,
    split_len: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> partial_out: array<f32>;       // (n_tokens, heads, splits_max, head_dim)
@group(0) @binding(3) var<storage, read> partial_ml: array<vec2<f32>>;  // (n_tokens, heads, splits_max): m, l
@group(0) @binding(4) var<storage, read_write> out: array<f32>;         // (n_tokens, out_stride)

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local_index: u32) {
    let head = group.x;
    let token = group.z;
    if (head >= params.heads || token >= step.n_tokens) {
        return;
    }
    let position = step.position + token;
    var first = 0u;
    if (params.window > 0u && position + 1u > params.window) {
        first = position + 1u - params.window;
    }
    let splits = min(position / params.split_len - first / params.split_len + 1u, params.splits_max);
    let row = (token * params.heads + head) * params.splits_max;
    var largest = partial_ml[row].x;
    for (var s = 1u; s < splits; s++) {
        largest = max(largest, partial_ml[row + s].x);
    }
    var sum = 0.0;
    for (var s = 0u; s < splits; s++) {
        let ml = partial_ml[row + s];
        sum = fma(exp(max(ml.x - largest, -100.0)), ml.y, sum);
    }
    for (var i = local_index; i < params.head_dim; i += WG) {
        var value = 0.0;
        for (var s = 0u; s < splits; s++) {
            let factor = exp(max(partial_ml[row + s].x - largest, -100.0));
            value = fma(factor, partial_out[(row + s) * params.head_dim + i], value);
        }
        out[token * params.out_stride + head * params.head_dim + i] = value / sum;
    }
}
