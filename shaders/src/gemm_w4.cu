// y[t, n] = sum_k w[n, k] x[t, k] for many tokens t, w packed (prelude/w4.cuh), x half precision in tiles.
//
// Mapping and traffic: prelude/gemm.cuh; weights are dequantised in registers, once for 64 tokens.
#include "prelude/packed.cuh"

KERNEL(gemm_w4_8, GemmArgs, 256, 1) { gemm<8, Packed<false>>(args); }
KERNEL(gemm_w4_2, GemmArgs, 256, 1) { gemm<2, Packed<false>>(args); }
KERNEL(gemm_w4_8_halves, GemmArgs, 256, 1) { gemm<8, Packed<true>>(args); }
KERNEL(gemm_w4_2_halves, GemmArgs, 256, 1) { gemm<2, Packed<true>>(args); }
