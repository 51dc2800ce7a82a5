// out[t, n] = sum_k x[t, k] * w[n, k] (+ bias[n]) (+ out[t, n]), w dense, for few rows t.
//
// Mapping: a workgroup computes ROWS outputs of one row t; its invocations share K in chunks of one vec4 of words an
// output. Grid x, y number blocks of ROWS outputs, z rows.
// Traffic: every weight once a row, x once a workgroup (from cache after the first).

struct Params {
    n: u32,
    k: u32,
    row_words: u32,
    x_stride: u32,
    out_stride: u32,
    out_offset: u32,
    bias_offset: u32,
    flags: u32,
    row_mode: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;             // (rows, x_stride / 4)
@group(0) @binding(3) var<storage, read> weight: array<vec4<u32>>;        // (n, row_words / 4)
@group(0) @binding(4) var<storage, read> bias: array<f32>;                // (bias_offset + n)
@group(0) @binding(5) var<storage, read_write> out: array<f32>;           // (rows, out_stride)

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
    let weight_start = n * (params.row_words / 4u);
    let x_start = input_row(params.row_mode, token) * params.x_stride / 4u;

    var acc = vec4<f32>(0.0);
    for (var chunk = local_index; chunk < params.row_words / 4u; chunk += WG) {
        let lo = inputs4(x_start, chunk * DENSE_PER_WORD);
        let hi = inputs4(x_start, chunk * DENSE_PER_WORD + DENSE_PER_WORD - 1u);
        acc += vec4<f32>(
            words_dot(weight[weight_start.x + chunk], lo, hi),
            words_dot(weight[weight_start.y + chunk], lo, hi),
            words_dot(weight[weight_start.z + chunk], lo, hi),
            words_dot(weight[weight_start.w + chunk], lo, hi),
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
