// y[t, n] = sum_k w[n, k] x[t, k] for many tokens, w half precision rows, x half precision in tiles.
//
// Mapping and traffic: prelude/gemm.cuh.
#include "prelude/gemm_half.cuh"

KERNEL(gemm_dense_8, GemmArgs, 256, 1) { gemm<8, HalfRows>(args); }
KERNEL(gemm_dense_2, GemmArgs, 256, 1) { gemm<2, HalfRows>(args); }
