// x[t, i] = x[t, i] / (1 + exp(-gate[t, 0])), in place.
//
// Mapping: threads over elements of a row, rows over y. Traffic: x twice.
#include "prelude/activation.cuh"

struct GateArgs {
    float* x;           // (tokens, x_stride)
    const float* gate;  // (tokens, gate_stride)
    u32 width;
    u32 x_stride, gate_stride;  // elements
    u32 pad;
};

KERNEL(gate, GateArgs, 256, 4) {
    wait_for_previous();
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= args.width) return;
    float* const x = args.x + u64(blockIdx.y) * args.x_stride + i;
    // Below -80 the factor is smaller than any number that matters.
    const float gate = fmaxf(load_fresh(args.gate + u64(blockIdx.y) * args.gate_stride), -80.f);
    *x = load_fresh(x) / (1.f + exp_fast(-gate));
}
