// out[t, n] = factor(t) * sum_k x[t, k] * w[n, k] (+ bias[n]) (+ out[t, n]), w in the 4-bit layout of the device, x staged
// (prelude/stage.wgsl), for few rows t; factor(t) is 1 / sqrt(mean square of the row + eps) with FLAG_NORM, else 1. With
// FLAG_STAGE the new out[t, n] are staged, too, weighted for the norm that follows.
//
// Mapping: see prelude/gemv_w4.wgsl; grid x, y number tiles of 32 outputs, z rows.
// Traffic: every weight once a row, x once a workgroup (from cache after the first).

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
    norm_offset: u32,
    stage_quads: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;              // (rows) of staged inputs
@group(0) @binding(3) var<storage, read> qweight: array<vec4<u32>>;        // (tiles, chunks, 32)
@group(0) @binding(4) var<storage, read> group_params: array<u32>;         // (tiles, groups, 32)
// Bias of all outputs from bias_offset on, weights of the norm that follows from norm_offset on.
@group(0) @binding(5) var<storage, read> vectors: array<f32>;
@group(0) @binding(6) var<storage, read_write> out: array<f32>;            // (rows, out_stride)
@group(0) @binding(7) var<storage, read_write> staged: array<vec4<u32>>;   // (rows) of staged inputs

const LANES: u32 = 32u;

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local_index: u32,
) {
    let tile = group.x + group.y * groups.x;
    let token = group.z;
    if (tile * TILE_N >= params.n || token >= row_count(params.row_mode)) {
        return;
    }
    // The rows that pad the last tile are there to be read.
    let n = tile * TILE_N + local_index % TILE_N;
    var value = gemv(n, input_row(params.row_mode, token), local_index);
    if (local_index < TILE_N && n < params.n) {
        let index = token * params.out_stride + params.out_offset + n;
        if ((params.flags & FLAG_BIAS) != 0u) {
            value += vectors[params.bias_offset + n];
        }
        if ((params.flags & FLAG_ACCUMULATE) != 0u) {
            value += out[index];
        }
        out[index] = value;
    }
    if ((params.flags & FLAG_STAGE) != 0u) {
        let inside = n < params.n;
        let factor = select(1.0, vectors[params.norm_offset + min(n, params.n - 1u)], (params.flags & FLAG_STAGE_NORM) != 0u);
        stage_chunk(local_index, select(0.0, value, inside), factor, tile, token, params.stage_quads);
    }
}
