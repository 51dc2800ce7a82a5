// y[t, n] = sum_k w[n, k] x[t, k] for many tokens t, w packed (prelude/w4.cuh), x half precision in tiles: gemm_w4.cu for
// compute capability 9.0.
//
// Mapping and traffic: prelude/gemm_coop.cuh.
#include "prelude/gemm_coop.cuh"

#if HAS_WGMMA

#define GEMM_COOP(name, TOKENS, HALVES)                                                                                \
    KERNEL(name, GemmArgs, COOP_THREADS, 1) {                                                                          \
        gemm_coop<TOKENS, HALVES>(args, AllRows{blockIdx.x * TOKENS, args.tokens});                                    \
    }
GEMM_COOP(gemm_w4_coop_128, 128, false)
GEMM_COOP(gemm_w4_coop_64, 64, false)
GEMM_COOP(gemm_w4_coop_128_halves, 128, true)
GEMM_COOP(gemm_w4_coop_64_halves, 64, true)

#endif
