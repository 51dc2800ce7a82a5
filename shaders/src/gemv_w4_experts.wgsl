// out[p, n] = factor(r) * sum_k x[r, k] * w[e(p), n, k] for few pairs p = token * top_k + i of a token and an expert e(p) of
// it, w in the 4-bit layout of the device, an expert's rows padded to whole tiles, x staged (prelude/stage.wgsl); r = p, or
// the token where its experts share the input; factor as in gemv_w4.
//
// Mapping: see prelude/gemv_w4.wgsl; grid x, y number tiles of 32 outputs, z pairs. Experts of other parts do nothing.
// Traffic: every weight of a pair's expert once, x once a workgroup (from cache after the first).

struct Params {
    n: u32,
    k: u32,
    chunks: u32,
    group_size: u32,
    group_shift: u32,
    groups: u32,
    out_stride: u32,
    out_offset: u32,
    flags: u32,
    eps: f32,
    top_k: u32,
    shared_input: u32,
    routes_stride: u32,
    first_expert: u32,
    experts: u32,
    expert_rows: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;              // (rows) of staged inputs
@group(0) @binding(3) var<storage, read> qweight: array<vec4<u32>>;        // (experts, tiles, chunks, 32)
@group(0) @binding(4) var<storage, read> group_params: array<u32>;         // (experts, tiles, groups, 32)
@group(0) @binding(5) var<storage, read> routes: array<f32>;               // (n_tokens, routes_stride): numbers from top_k on
@group(0) @binding(6) var<storage, read_write> out: array<f32>;            // (pairs, out_stride)

const LANES: u32 = 32u;

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local_index: u32,
) {
    let tile = group.x + group.y * groups.x;
    let pair = group.z;
    let token = pair / params.top_k;
    if (tile * TILE_N >= params.n || token >= step.n_tokens) {
        return;
    }
    // Numbers below first_expert wrap to large ones.
    let number = u32(routes[token * params.routes_stride + params.top_k + pair % params.top_k]);
    let expert = number - params.first_expert;
    if (expert >= params.experts) {
        return;
    }
    let n = tile * TILE_N + local_index % TILE_N;
    let row = select(pair, token, params.shared_input != 0u);
    let value = gemv(expert * params.expert_rows + n, row, local_index);
    if (local_index < TILE_N && n < params.n) {
        out[pair * params.out_stride + params.out_offset + n] = value;
    }
}
