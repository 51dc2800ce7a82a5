// out[t, :] += sum_i routes[t, i] * x[t, i, :] over the top_k experts i of token t.
//
// Mapping: an invocation computes one element; grid x numbers blocks of WG columns, z tokens. Traffic: every row once.

struct Params {
    width: u32,
    top_k: u32,
    x_stride: u32,
    routes_stride: u32,
    out_stride: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<f32>;              // (n_tokens, top_k, x_stride)
@group(0) @binding(3) var<storage, read> routes: array<f32>;         // (n_tokens, routes_stride): weights first
@group(0) @binding(4) var<storage, read_write> out: array<f32>;      // (n_tokens, out_stride)

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let column = id.x;
    let token = id.z;
    if (column >= params.width || token >= step.n_tokens) {
        return;
    }
    var sum = out[token * params.out_stride + column];
    for (var i = 0u; i < params.top_k; i++) {
        let row = token * params.top_k + i;
        sum = fma(routes[token * params.routes_stride + i], x[row * params.x_stride + column], sum);
    }
    out[token * params.out_stride + column] = sum;
}
