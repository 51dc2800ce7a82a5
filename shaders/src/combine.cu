// out[t, :] += sum_i routes[t, i] x[t * top_k + i, :] over the top_k experts i of token t.
//
// Mapping: threads over elements of a row, rows over y. Traffic: every row once.
#include "prelude/rows.cuh"

struct CombineArgs {
    const float* x;       // (tokens * top_k, x_stride)
    const float* routes;  // (tokens, routes_stride): weights first
    float* out;           // (tokens, out_stride)
    u32 width;
    u32 top_k;
    u32 x_stride, routes_stride, out_stride;  // elements
    u32 pad;
};

KERNEL(combine, CombineArgs, 256, 4) {
    wait_for_previous();
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
    if (i >= args.width) return;
    float* const out = args.out + u64(token) * args.out_stride + i;
    const float* const x = args.x + u64(token) * args.top_k * args.x_stride + i;
    const float* const weights = args.routes + u64(token) * args.routes_stride;
    float sum = load_fresh(out);
    UNROLL_4 for (u32 e = 0; e < args.top_k; e++) {
        sum = fmaf(load_fresh(weights + e), load_fresh(x + u64(e) * args.x_stride), sum);
    }
    *out = sum;
}
