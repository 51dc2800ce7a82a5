// y[t, n] = sum_k w[n, k] x[t, k] for few tokens t, w packed (prelude/w4.cuh), products where Product says.
//
// Mapping and traffic: prelude/gemv.cuh.
#include "prelude/gemv.cuh"

#define GEMV(most, groups, N_TILES, GROUPS, SUMS)                                                                      \
    KERNEL(gemv_w4_##most##_##groups, GemvW4Args, 512, 1) {                                                            \
        gemv<N_TILES, GROUPS, SUMS>(args, AllRows{0, N_TILES == 0 ? 1 : args.tokens});                                 \
    }
GEMV(1, 128, 0, 1, false)
GEMV(1, 64, 0, 2, false)
GEMV(1, 32, 0, 4, false)
GEMV(1, any, 0, 4, true)
GEMV(8, 128, 1, 1, false)
GEMV(8, 32, 1, 4, false)
GEMV(8, any, 1, 4, true)
GEMV(16, 128, 2, 1, false)
GEMV(16, any, 2, 4, true)
