// Takes away the tokens that may not be chosen: the scores whose bit in the mask is 0, and those behind its last word,
// become negative infinity, in place. Scores are handled as bits, so that no arithmetic has to know infinities.
//
// Mapping: an invocation a score; grid x numbers blocks of WG. Traffic: the mask, and 4 bytes a token taken away.

struct Params {
    vocab: u32,
    offset: u32,
    words: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> mask: array<u32>;            // (words): bit id % 32 of word id / 32
@group(0) @binding(3) var<storage, read_write> scores: array<u32>;    // (offset + vocab): f32 bits

const NEGATIVE_INFINITY: u32 = 0xff800000u;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let token = id.x;
    if (token >= params.vocab) {
        return;
    }
    let word = token / 32u;
    if (word >= params.words || ((mask[word] >> (token % 32u)) & 1u) == 0u) {
        scores[params.offset + token] = NEGATIVE_INFINITY;
    }
}
