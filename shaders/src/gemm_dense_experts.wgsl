// out[p, n] = sum_k x[r, k] * w[e(p), n, k] for many pairs p = token * top_k + i of a token and an expert e(p) of it, w dense;
// r = p, or the token where its experts share the input.
//
// Mapping: see prelude/gemm.wgsl and prelude/gemm_pairs.wgsl; grid x, y number tiles of TILE outputs, z tiles of pairs of
// one expert. Traffic: the weights of an expert once per TILE of its pairs, x once per TILE outputs.

struct Params {
    n: u32,
    k: u32,
    row_words: u32,
    x_stride: u32,
    out_stride: u32,
    out_offset: u32,
    bias_offset: u32,
    flags: u32,
    top_k: u32,
    shared_input: u32,
    first_expert: u32,
    experts: u32,
    expert_rows: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;              // (rows, x_stride / 4)
@group(0) @binding(3) var<storage, read> weight: array<vec4<u32>>;         // (experts, expert_rows, row_words / 4)
@group(0) @binding(4) var<storage, read> bias: array<f32>;                 // not read
@group(0) @binding(5) var<storage, read_write> out: array<f32>;            // (pairs, out_stride)
@group(0) @binding(6) var<storage, read> pairs: array<u32>;                // (pairs)
@group(0) @binding(7) var<storage, read> tiles: array<vec4<u32>>;          // expert, first pair, number of pairs

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local_index: u32,
) {
    expert_tile(group.x + group.y * groups.x, group.z, local_index);
}
