// y[p, n] = sum_k w[e(p), n, k] x[p, k] for many pairs p of a token and an expert e(p) of it, w packed (prelude/w4.cuh), the
// matrices of the experts one behind the other, x half precision in tiles by slot (group.cu). Products go where Product
// says: f32 rows by pair, those of a gated MLP to inputs by slot.
//
// Mapping: prelude/gemm.cuh and prelude/gemm_coop.cuh; x numbers tiles of 64 slots of one expert.
// Traffic: an expert's weights once for 64 of its pairs, inputs once for 256 rows.
#include "prelude/gemm_coop.cuh"

KERNEL(gemm_w4_8_experts, GemmExpertsArgs, 256, 1) { gemm_experts<Packed<false>>(args); }
KERNEL(gemm_w4_8_experts_halves, GemmExpertsArgs, 256, 1) { gemm_experts<Packed<true>>(args); }

#if HAS_WGMMA

template <bool HALVES>
DEVICE void gemm_coop_experts(const GemmExpertsArgs& args) {
    wait_for_previous();
    const u32 expert = load_fresh(args.experts.tiles + blockIdx.x);
    if (expert == NONE) return;
    gemm_coop<64, HALVES>(args.gemm, ManySlots(args.experts, args.gemm.product, blockIdx.x, expert));
}

KERNEL(gemm_w4_coop_experts, GemmExpertsArgs, COOP_THREADS, 1) { gemm_coop_experts<false>(args); }
KERNEL(gemm_w4_coop_experts_halves, GemmExpertsArgs, COOP_THREADS, 1) { gemm_coop_experts<true>(args); }

#endif
