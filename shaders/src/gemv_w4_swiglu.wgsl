// y[t, i] = activation(g) * u with (g, u) = factor(t) * sum_k x[t, k] * w[(i, n / 2 + i), k] (+ bias), staged as the input of the
// next matrix; w in the 4-bit layout of the device with the gate projection above the up projection, x staged, for few
// rows t; activation as in prelude/activation.wgsl, factor as in gemv_w4.
//
// Mapping: see prelude/gemv_w4.wgsl, a lane holds a gate and its up; grid x, y number chunks of 32 outputs, z rows. Traffic: every weight once a row, x once a workgroup (from cache after the first).

struct Params {
    n: u32,
    k: u32,
    chunks: u32,
    group_size: u32,
    group_shift: u32,
    groups: u32,
    out_stride: u32,
    out_offset: u32,
    bias_offset: u32,
    flags: u32,
    row_mode: u32,
    eps: f32,
    stage_quads: u32,
    activation: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;              // (rows) of staged inputs
@group(0) @binding(3) var<storage, read> qweight: array<vec4<u32>>;        // (tiles, chunks, 32)
@group(0) @binding(4) var<storage, read> group_params: array<u32>;         // (tiles, groups, 32)
@group(0) @binding(5) var<storage, read> bias: array<f32>;                 // (bias_offset + n)
@group(0) @binding(6) var<storage, read_write> staged: array<vec4<u32>>;   // (rows) of staged inputs

const LANES: u32 = 32u;

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local_index: u32,
) {
    let width = params.n / 2u;
    let chunk = group.x + group.y * groups.x;
    let token = group.z;
    if (chunk * 32u >= width || token >= row_count(params.row_mode)) {
        return;
    }
    let i = chunk * 32u + local_index % 32u;
    // Outputs beyond the width repeat the last one and count as zeros.
    let gate = min(i, width - 1u);
    var values = gemv_pair(vec2<u32>(gate, gate + width), input_row(params.row_mode, token), local_index);
    if ((params.flags & FLAG_BIAS) != 0u) {
        values += vec2<f32>(bias[params.bias_offset + gate], bias[params.bias_offset + gate + width]);
    }
    let value = activate(values.x, params.activation) * values.y;
    stage_chunk(local_index, select(0.0, value, i < width), 1.0, chunk, token, params.stage_quads);
}
