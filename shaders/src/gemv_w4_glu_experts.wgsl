// y[p, i] = activation(g) * u with (g, u) = factor(t) * sum_k x[t, k] * w[e(p), (i, n / 2 + i), k] for few pairs
// p = t * top_k + j of a token and an expert e(p) of it, staged as the input of the experts' next matrix; w in the 4-bit
// layout of the device, an expert's gate above its up projection and its rows padded to whole tiles, x staged; activation
// as in prelude/activation.wgsl, factor as in gemv_w4.
//
// Mapping: see prelude/gemv_w4.wgsl, lanes below 32 hold gates and the others their ups; grid x, y number chunks of 32
// outputs, z pairs. Experts of other parts do nothing. Traffic: every weight of a pair's expert once.

struct Params {
    n: u32,
    k: u32,
    chunks: u32,
    group_size: u32,
    group_shift: u32,
    groups: u32,
    flags: u32,
    eps: f32,
    stage_quads: u32,
    activation: u32,
    top_k: u32,
    routes_stride: u32,
    first_expert: u32,
    experts: u32,
    expert_rows: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;              // (n_tokens) of staged inputs
@group(0) @binding(3) var<storage, read> qweight: array<vec4<u32>>;        // (experts, tiles, chunks, 32)
@group(0) @binding(4) var<storage, read> group_params: array<u32>;         // (experts, tiles, groups, 32)
@group(0) @binding(5) var<storage, read> routes: array<f32>;               // (n_tokens, routes_stride): numbers from top_k on
@group(0) @binding(6) var<storage, read_write> staged: array<vec4<u32>>;   // (pairs) of staged inputs

const LANES: u32 = 64u;
var<workgroup> ups: array<f32, 32>;

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local_index: u32,
) {
    let width = params.n / 2u;
    let chunk = group.x + group.y * groups.x;
    let pair = group.z;
    let token = pair / params.top_k;
    if (chunk * 32u >= width || token >= step.n_tokens) {
        return;
    }
    // Numbers below first_expert wrap to large ones.
    let number = u32(routes[token * params.routes_stride + params.top_k + pair % params.top_k]);
    let expert = number - params.first_expert;
    if (expert >= params.experts) {
        return;
    }
    let i = chunk * 32u + local_index % 32u;
    // Outputs beyond the width repeat the last one and count as zeros.
    let is_up = local_index / 32u % 2u;
    let n = expert * params.expert_rows + min(i, width - 1u) + is_up * width;
    var value = gemv(n, token, local_index);
    if (local_index >= 32u && local_index < 64u) {
        ups[local_index - 32u] = value;
    }
    // Orders the ups before the gates meet them.
    workgroupBarrier();
    if (local_index < 32u) {
        value = activate(value, params.activation) * ups[local_index];
    }
    stage_chunk(local_index, select(0.0, value, i < width), 1.0, chunk, pair, params.stage_quads);
}
