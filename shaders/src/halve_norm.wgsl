// As halve.wgsl for the inputs x[t, i] * weight[i] / sqrt(mean square of x[t, :] + eps).
//
// Mapping: a workgroup a row; grid z numbers rows. Traffic: x twice (the second time from cache), out once.

struct Params {
    k: u32,
    chunks: u32,
    x_stride: u32,
    eps: f32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;              // (n_tokens, x_stride / 4)
@group(0) @binding(3) var<storage, read> weight: array<vec4<f32>>;         // (k / 4)
@group(0) @binding(4) var<storage, read_write> halves: array<vec4<u32>>;   // (n_tokens, chunks, 4)
@group(0) @binding(5) var<storage, read_write> scales: array<f32>;         // (n_tokens)

var<workgroup> squares_of: array<f32, WG>;

fn inputs4(row: u32, column: u32) -> vec4<f32> {
    return x[row * params.x_stride / 4u + column] * weight[column];
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local_index: u32) {
    let row = group.z;
    if (row >= step.n_tokens) {
        return;
    }
    var largest = 0.0;
    var squares = 0.0;
    for (var i = local_index; i < params.k / 4u; i += WG) {
        let v = x[row * params.x_stride / 4u + i];
        squares += dot(v, v);
        largest = max(largest, largest_in(v * weight[i]));
    }
    squares_of[local_index] = squares;
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        // Orders the writes of a level before its reads.
        workgroupBarrier();
        if (local_index < half) {
            squares_of[local_index] += squares_of[local_index + half];
        }
    }
    let scale = row_scale(largest, local_index);
    if (local_index == 0u) {
        // The norm's factor is the same for the whole row, so it goes with the scale.
        scales[row] = scale * inverseSqrt(squares_of[0] / f32(params.k) + params.eps);
    }
    write_halves(row, row, scale, local_index);
}
