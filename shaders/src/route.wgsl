// The experts of every token: routes[t, i] and routes[t, top_k + i] are the weight and the number of the expert with the
// i-th largest logit, the first of equal ones; weights are the softmax over all logits, with renormalise divided by their
// sum.
//
// Mapping: a workgroup a token; grid z numbers tokens. Traffic: the logits once.

struct Params {
    experts: u32,
    top_k: u32,
    logits_stride: u32,
    routes_stride: u32,
    renormalise: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> logits: array<f32>;          // (n_tokens, logits_stride)
@group(0) @binding(3) var<storage, read_write> routes: array<f32>;    // (n_tokens, routes_stride)

const LOWEST: f32 = -3.4e38;

var<workgroup> left: array<f32, EXPERTS_MAX>;
var<workgroup> best_of: array<f32, WG>;
var<workgroup> best_at: array<u32, WG>;
var<workgroup> chosen: vec2<f32>;
var<workgroup> chosen_at: u32;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local_index: u32) {
    let token = group.z;
    if (token >= step.n_tokens) {
        return;
    }
    for (var i = local_index; i < params.experts; i += WG) {
        left[i] = logits[token * params.logits_stride + i];
    }
    let start = token * params.routes_stride;
    var largest = 0.0;
    var all = 0.0;
    var sum = 0.0;
    for (var round = 0u; round < params.top_k; round++) {
        // An invocation reads only what it wrote itself, and the largest of the round before is struck out below.
        var best = LOWEST;
        var at = params.experts;
        for (var i = local_index; i < params.experts; i += WG) {
            if (at == params.experts || left[i] > best) {
                best = left[i];
                at = i;
            }
        }
        best_of[local_index] = best;
        best_at[local_index] = at;
        // Orders the parts' largest before their comparison.
        workgroupBarrier();
        if (local_index == 0u) {
            for (var i = 1u; i < min(WG, params.experts); i++) {
                let better = best_of[i] > best || (best_of[i] == best && best_at[i] < at);
                at = select(at, best_at[i], better);
                best = select(best, best_of[i], better);
            }
            chosen = vec2<f32>(best, 0.0);
            chosen_at = at;
        }
        // Orders the choice before everybody reads it.
        workgroupBarrier();
        best = chosen.x;
        at = chosen_at;
        if (round == 0u) {
            largest = best;
            var part = 0.0;
            for (var i = local_index; i < params.experts; i += WG) {
                part += exp(left[i] - largest);
            }
            best_of[local_index] = part;
            // Orders the parts of the sum before they are added up.
            workgroupBarrier();
            for (var i = 0u; i < WG; i++) {
                all += best_of[i];
            }
            // Orders these reads before the next round's writes.
            workgroupBarrier();
        }
        let weight = exp(best - largest) / all;
        sum += weight;
        if (local_index == 0u) {
            routes[start + round] = weight;
            routes[start + params.top_k + round] = f32(at);
        }
        if (at % WG == local_index) {
            left[at] = LOWEST;
        }
        // Orders the reads of this round before the writes of the next one.
        workgroupBarrier();
    }
    if (params.renormalise != 0u && local_index == 0u) {
        for (var i = 0u; i < params.top_k; i++) {
            routes[start + i] /= sum;
        }
    }
}
