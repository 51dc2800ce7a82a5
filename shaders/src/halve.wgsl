// Rows of inputs in half precision for gemm_w4_coop: x[t, :] divided by scales[t], its largest magnitude, each eight in
// the order 0, 4, 1, 5, 2, 6, 3, 7 that masks take codes out of a word; zeros from K to a whole chunk.
//
// Mapping: a workgroup a row; grid z numbers rows. Traffic: x twice (the second time from cache), out once.

struct Params {
    k: u32,
    chunks: u32,
    x_stride: u32,
    row_mode: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;              // (rows, x_stride / 4)
@group(0) @binding(3) var<storage, read_write> halves: array<vec4<u32>>;   // (rows, chunks, 4)
@group(0) @binding(4) var<storage, read_write> scales: array<f32>;         // (rows)

var<workgroup> largest_of: array<f32, WG>;

// Four inputs of vec4 column `column`; zero from K on.
fn inputs4(row_start: u32, column: u32) -> vec4<f32> {
    if (column * 4u >= params.k) {
        return vec4<f32>(0.0);
    }
    return x[row_start + column];
}

fn pair(a: f32, b: f32) -> u32 {
    return pack2x16float(vec2<f32>(a, b));
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local_index: u32) {
    let row = group.z;
    if (row >= row_count(params.row_mode)) {
        return;
    }
    let row_start = input_row(params.row_mode, row) * params.x_stride / 4u;
    var largest = 0.0;
    for (var i = local_index; i < params.k / 4u; i += WG) {
        let v = abs(inputs4(row_start, i));
        largest = max(largest, max(max(v.x, v.y), max(v.z, v.w)));
    }
    largest_of[local_index] = largest;
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        // Orders the writes of a level before its reads.
        workgroupBarrier();
        if (local_index < half) {
            largest_of[local_index] = max(largest_of[local_index], largest_of[local_index + half]);
        }
    }
    workgroupBarrier();
    // At least the smallest normal number, so that the inverse is finite; zeros stay zeros.
    let scale = max(largest_of[0], 1.2e-38);
    if (local_index == 0u) {
        scales[row] = scale;
    }
    for (var i = local_index; i < params.chunks * 4u; i += WG) {
        let lo = inputs4(row_start, 2u * i) / scale;
        let hi = inputs4(row_start, 2u * i + 1u) / scale;
        halves[row * params.chunks * 4u + i] =
            vec4<u32>(pair(lo.x, hi.x), pair(lo.y, hi.y), pair(lo.z, hi.z), pair(lo.w, hi.w));
    }
}
