// x[t, i] = scale * x[t, i], or cap * tanh(scale * x[t, i] / cap) for a cap above 0, in place.
//
// Mapping: an invocation computes one element; grid x numbers blocks of WG columns, z rows. Traffic: 8 bytes each.

struct Params {
    width: u32,
    stride: u32,
    scale: f32,
    cap: f32,
    row_mode: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read_write> x: array<f32>;        // (rows, stride)

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let column = id.x;
    let row = id.z;
    if (column >= params.width || row >= row_count(params.row_mode)) {
        return;
    }
    let at = row * params.stride + column;
    x[at] = softcap(params.scale * x[at], params.cap);
}
