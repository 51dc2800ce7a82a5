// Stages inputs for the gemv_w4 kernels (prelude/stage.wgsl) where no kernel before does: x[t, k], weighted with norm[k]
// under FLAG_NORM.
//
// Mapping: a workgroup a chunk of 32 inputs; grid x, y number chunks, z rows, per_token of each token. Traffic: x once, the staged inputs once.

struct Params {
    k: u32,
    x_stride: u32,
    x_offset: u32,
    flags: u32,
    row_mode: u32,
    quads: u32,
    per_token: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<f32>;                    // (rows, x_stride)
@group(0) @binding(3) var<storage, read> norm: array<f32>;                 // (k)
@group(0) @binding(4) var<storage, read_write> staged: array<vec4<u32>>;   // (rows) of staged inputs

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local_index: u32,
) {
    let chunk = group.x + group.y * groups.x;
    let row = group.z;
    if (chunk * 32u >= params.k || row >= row_count(params.row_mode) * params.per_token) {
        return;
    }
    let k = chunk * 32u + local_index;
    let column = min(k, params.k - 1u);
    let value = x[input_row(params.row_mode, row) * params.x_stride + params.x_offset + column];
    let factor = select(1.0, norm[column], (params.flags & FLAG_NORM) != 0u);
    stage_chunk(local_index, select(0.0, value, k < params.k), factor, chunk, row, params.quads);
}
