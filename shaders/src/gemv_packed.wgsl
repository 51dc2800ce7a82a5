// out[t, n] = sum_k x[t, k] * w[n, k] (+ bias[n]) (+ out[t, n]), w packed (axis packed), for few rows t.
//
// Mapping: a workgroup computes ROWS outputs of one row t; its invocations share K in runs of eight. Grid x, y number
// blocks of ROWS outputs, z rows.
// Traffic: every weight once a row, x once a workgroup (from cache after the first).

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

// Four inputs from column `column` (a multiple of 4) of the row starting at vec4 `row_start`; zero from K on.
fn inputs4(row_start: u32, column: u32) -> vec4<f32> {
    if (column >= params.k) {
        return vec4<f32>(0.0);
    }
    let columns = vec4<u32>(column, column + 1u, column + 2u, column + 3u);
    return select(vec4<f32>(0.0), x[row_start + column / 4u], columns < vec4<u32>(params.k));
}

fn run_dot(n: u32, k: u32, lo: vec4<f32>, hi: vec4<f32>) -> f32 {
    let w = weights8(n, k);
    return dot(w.lo, lo) + dot(w.hi, hi);
}

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local_index: u32,
) {
    let n_start = (group.x + group.y * groups.x) * ROWS;
    let token = group.z;
    if (n_start >= params.n || token >= row_count(params.row_mode)) {
        return;
    }
    // Outputs beyond N repeat the last one and are not stored.
    let n = min(vec4<u32>(n_start, n_start + 1u, n_start + 2u, n_start + 3u), vec4<u32>(params.n - 1u));
    let x_start = input_row(params.row_mode, token) * params.x_stride / 4u;

    var acc = vec4<f32>(0.0);
    for (var k = local_index * 8u; k < params.k; k += WG * 8u) {
        let lo = inputs4(x_start, k);
        let hi = inputs4(x_start, k + 4u);
        acc += vec4<f32>(
            run_dot(n.x, k, lo, hi),
            run_dot(n.y, k, lo, hi),
            run_dot(n.z, k, lo, hi),
            run_dot(n.w, k, lo, hi),
        );
    }

    let total = workgroup_sum4(acc, local_index);
    if (local_index < ROWS && n_start + local_index < params.n) {
        let row = n_start + local_index;
        let index = token * params.out_stride + params.out_offset + row;
        var value = total[local_index];
        if ((params.flags & FLAG_BIAS) != 0u) {
            value += bias[params.bias_offset + row];
        }
        if ((params.flags & FLAG_ACCUMULATE) != 0u) {
            value += out[index];
        }
        out[index] = value;
    }
}
