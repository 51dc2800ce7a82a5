// Writes rows in half precision for gemm_w4_coop, divided by their largest magnitude, each eight in the order 0, 4, 1, 5, 2,
// 6, 3, 7 that masks take codes out of a word, zeros from K to a whole chunk. The body defines `params`, the binding halves
// and `inputs4(row, column)`, four inputs of a vec4 column below K.

var<workgroup> largest_of: array<f32, WG>;

fn padded4(row: u32, column: u32) -> vec4<f32> {
    if (column * 4u >= params.k) {
        return vec4<f32>(0.0);
    }
    return inputs4(row, column);
}

fn largest_in(v: vec4<f32>) -> f32 {
    let a = abs(v);
    return max(max(a.x, a.y), max(a.z, a.w));
}

// The largest `own` of the workgroup, at least the smallest normal number, so that its inverse is finite; zeros stay zeros.
// Call in uniform control flow.
fn row_scale(own: f32, local_index: u32) -> f32 {
    largest_of[local_index] = own;
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        // Orders the writes of a level before its reads.
        workgroupBarrier();
        if (local_index < half) {
            largest_of[local_index] = max(largest_of[local_index], largest_of[local_index + half]);
        }
    }
    workgroupBarrier();
    return max(largest_of[0], 1.2e-38);
}

// The scale of the inputs of row `row`. Call in uniform control flow.
fn scale_of(row: u32, local_index: u32) -> f32 {
    var largest = 0.0;
    for (var i = local_index; i < params.k / 4u; i += WG) {
        largest = max(largest, largest_in(inputs4(row, i)));
    }
    return row_scale(largest, local_index);
}

fn pair(a: f32, b: f32) -> u32 {
    return pack2x16float(vec2<f32>(a, b));
}

// `row` is the row of the inputs, `to` that of the output.
fn write_halves(row: u32, to: u32, scale: f32, local_index: u32) {
    for (var i = local_index; i < params.chunks * 4u; i += WG) {
        let lo = padded4(row, 2u * i) / scale;
        let hi = padded4(row, 2u * i + 1u) / scale;
        halves[to * params.chunks * 4u + i] =
            vec4<u32>(pair(lo.x, hi.x), pair(lo.y, hi.y), pair(lo.z, hi.z), pair(lo.w, hi.w));
    }
}
