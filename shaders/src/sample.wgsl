// Picks a token from sorted candidates: softmax of score / temperature over the top_k first; the shortest prefix that
// reaches top_p; of it those with p >= min_p * p_max; then the first whose cumulated probability exceeds
// uniform_number times the kept mass. Writes its id to result[0]; 0 if no candidate can be chosen.
//
// Mapping: one workgroup; exponentials in parallel, the walk over at most WG numbers by one invocation so that its
// order of additions is the twin's. Traffic: nothing that matters.

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
@group(0) @binding(2) var<storage, read> candidates: array<vec2<u32>>;    // (at least min(top_k, vocab)): key, id
@group(0) @binding(3) var<storage, read_write> result: array<u32>;        // (1)

var<workgroup> weights: array<f32, WG>;

// Score of a key, within what differences can represent.
fn finite_score(key: u32) -> f32 {
    if (key == 0u) {
        return -1.0e38;
    }
    return clamp(bitcast<f32>(key_bits(key)), -1.0e38, 1.0e38);
}

@compute @workgroup_size(WG)
fn main(@builtin(local_invocation_index) local_index: u32) {
    let count = max(min(min(params.top_k, params.vocab), WG), 1u);
    if (local_index < count) {
        let below = (finite_score(candidates[local_index].x) - finite_score(candidates[0].x)) / params.temperature;
        weights[local_index] = exp(max(below, -100.0));
    }
    // Orders the weights before the walk.
    workgroupBarrier();
    if (local_index != 0u) {
        return;
    }
    if (candidates[0].x <= NEVER_KEY) {
        result[0] = 0u;
        return;
    }
    // A softmax over infinities is not defined; the order still is.
    if ((key_bits(candidates[0].x) & 0x7fffffffu) >= 0x7f800000u) {
        result[0] = candidates[0].y;
        return;
    }
    var total = 0.0;
    for (var i = 0u; i < count; i++) {
        total += weights[i];
    }
    // Candidates are sorted, so both filters keep a prefix. weights[0] is 1, the largest.
    var kept = 0u;
    var mass = 0.0;
    while (kept < count && (kept == 0u || params.top_p >= 1.0 || mass < params.top_p * total)) {
        if (weights[kept] < params.min_p || candidates[kept].x <= NEVER_KEY) {
            break;
        }
        mass += weights[kept];
        kept++;
    }
    var chosen = max(kept, 1u) - 1u;
    var cumulated = 0.0;
    for (var i = 0u; i < kept; i++) {
        cumulated += weights[i];
        if (cumulated > params.uniform_number * mass) {
            chosen = i;
            break;
        }
    }
    result[0] = candidates[chosen].y;
}
