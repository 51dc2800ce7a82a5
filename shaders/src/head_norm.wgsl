// x[t, s, i] = (x[t, s, i] - m) / sqrt(mean_i((x[t, s, i] - m)^2) + eps) * weight[i], in place, for segments s of dim columns;
// m = mean_i(x[t, s, i]) with FLAG_CENTER, else 0; with FLAG_SEGMENTS the weight is weight[s, i].
//
// Mapping: a workgroup a segment; grid x numbers segments, z rows. Traffic: x read twice, written once.

struct Params {
    dim: u32,
    segments: u32,
    stride: u32,
    offset: u32,
    eps: f32,
    flags: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read_write> x: array<f32>;        // (n_tokens, stride)
@group(0) @binding(3) var<storage, read> weight: array<f32>;         // (dim) or (segments, dim)

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local_index: u32) {
    let segment = group.x;
    let token = group.z;
    if (segment >= params.segments || token >= step.n_tokens) {
        return;
    }
    let start = token * params.stride + params.offset + segment * params.dim;
    // An invocation writes only what it read itself, so the sums order nothing else.
    var center = 0.0;
    if ((params.flags & FLAG_CENTER) != 0u) {
        var sum = 0.0;
        for (var i = local_index; i < params.dim; i += WG) {
            sum += x[start + i];
        }
        center = workgroup_sum(sum, local_index) / f32(params.dim);
    }
    var squares = 0.0;
    for (var i = local_index; i < params.dim; i += WG) {
        let value = x[start + i] - center;
        squares = fma(value, value, squares);
    }
    let factor = inverseSqrt(workgroup_sum(squares, local_index) / f32(params.dim) + params.eps);
    let weight_start = select(0u, segment * params.dim, (params.flags & FLAG_SEGMENTS) != 0u);
    for (var i = local_index; i < params.dim; i += WG) {
        x[start + i] = (x[start + i] - center) * factor * weight[weight_start + i];
    }
}
