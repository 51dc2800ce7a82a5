// out[t, i] = activation(x[t, i]) * x[t, width + i] in f32.
//
// Mapping: threads over elements of a row, rows over y. Traffic: x and out once.
#include "prelude/activation.cuh"

struct GluArgs {
    const float* x;  // (rows, x_stride): gate, then up
    float* out;      // (rows, out_stride)
    u32 width;
    u32 x_stride, out_stride;  // elements
    u32 activation;            // SILU, ...
};

KERNEL(glu, GluArgs, 256, 4) {
    wait_for_previous();
    const float* const x = args.x + u64(blockIdx.y) * args.x_stride;
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= args.width) return;
    const float gate = load_fresh(x + i), up = load_fresh(x + args.width + i);
    args.out[u64(blockIdx.y) * args.out_stride + i] = activate(gate, args.activation) * up;
}
