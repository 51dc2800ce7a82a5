// Applies the penalties of recent tokens to scores, in place: a positive score is divided by `repetition`, another
// multiplied; then `presence` and count times `frequency` are subtracted. `scores` is a copy of the logits row, so
// the logits stay readable.
//
// Mapping: an invocation a recent token; grid x numbers blocks of WG. Traffic: 16 bytes a recent token.

struct Params {
    vocab: u32,
    offset: u32,
    n_recent: u32,
    top_k: u32,
    temperature: f32,
    top_p: f32,
    min_p: f32,
    uniform_number: f32,
    repetition: f32,
    presence: f32,
    frequency: f32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> recent: array<vec2<u32>>;    // (n_recent): distinct id, count
@group(0) @binding(3) var<storage, read_write> scores: array<f32>;    // (offset + vocab)

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x >= params.n_recent) {
        return;
    }
    let token = recent[id.x];
    if (token.x >= params.vocab) {
        return;
    }
    let score = scores[params.offset + token.x];
    let repeated = select(score * params.repetition, score / params.repetition, score > 0.0);
    scores[params.offset + token.x] = repeated - params.presence - params.frequency * f32(token.y);
}
