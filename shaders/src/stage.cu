// Inputs of packed and dense matrices for several tokens: out[t, k] = half(x[t, k] * factor(t) * norm[k]), in rows or
// tiles (prelude/w4.cuh); factor(t) is 1 / sqrt(mean square of the row + eps) with a norm, else 1 / WIDE. With slots, a
// row for each of them: that of the slot's pair (prelude/rows.cuh).
//
// Mapping: a block a token, a thread every so many quads of elements. Traffic: x twice with a norm, the second time from
// cache, out once.
#include "prelude/rows.cuh"

struct StageArgs {
    const float* x;     // (rows, x_stride)
    const float* norm;  // (k), null for none
    u16* out;           // inputs of the next matrix
    const u32* slots;   // (out rows), null for none
    float eps;
    u32 k;              // a multiple of 4, or the padding of x is zero
    u32 x_stride;       // elements, a multiple of 4
    u32 first_row;      // of x, for out row 0
    u32 out_stride;     // elements in rows, chunks in tiles
    u32 out_tiled;
    u32 share;          // with slots: pairs that share a row of x
    u32 pad;
};

KERNEL(stage, StageArgs, 256, 4) {
    wait_for_previous();
    float* const scratch = reinterpret_cast<float*>(shared_memory());
    const u32 token = blockIdx.x, quads = (args.k + 3) / 4;
    u32 row = args.first_row + token;
    if (args.slots) {
        const u32 pair = load_fresh(args.slots + token);
        if (pair == NONE) return;
        row = pair / args.share;
    }
    const F4* const x = reinterpret_cast<const F4*>(args.x + u64(row) * args.x_stride);
    const F4* const norm = reinterpret_cast<const F4*>(args.norm);
    const float factor = norm ? norm_factor(x, args.k, args.eps, scratch) : 1.f / WIDE;
    each_quad(x, quads, [&](u32 i, F4 v) {
        const U2 y = halves(normed(v, factor, norm ? norm + i : nullptr));
        store_inputs(args.out, args.out_tiled, args.out_stride, token, i * 4, y);
    });
}
