// out[t, i] = scale * table[tokens[t], i] for the rows first_row..first_row + n_rows of the table that this part holds.
//
// Mapping: an invocation copies one element; grid x numbers blocks of WG columns, z rows.
// Traffic: one table row and one output row a token.

struct Params {
    width: u32,
    row_words: u32,
    first_row: u32,
    n_rows: u32,
    out_stride: u32,
    scale: f32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> tokens: array<u32>;         // (n_tokens)
@group(0) @binding(3) var<storage, read> table: array<u32>;          // (n_rows, row_words)
@group(0) @binding(4) var<storage, read_write> out: array<f32>;      // (n_tokens, out_stride)

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let column = id.x;
    let token = id.z;
    if (column >= params.width || token >= step.n_tokens) {
        return;
    }
    // Tokens before first_row wrap to large numbers and are skipped by the same test.
    let row = tokens[token] - params.first_row;
    if (row >= params.n_rows) {
        return;
    }
    let word = table[row * params.row_words + column / DENSE_PER_WORD];
    out[token * params.out_stride + column] = params.scale * dense_element(word, column);
}
