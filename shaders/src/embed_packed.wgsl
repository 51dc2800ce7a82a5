// out[t, i] = scale * table[tokens[t], i] for the rows first_row..first_row + n of the packed table (axis packed) that this part
// holds.
//
// Mapping: an invocation expands eight elements; grid x numbers blocks of WG runs, z rows.
// Traffic: one packed table row and one output row a token.

struct Params {
    n: u32,
    k: u32,
    row_words: u32,
    group_size: u32,
    groups: u32,
    first_row: u32,
    out_stride: u32,
    flags: u32,
    scale: f32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> tokens: array<u32>;           // (n_tokens)
@group(0) @binding(3) var<storage, read> codes: array<u32>;            // (n, row_words)
@group(0) @binding(4) var<storage, read> group_params: array<u32>;     // (n, groups), see the preludes
@group(0) @binding(5) var<storage, read_write> out: array<f32>;        // (n_tokens, out_stride)

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let k = id.x * 8u;
    let token = id.z;
    if (k >= params.k || token >= step.n_tokens) {
        return;
    }
    // Tokens before first_row wrap to large numbers and are skipped by the same test.
    let row = tokens[token] - params.first_row;
    if (row >= params.n) {
        return;
    }
    let w = weights8(row, k);
    let start = token * params.out_stride + k;
    for (var i = 0u; i < 4u && k + i < params.k; i++) {
        out[start + i] = params.scale * w.lo[i];
    }
    for (var i = 4u; i < 8u && k + i < params.k; i++) {
        out[start + i] = params.scale * w.hi[i - 4u];
    }
}
