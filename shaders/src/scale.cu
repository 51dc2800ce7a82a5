// x[t, i] = scale x[t, i], or cap tanh(scale x[t, i] / cap), in place.
//
// Mapping: threads over elements of a row, rows over y. Traffic: x twice.
#include "prelude/activation.cuh"

struct ScaleArgs {
    float* x;  // (rows, x_stride)
    u32 width;
    u32 x_stride;
    float scale;  // divided by cap where there is one
    float cap;    // 0 for none
};

KERNEL(scale, ScaleArgs, 256, 4) {
    wait_for_previous();
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= args.width) return;
    float* const x = args.x + u64(blockIdx.y) * args.x_stride + i;
    *x = bounded(load_fresh(x) * args.scale, args.cap);
}
