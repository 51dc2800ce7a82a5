// Brings the pairs of a token and an expert that go through the same expert together: the slots of an expert are a whole
// number of tiles of `tile` of them, pairs first and NONE behind them, in no particular order.
//
// Mapping: one block; counts and places of the experts in shared memory. Traffic: the routes twice, the slots once.
#include "prelude/rows.cuh"

struct GroupArgs {
    const float* routes;  // (tokens, routes_stride): top_k weights, then the numbers of the experts
    u32* tiles;           // (all_tiles): the expert of each tile, NONE behind the last one
    u32* slots;           // (all_tiles * tile): pairs token * top_k + i
    u32 tokens;
    u32 top_k;
    u32 experts;
    u32 tile;
    u32 all_tiles;        // enough for every choice
    u32 routes_stride;
};

KERNEL(group, GroupArgs, 512, 1) {
    wait_for_previous();
    // Pairs of every expert, then the slot of its next one.
    u32* const places = reinterpret_cast<u32*>(shared_memory());
    u32* const used = places + args.experts;
    const u32 pairs = args.tokens * args.top_k;
    auto expert = [&](u32 pair) { return expert_of(args.routes, args.routes_stride, args.top_k, pair); };
    UNROLL_1 for (u32 i = threadIdx.x; i < args.experts; i += blockDim.x) places[i] = 0;
    UNROLL_1 for (u32 i = threadIdx.x; i < args.all_tiles * args.tile; i += blockDim.x) args.slots[i] = NONE;
    block_sync();
    UNROLL_1 for (u32 i = threadIdx.x; i < pairs; i += blockDim.x) atomic_add_shared(places + expert(i), 1);
    block_sync();
    if (warp_id() == 0) {
        u32 before = 0;
        UNROLL_1 for (u32 first = 0; first < args.experts; first += 32) {
            const u32 number = first + lane_id();
            const u32 own = number < args.experts ? (places[number] + args.tile - 1) / args.tile : 0;
            u32 end = own;
            UNROLL for (u32 d = 1; d < 32; d *= 2) {
                const u32 left = shfl(end, lane_id() - d);
                end += lane_id() >= d ? left : 0;
            }
            const u32 start = before + end - own;
            if (number < args.experts) places[number] = start * args.tile;
            UNROLL_1 for (u32 i = 0; i < own; i++) args.tiles[start + i] = number;
            before += shfl(end, 31);
        }
        if (lane_id() == 0) *used = before;
    }
    block_sync();
    UNROLL_1 for (u32 i = *used + threadIdx.x; i < args.all_tiles; i += blockDim.x) args.tiles[i] = NONE;
    UNROLL_1 for (u32 i = threadIdx.x; i < pairs; i += blockDim.x) {
        args.slots[atomic_add_shared(places + expert(i), 1)] = i;
    }
}
