// out[t, i] = x[t, order[i]] * factors[i]: the inputs of a matrix whose columns are stored in another order
// (FLAG_ORDER) or for scaled inputs (FLAG_FACTORS).
//
// Mapping: an invocation moves one element; grid x numbers blocks of WG columns, z rows.
// Traffic: one row in and out a token, the order and the factors once a row (from cache after the first).

struct Params {
    width: u32,
    x_stride: u32,
    out_stride: u32,
    flags: u32,
    row_mode: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<f32>;             // (rows, x_stride)
@group(0) @binding(3) var<storage, read> order: array<u32>;         // (width)
@group(0) @binding(4) var<storage, read> factors: array<f32>;       // (width)
@group(0) @binding(5) var<storage, read_write> out: array<f32>;     // (rows, out_stride)

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let i = id.x;
    let row = id.z;
    if (i >= params.width || row >= row_count(params.row_mode)) {
        return;
    }
    var column = i;
    if ((params.flags & FLAG_ORDER) != 0u) {
        column = order[i];
    }
    var value = x[input_row(params.row_mode, row) * params.x_stride + column];
    if ((params.flags & FLAG_FACTORS) != 0u) {
        value *= factors[i];
    }
    out[row * params.out_stride + i] = value;
}
