// y[p, n] = sum_k w[e(p), n, k] x[r(p), k] for the pairs p of few tokens and an expert e(p) of each, w packed
// (prelude/w4.cuh), the matrices of the experts one behind the other; r(p) is the token, or p. Products go where Product
// says, those of a gated MLP to inputs by pair.
//
// Mapping: prelude/gemv.cuh; y numbers the pairs of one token, or tiles of up to eight pairs of one expert (group.cu).
// Traffic: of each expert in a tile, its weights once.
#include "prelude/gemv.cuh"

struct GemvW4ExpertsArgs {
    GemvW4Args gemv;
    Experts experts;
};

#define GEMV_EXPERTS(groups, GROUPS, SUMS)                                                                             \
    KERNEL(gemv_w4_1_experts_##groups, GemvW4ExpertsArgs, 512, 1) {                                                    \
        wait_for_previous();                                                                                           \
        gemv<0, GROUPS, SUMS>(args.gemv, OnePair(args.experts, blockIdx.y));                                           \
    }                                                                                                                  \
    KERNEL(gemv_w4_8_experts_##groups, GemvW4ExpertsArgs, 512, 1) {                                                    \
        wait_for_previous();                                                                                           \
        const u32 expert = load_fresh(args.experts.tiles + blockIdx.y);                                                \
        if (expert == NONE) return;                                                                                    \
        gemv<1, GROUPS, SUMS>(args.gemv, EightSlots(args.experts, blockIdx.y, expert));                                \
    }
GEMV_EXPERTS(128, 1, false)
GEMV_EXPERTS(32, 4, false)
GEMV_EXPERTS(any, 4, true)
