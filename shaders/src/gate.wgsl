// x[t, i] = x[t, i] / (1 + exp(-gate[t, 0])), in place.
//
// Mapping: an invocation computes one element; grid x numbers blocks of WG columns, z tokens. Traffic: 8 bytes each.

struct Params {
    width: u32,
    stride: u32,
    gate_stride: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read_write> x: array<f32>;        // (n_tokens, stride)
@group(0) @binding(3) var<storage, read> gate: array<f32>;           // (n_tokens, gate_stride)

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let column = id.x;
    let token = id.z;
    if (column >= params.width || token >= step.n_tokens) {
        return;
    }
    // exp(80) is finite; below -80 the factor is smaller than any number that matters.
    x[token * params.stride + column] /= 1.0 + exp(-max(gate[token * params.gate_stride], -80.0));
}
