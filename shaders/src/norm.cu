// out[t, s] = (x[t, s] - m) / sqrt(mean((x[t, s] - m)^2) + eps) * weight (+ bias) (+ out[t, s]) for segments s of `dim`
// consecutive columns of rows t; m is the mean of x[t, s] with CENTER, else 0.
//
// Mapping: a block a segment of a row. Traffic: x two or three times, all but the first from cache, out once.
#include "prelude/w4.cuh"

constexpr u32 CENTER = 16;  // Bit of flags; ADD is another

struct NormArgs {
    const float* x;
    const float* weight;  // (dim), or (segments, dim) where weight_step is dim
    const float* bias;    // (dim), null for none
    float* out;           // may be x
    u32 dim;
    u32 x_stride, out_stride;  // elements
    u32 x_offset, out_offset;  // first column
    u32 first_row;             // of x, for out row 0
    u32 weight_step;           // elements from the weights of a segment to those of the next one
    u32 flags;                 // CENTER, ADD
    float eps;
};

KERNEL(norm_rows, NormArgs, 256, 4) {
    wait_for_previous();
    float* const scratch = reinterpret_cast<float*>(shared_memory());
    const u32 row = blockIdx.y, column = blockIdx.x * args.dim;
    const float* const x = args.x + u64(args.first_row + row) * args.x_stride + args.x_offset + column;
    float* const out = args.out + u64(row) * args.out_stride + args.out_offset + column;
    float center = 0;
    if (args.flags & CENTER) {
        float sum = 0;
        UNROLL_1 for (u32 i = threadIdx.x; i < args.dim; i += blockDim.x) sum += load_fresh(x + i);
        center = block_sum(sum, scratch) / args.dim;
        // The sum has been read before the next one is written.
        block_sync();
    }
    float sum = 0;
    UNROLL_1 for (u32 i = threadIdx.x; i < args.dim; i += blockDim.x) {
        const float v = load_fresh(x + i) - center;
        sum += v * v;
    }
    const float factor = rsqrtf(block_sum(sum, scratch) / args.dim + args.eps);
    const float* const weight = args.weight + blockIdx.x * args.weight_step;
    UNROLL_1 for (u32 i = threadIdx.x; i < args.dim; i += blockDim.x) {
        float v = (load_fresh(x + i) - center) * factor * weight[i];
        if (args.bias) v += args.bias[i];
        if (args.flags & ADD) v += load_fresh(out + i);
        out[i] = v;
    }
}
