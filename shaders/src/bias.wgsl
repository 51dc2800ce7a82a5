// Adds biases to the scores of some tokens, in place; negative infinity bans a token.
//
// Mapping: an invocation a token; grid x numbers blocks of WG. Traffic: 16 bytes a token.

struct Params {
    vocab: u32,
    offset: u32,
    n: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> biases: array<vec2<u32>>;    // (n): distinct id, f32 bits
@group(0) @binding(3) var<storage, read_write> scores: array<f32>;    // (offset + vocab)

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x >= params.n) {
        return;
    }
    let bias = biases[id.x];
    if (bias.x < params.vocab) {
        scores[params.offset + bias.x] += bitcast<f32>(bias.y);
    }
}
