// out[t, n] = sum_k x[t, k] * w[n, k] (+ bias[n]) (+ out[t, n]), w in the canonical 4-bit layout, for few rows t.
//
// Mapping: a workgroup computes ROWS outputs of one row t; its invocations share K in chunks of 32 inputs, one vec4 of
// words an output. Grid x, y number blocks of ROWS outputs, z rows.
// Traffic: every weight once a row, x once a workgroup (from cache after the first). With w = (q - 8) * s + c a group
// costs s * dot(q - 8, x) + c * sum(x), so scales are applied once a chunk and never per weight.

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
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;             // (rows, x_stride / 4)
@group(0) @binding(3) var<storage, read> qweight: array<vec4<u32>>;       // (n, row_words / 4)
@group(0) @binding(4) var<storage, read> group_params: array<u32>;        // (n, groups)
@group(0) @binding(5) var<storage, read> bias: array<f32>;                // (bias_offset + n)
@group(0) @binding(6) var<storage, read_write> out: array<f32>;           // (rows, out_stride)

// Four inputs of vec4 column `i`; zero in the padding of the last chunk.
fn inputs4(row_start: u32, i: u32) -> vec4<f32> {
    if (i * 4u < params.k) {
        return x[row_start + i];
    }
    return vec4<f32>(0.0);
}

fn largest4(v: vec4<f32>) -> f32 {
    return max(max(v.x, v.y), max(v.z, v.w));
}

// s and c of a group for the four outputs.
struct Scales4 {
    s: vec4<f32>,
    c: vec4<f32>,
}

fn scales4(params_start: vec4<u32>, k: u32) -> Scales4 {
    let group = min(k / params.group_size, params.groups - 1u);
    let a = group_scale(group_params[params_start.x + group], params.flags);
    let b = group_scale(group_params[params_start.y + group], params.flags);
    let c = group_scale(group_params[params_start.z + group], params.flags);
    let d = group_scale(group_params[params_start.w + group], params.flags);
    return Scales4(vec4<f32>(a.x, b.x, c.x, d.x), vec4<f32>(a.y, b.y, c.y, d.y));
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
    let weight_start = n * (params.row_words / 4u);
    let params_start = n * params.groups;
    let x_start = input_row(params.row_mode, token) * params.x_stride / 4u;
    let chunk_has_one_group = params.group_size % 32u == 0u;

    var acc = vec4<f32>(0.0);
    for (var chunk = local_index; chunk < params.row_words / 4u; chunk += WG) {
        let q0 = qweight[weight_start.x + chunk];
        let q1 = qweight[weight_start.y + chunk];
        let q2 = qweight[weight_start.z + chunk];
        let q3 = qweight[weight_start.w + chunk];

        let i = chunk * 8u;
        let a0 = inputs4(x_start, i);
        let a1 = inputs4(x_start, i + 1u);
        let b0 = inputs4(x_start, i + 2u);
        let b1 = inputs4(x_start, i + 3u);
        let c0 = inputs4(x_start, i + 4u);
        let c1 = inputs4(x_start, i + 5u);
        let d0 = inputs4(x_start, i + 6u);
        let d1 = inputs4(x_start, i + 7u);
        let largest = max(
            max(max(abs(a0), abs(a1)), max(abs(b0), abs(b1))),
            max(max(abs(c0), abs(c1)), max(abs(d0), abs(d1))),
        );
        let magnitude = input_magnitude(largest4(largest));
        let inverse = 1.0 / magnitude;
        let xa = inputs8(a0, a1, inverse);
        let xb = inputs8(b0, b1, inverse);
        let xc = inputs8(c0, c1, inverse);
        let xd = inputs8(d0, d1, inverse);
        let sums = vec4<f32>(
            dot(a0 + a1, vec4<f32>(1.0)),
            dot(b0 + b1, vec4<f32>(1.0)),
            dot(c0 + c1, vec4<f32>(1.0)),
            dot(d0 + d1, vec4<f32>(1.0)),
        );

        // Dot products of the four outputs with each of the four words.
        let dots_a = vec4<f32>(code_dot(q0.x, xa), code_dot(q1.x, xa), code_dot(q2.x, xa), code_dot(q3.x, xa));
        let dots_b = vec4<f32>(code_dot(q0.y, xb), code_dot(q1.y, xb), code_dot(q2.y, xb), code_dot(q3.y, xb));
        let dots_c = vec4<f32>(code_dot(q0.z, xc), code_dot(q1.z, xc), code_dot(q2.z, xc), code_dot(q3.z, xc));
        let dots_d = vec4<f32>(code_dot(q0.w, xd), code_dot(q1.w, xd), code_dot(q2.w, xd), code_dot(q3.w, xd));

        let k = chunk * 32u;
        let scale = scales4(params_start, k);
        if (chunk_has_one_group) {
            let sum = sums.x + sums.y + sums.z + sums.w;
            acc += scale.s * magnitude * (dots_a + dots_b + dots_c + dots_d) + scale.c * sum;
        } else {
            let scale_b = scales4(params_start, k + 8u);
            let scale_c = scales4(params_start, k + 16u);
            let scale_d = scales4(params_start, k + 24u);
            acc += scale.s * magnitude * dots_a + scale.c * sums.x;
            acc += scale_b.s * magnitude * dots_b + scale_b.c * sums.y;
            acc += scale_c.s * magnitude * dots_c + scale_c.c * sums.z;
            acc += scale_d.s * magnitude * dots_d + scale_d.c * sums.w;
        }
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
