// y[p, n] = sum_k w[e(p), n, k] x[p, k] for many pairs p of a token and an expert e(p) of it, w half precision rows, the
// matrices of the experts one behind the other, x half precision in tiles by slot (group.cu), y by pair.
//
// Mapping: prelude/gemm.cuh; x numbers tiles of 64 slots of one expert. Traffic: an expert's weights once for 64 of its
// pairs, inputs once for 256 rows.
#include "prelude/gemm_half.cuh"

KERNEL(gemm_dense_8_experts, GemmExpertsArgs, 256, 1) { gemm_experts<HalfRows>(args); }
