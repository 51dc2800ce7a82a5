// The experts of every token: routes[t, i] and routes[t, top_k + i] are the weight and the number of the expert with the
// i-th largest logit, the first of equal ones; weights are the softmax over all logits, divided by their sum where they are
// renormalised.
//
// Mapping: a warp a token, a lane every 32nd logit, in shared memory. Traffic: the logits once.
#include "prelude/rows.cuh"

struct RouteArgs {
    const float* logits;  // (tokens, logits_stride)
    float* routes;        // (tokens, routes_stride)
    u32 tokens;
    u32 logits_stride, routes_stride;  // elements
    u32 experts;
    u32 top_k;                         // at most 32
    u32 renormalise;
};

// Warps of a block.
constexpr u32 ROUTE_WARPS = 8;

KERNEL(route, RouteArgs, ROUTE_WARPS * 32, 4) {
    wait_for_previous();
    const u32 token = blockIdx.x * ROUTE_WARPS + warp_id(), lane = lane_id();
    if (token >= args.tokens) return;
    // No number is below those that are struck out.
    constexpr float LOWEST = -3.4e38f;
    const float struck_out = as_f32(0xff800000);
    // A lane reads only what it wrote itself.
    float* const left = reinterpret_cast<float*>(shared_memory()) + warp_id() * args.experts;
    const float* const logits = args.logits + u64(token) * args.logits_stride;
    UNROLL_1 for (u32 i = lane; i < args.experts; i += 32) left[i] = fminf(fmaxf(load_fresh(logits + i), LOWEST), -LOWEST);
    float largest = 0, all = 0, sum = 0, my_weight = 0;
    u32 my_expert = 0;
    UNROLL_1 for (u32 round = 0; round < args.top_k; round++) {
        float best = struck_out;
        u32 at = args.experts;
        UNROLL_1 for (u32 i = lane; i < args.experts; i += 32) {
            if (left[i] > best) {
                best = left[i];
                at = i;
            }
        }
        UNROLL for (u32 m = 16; m > 0; m /= 2) {
            const float other = shfl_xor(best, m);
            const u32 other_at = shfl_xor(at, m);
            if (other > best || (other == best && other_at < at)) {
                best = other;
                at = other_at;
            }
        }
        if (round == 0) {
            largest = best;
            UNROLL_1 for (u32 i = lane; i < args.experts; i += 32) all += exp_fast(left[i] - largest);
            all = warp_sum(all);
        }
        const float weight = exp_fast(best - largest) / all;
        sum += weight;
        if (lane == round) {
            my_weight = weight;
            my_expert = at;
        }
        if (at % 32 == lane) left[at] = struck_out;
    }
    if (lane >= args.top_k) return;
    float* const routes = args.routes + u64(token) * args.routes_stride + lane;
    routes[0] = my_weight / (args.renormalise ? sum : 1.f);
    routes[args.top_k] = float(my_expert);
}
