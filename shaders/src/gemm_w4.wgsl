// out[t, n] = sum_k x[t, k] * w[n, k] (+ bias[n]) (+ out[t, n]), w in the 4-bit layout of the device, for many rows t.
//
// Mapping: see prelude/gemm.wgsl; grid x, y number tiles of TILE outputs, z tiles of TILE rows.
// Traffic: the weights once per TILE rows, x once per TILE outputs. Weights are dequantised into workgroup memory as
// Elem; inputs stay f32 because activations may leave the range of f16.

struct Params {
    n: u32,
    k: u32,
    chunks: u32,
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
@group(0) @binding(3) var<storage, read> qweight: array<u32>;          // (tiles, chunks, 32, 4)
@group(0) @binding(4) var<storage, read> group_params: array<u32>;     // (tiles, groups, 32)
@group(0) @binding(5) var<storage, read> bias: array<f32>;             // (bias_offset + n)
@group(0) @binding(6) var<storage, read_write> out: array<f32>;        // (rows, out_stride)

// Weights of output `n` for inputs k..k+8.
fn weights8(n: u32, k: u32) -> Weights8 {
    let word = qweight[chunk_index(n, k / 32u, params.chunks) * 4u + k / 8u % 4u];
    let group = unpack_group(group_params[group_index(n, k / params.group_size, params.groups)], params.flags);
    let even = vec4<f32>(unpack4xU8(word & 0x0f0f0f0fu)) - group.zero;
    let odd = vec4<f32>(unpack4xU8((word >> 4u) & 0x0f0f0f0fu)) - group.zero;
    let lo = vec4<f32>(even.x, odd.x, even.y, odd.y);
    let hi = vec4<f32>(even.z, odd.z, even.w, odd.w);
    return Weights8(lo * group.s + group.c, hi * group.s + group.c);
}

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
    gemm_tile(n_tile, group.z, local_index);
}
