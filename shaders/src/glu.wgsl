// out[t, i] = activation(x[t, i]) * x[t, width + i], activation as in prelude/activation.wgsl.
//
// Mapping: an invocation computes one element; grid x numbers blocks of WG columns, z rows, per_token of
// each token. Traffic: 12 bytes each.

struct Params {
    width: u32,
    x_stride: u32,
    out_stride: u32,
    activation: u32,
    per_token: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<f32>;              // (rows, x_stride): gate, then up
@group(0) @binding(3) var<storage, read_write> out: array<f32>;      // (rows, out_stride)

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let column = id.x;
    let token = id.z;
    if (column >= params.width || token >= step.n_tokens * params.per_token) {
        return;
    }
    let gate = x[token * params.x_stride + column];
    let up = x[token * params.x_stride + params.width + column];
    out[token * params.out_stride + column] = activate(gate, params.activation) * up;
}
