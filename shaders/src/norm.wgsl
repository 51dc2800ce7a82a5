// out[t, i] = (x[t, i] - m) / sqrt(mean_i((x[t, i] - m)^2) + eps) * weight[i] (+ bias[i]) (+ out[t, i]), m = mean_i(x[t, i])
// with FLAG_CENTER, else 0.
//
// Mapping: a workgroup a row; grid z numbers rows. Traffic: x twice (the second time from cache), out once.

struct Params {
    dim: u32,
    x_stride: u32,
    x_offset: u32,
    out_stride: u32,
    out_offset: u32,
    eps: f32,
    row_mode: u32,
    flags: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<f32>;              // (rows, x_stride)
@group(0) @binding(3) var<storage, read> weight: array<f32>;         // (dim)
@group(0) @binding(4) var<storage, read> bias: array<f32>;           // (dim)
@group(0) @binding(5) var<storage, read_write> out: array<f32>;      // (rows, out_stride)

// Elements of an invocation that are read before any is written.
const AT_ONCE: u32 = 8u;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local_index: u32) {
    let row = group.z;
    if (row >= row_count(params.row_mode)) {
        return;
    }
    let x_start = input_row(params.row_mode, row) * params.x_stride + params.x_offset;
    var center = 0.0;
    if ((params.flags & FLAG_CENTER) != 0u) {
        var sum = 0.0;
        for (var i = local_index; i < params.dim; i += WG) {
            sum += x[x_start + i];
        }
        center = workgroup_sum(sum, local_index) / f32(params.dim);
    }
    var squares = 0.0;
    for (var i = local_index; i < params.dim; i += WG) {
        let value = x[x_start + i] - center;
        squares = fma(value, value, squares);
    }
    let factor = inverseSqrt(workgroup_sum(squares, local_index) / f32(params.dim) + params.eps);
    let out_start = row * params.out_stride + params.out_offset;
    for (var start = local_index; start < params.dim; start += AT_ONCE * WG) {
        // All that is read comes first: behind a store, which the driver takes to change anything, every read would be waited
        // for by itself.
        var values: array<f32, AT_ONCE>;
        for (var j = 0u; j < AT_ONCE; j++) {
            let i = min(start + j * WG, params.dim - 1u);
            values[j] = (x[x_start + i] - center) * factor * weight[i];
            if ((params.flags & FLAG_BIAS) != 0u) {
                values[j] += bias[i];
            }
            if ((params.flags & FLAG_ACCUMULATE) != 0u) {
                values[j] += out[out_start + i];
            }
        }
        for (var j = 0u; j < AT_ONCE; j++) {
            let i = start + j * WG;
            if (i < params.dim) {
                out[out_start + i] = values[j];
            }
        }
    }
}
