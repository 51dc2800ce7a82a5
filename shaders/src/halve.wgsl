// Rows of inputs in half precision for gemm_w4_coop: x[t, :] divided by scales[t], its largest magnitude.
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

fn inputs4(row: u32, column: u32) -> vec4<f32> {
    return x[row * params.x_stride / 4u + column];
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local_index: u32) {
    if (group.z >= row_count(params.row_mode)) {
        return;
    }
    let row = input_row(params.row_mode, group.z);
    let scale = scale_of(row, local_index);
    if (local_index == 0u) {
        scales[group.z] = scale;
    }
    write_halves(row, group.z, scale, local_index);
}
