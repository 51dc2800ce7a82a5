// As halve.wgsl for the inputs activation(x[t, i]) * x[t, k + i], activation as in prelude/activation.wgsl.
//
// Mapping: a workgroup a row; grid z numbers rows. Traffic: x twice (the second time from cache), out once.

struct Params {
    k: u32,
    chunks: u32,
    x_stride: u32,
    activation: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;              // (n_tokens, x_stride / 4): gate, then up
@group(0) @binding(3) var<storage, read_write> halves: array<vec4<u32>>;   // (n_tokens, chunks, 4)
@group(0) @binding(4) var<storage, read_write> scales: array<f32>;         // (n_tokens)

fn inputs4(row: u32, column: u32) -> vec4<f32> {
    let at = row * params.x_stride / 4u + column;
    let gate = x[at];
    return x[at + params.k / 4u] * vec4<f32>(
        activate(gate.x, params.activation),
        activate(gate.y, params.activation),
        activate(gate.z, params.activation),
        activate(gate.w, params.activation),
    );
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local_index: u32) {
    let row = group.z;
    if (row >= step.n_tokens) {
        return;
    }
    let scale = scale_of(row, local_index);
    if (local_index == 0u) {
        scales[row] = scale;
    }
    write_halves(row, row, scale, local_index);
}
