// out[t, n] = sum_k norm(x[t])[k] * w[n, k] (+ bias[n]) (+ out[t, n]), w in the 4-bit layout of the device, for few
// rows t; norm(x)[k] = x[k] / sqrt(mean(x^2) + eps) * norm[k] with FLAG_NORM, else x[k].
//
// Mapping: see prelude/gemv_w4.wgsl; grid x, y number tiles of 32 outputs, z rows.
// Traffic: every weight once a row, x and norm once a workgroup (from cache after the first).

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
    eps: f32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;             // (rows, x_stride / 4)
@group(0) @binding(3) var<storage, read> qweight: array<vec4<u32>>;       // (tiles, chunks, 32)
@group(0) @binding(4) var<storage, read> group_params: array<u32>;        // (tiles, groups, 32)
@group(0) @binding(5) var<storage, read> bias: array<f32>;                // (bias_offset + n)
@group(0) @binding(6) var<storage, read> norm: array<vec4<f32>>;          // (k / 4)
@group(0) @binding(7) var<storage, read_write> out: array<f32>;           // (rows, out_stride)

const ROWS: u32 = 1u;

fn input4(x_start: u32, column: u32) -> vec4<f32> {
    return x[x_start + column];
}

fn norm_weight4(column: u32) -> vec4<f32> {
    return norm[column];
}

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
    let x_start = input_row(params.row_mode, token) * params.x_stride / 4u;
    // The rows that pad the last tile are there to be read.
    let n = tile * TILE_N + local_index % TILE_N;
    let total = gemv(vec2<u32>(n), x_start, local_index).x;
    if (local_index < TILE_N && n < params.n) {
        let index = token * params.out_stride + params.out_offset + n;
        var value = total;
        if ((params.flags & FLAG_BIAS) != 0u) {
            value += bias[params.bias_offset + n];
        }
        if ((params.flags & FLAG_ACCUMULATE) != 0u) {
            value += out[index];
        }
        out[index] = value;
    }
}
