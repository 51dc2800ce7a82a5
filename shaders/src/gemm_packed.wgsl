// out[t, n] = sum_k x[t, k] * w[n, k] (+ bias[n]) (+ out[t, n]), w packed (axis packed), for many rows t.
//
// Mapping: see prelude/gemm.wgsl; grid x, y number tiles of TILE outputs, z tiles of TILE rows.
// Traffic: the weights once per TILE rows, x once per TILE outputs. Weights are dequantised into workgroup memory as
// Elem; inputs stay f32 because activations may leave the range of f16.

struct Params {
    n: u32,
    k: u32,
    row_words: u32,
    group_size: u32,
    groups: u32,
    x_stride: u32,
    out_stride: u32,
    out_offset: u32,
    bias_offset: u32,
    flags: u32,
    row_mode: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;          // (rows, x_stride / 4)
@group(0) @binding(3) var<storage, read> codes: array<u32>;            // (n, row_words)
@group(0) @binding(4) var<storage, read> group_params: array<u32>;     // (n, groups), see the preludes
@group(0) @binding(5) var<storage, read> bias: array<f32>;             // (bias_offset + n)
@group(0) @binding(6) var<storage, read_write> out: array<f32>;        // (rows, out_stride)

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local_index: u32,
) {
    let n_tile = group.x + group.y * groups.x;
    if (n_tile * TILE >= params.n) {
        return;
    }
    gemm_tile(n_tile, 0u, group.z * TILE, row_count(params.row_mode), local_index);
}
