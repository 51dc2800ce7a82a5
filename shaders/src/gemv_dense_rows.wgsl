// As gemv_dense.wgsl for several rows t at once: out[t, n] = sum_k x[t, k] * w[n, k] (+ bias[n]) (+ out[t, n]), w dense.
//
// Mapping: a workgroup computes ROWS outputs of ROWS rows t; its invocations share K in chunks of one vec4 of words an
// output. Grid x, y number blocks of rows within blocks of outputs, so that the former find weights in the cache.
// Traffic: every weight once, x once a workgroup (from cache after the first).

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
    let rows = row_count(params.row_mode);
    let blocks = (rows + ROWS - 1u) / ROWS;
    let block = group.x + group.y * groups.x;
    let n_start = block / max(blocks, 1u) * ROWS;
    if (n_start >= params.n || rows == 0u) {
        return;
    }
    let first_row = block % blocks * ROWS;
    // Outputs beyond N repeat the last one and are not stored, and so do rows.
    let n = min(vec4<u32>(n_start, n_start + 1u, n_start + 2u, n_start + 3u), vec4<u32>(params.n - 1u));
    let weight_start = n * (params.row_words / 4u);
    let row_indices = min(vec4<u32>(first_row, first_row + 1u, first_row + 2u, first_row + 3u), vec4<u32>(rows - 1u));
    let x_start = (row_indices + input_row(params.row_mode, 0u)) * (params.x_stride / 4u);

    // By row, an output a component.
    var sums: array<vec4<f32>, ROWS>;
    for (var chunk = local_index; chunk < params.row_words / 4u; chunk += WG) {
        let w0 = weight[weight_start.x + chunk];
        let w1 = weight[weight_start.y + chunk];
        let w2 = weight[weight_start.z + chunk];
        let w3 = weight[weight_start.w + chunk];
        for (var r = 0u; r < ROWS; r++) {
            let lo = inputs4(x_start[r], chunk * DENSE_PER_WORD);
            let hi = inputs4(x_start[r], chunk * DENSE_PER_WORD + DENSE_PER_WORD - 1u);
            sums[r] += vec4<f32>(
                words_dot(w0, lo, hi),
                words_dot(w1, lo, hi),
                words_dot(w2, lo, hi),
                words_dot(w3, lo, hi),
            );
        }
    }

    for (var r = 0u; r < ROWS; r++) {
        let total = workgroup_sum4(sums[r], local_index);
        let row = first_row + r;
        if (row < rows && local_index < ROWS && n_start + local_index < params.n) {
            let column = n_start + local_index;
            let index = row * params.out_stride + params.out_offset + column;
            var value = total[local_index];
            if ((params.flags & FLAG_BIAS) != 0u) {
                value += bias[params.bias_offset + column];
            }
            if ((params.flags & FLAG_ACCUMULATE) != 0u) {
                value += out[index];
            }
            out[index] = value;
        }
    }
}
