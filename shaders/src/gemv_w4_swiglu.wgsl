// out[t, i] = silu(g) * u with (g, u) = sum_k norm(x[t])[k] * w[(i, n / 2 + i), k] (+ bias), w in the 4-bit layout of the
// device with the gate projection above the up projection, for few rows t; silu(v) = v / (1 + exp(-v)), norm as in
// gemv_w4.
//
// Mapping: see prelude/gemv_w4.wgsl, an invocation holds a gate and its up; grid x, y number tiles of 32 outputs, z rows.
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

const ROWS: u32 = 2u;

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
    let width = params.n / 2u;
    let tile = group.x + group.y * groups.x;
    let token = group.z;
    if (tile * TILE_N >= width || token >= row_count(params.row_mode)) {
        return;
    }
    let x_start = input_row(params.row_mode, token) * params.x_stride / 4u;
    let i = tile * TILE_N + local_index % TILE_N;
    // Outputs beyond the width repeat the last one and are not stored.
    let row = min(i, width - 1u);
    var total = gemv(vec2<u32>(row, width + row), x_start, local_index);
    if (local_index < TILE_N && i < width) {
        if ((params.flags & FLAG_BIAS) != 0u) {
            total += vec2<f32>(bias[params.bias_offset + i], bias[params.bias_offset + width + i]);
        }
        // exp(80) is finite; below -80 silu is smaller than any number that matters.
        let silu = total.x / (1.0 + exp(-max(total.x, -80.0)));
        out[token * params.out_stride + params.out_offset + i] = silu * total.y;
    }
}
