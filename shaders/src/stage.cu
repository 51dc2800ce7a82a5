// Inputs of packed and dense matrices for several tokens: out[t, k] = half(x[t, k] * factor(t) * norm[k]), in rows or
// tiles (prelude/w4.cuh); factor(t) is 1 / sqrt(mean square of the row + eps) with a norm, else 1 / WIDE.
//
// Mapping: a block a token, a thread every so many quads of elements. Traffic: x twice with a norm, the second time from
// cache, out once.
#include "prelude/w4.cuh"

struct StageArgs {
    const float* x;     // (rows, x_stride)
    const float* norm;  // (k), null for none
    u16* out;           // inputs of the next matrix
    float eps;
    u32 k;              // a multiple of 4, or the padding of x is zero
    u32 x_stride;       // elements, a multiple of 4
    u32 first_row;      // of x, for out row 0
    u32 out_stride;     // elements in rows, chunks in tiles
    u32 out_tiled;
};

KERNEL(stage, StageArgs, 256, 4) {
    wait_for_previous();
    float* const scratch = reinterpret_cast<float*>(shared_memory());
    const u32 token = blockIdx.x, quads = (args.k + 3) / 4;
    const F4* const x = reinterpret_cast<const F4*>(args.x + u64(args.first_row + token) * args.x_stride);
    const F4* const norm = reinterpret_cast<const F4*>(args.norm);
    const float factor = norm ? norm_factor(x, args.k, args.eps, scratch) : 1.f / WIDE;
    each_quad(x, quads, [&](u32 i, F4 v) {
        const U2 y = halves(normed(v, factor, norm ? norm + i : nullptr));
        store_inputs(args.out, args.out_tiled, args.out_stride, token, i * 4, y);
    });
}
