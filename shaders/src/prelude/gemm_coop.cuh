// Products of a packed matrix with many tokens for compute capability 9.0, whose matrix units multiply 64 rows at once and
// read inputs from shared memory themselves.
//
// Mapping: 8 warps compute a pair of row tiles each for TOKENS tokens; four of them share an operation. A ninth one
// fetches inputs, which lie in memory as the matrix units want them, to a ring of chunks. Weights go from memory to
// registers a chunk ahead and are dequantised there while the products of the step before are under way. Grid: tokens,
// pairs.
// Traffic: weights once for TOKENS tokens, inputs once for 256 rows.
#pragma once
#include "hopper.cuh"
#include "packed.cuh"

#if HAS_WGMMA

// Chunks of inputs in flight.
constexpr u32 COOP_DEPTH = 6;
constexpr u32 COOP_PAIRS = 8;
constexpr u32 COOP_THREADS = 384;

DEVICE void group_mma(float (&d)[64], u32 (&a)[4], u64 b) { group_mma_128(d, a, b); }
DEVICE void group_mma(float (&d)[32], u32 (&a)[4], u64 b) { group_mma_64(d, a, b); }

template <u32 TOKENS, bool HALVES, class Rows>
DEVICE void gemm_coop(const GemmArgs& args, const Rows& rows) {
    constexpr u32 CHUNK_BYTES = TOKENS * CHUNK * 2, TILE_BYTES = 64 * CHUNK * 2;
    const Product& p = args.product;
    const u32 chunks = p.stages * 2, warp = warp_id();
    // Sums take the place of the inputs in the end.
    u8* const memory = shared_memory();
    u64* const full = reinterpret_cast<u64*>(memory + max(COOP_DEPTH * CHUNK_BYTES, COOP_PAIRS * TOKENS * 128));
    u64* const empty = full + COOP_DEPTH;
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < COOP_DEPTH; i++) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, COOP_PAIRS);
        }
        barrier_init_fence();
    }
    block_sync();

    if (warp >= COOP_PAIRS) {
        registers_shrink<24>();
        wait_for_previous();
        if (threadIdx.x == COOP_PAIRS * 32) {
            const u8* const x = reinterpret_cast<const u8*>(args.x) + u64(blockIdx.x) * chunks * CHUNK_BYTES;
            UNROLL_1 for (u32 chunk = 0; chunk < chunks; chunk++) {
                const u32 slot = chunk % COOP_DEPTH, round = chunk / COOP_DEPTH;
                // The first round finds empty slots.
                barrier_wait(empty + slot, ~round & 1);
                barrier_expect(full + slot, CHUNK_BYTES);
                UNROLL for (u32 i = 0; i < TOKENS / 64; i++) {
                    copy_bulk(memory + slot * CHUNK_BYTES + i * TILE_BYTES,
                              x + (u64(i) * chunks + chunk) * TILE_BYTES, TILE_BYTES, full + slot);
                }
            }
        }
        return;
    }

    registers_grow<240>();
    const u32 pair = blockIdx.y * COOP_PAIRS + warp;
    const bool there = pair < p.pairs;
    const Tiles tiles = tiles_of(p, there ? pair : 0);
    Packed<HALVES> weights(args, {tiles.a + rows.first_tile(), tiles.b + rows.first_tile()});
    weights.load(0);
    wait_for_previous();
    float sums[2][TOKENS / 2];
    UNROLL for (u32 r = 0; r < 2; r++) UNROLL for (u32 i = 0; i < TOKENS / 2; i++) sums[r][i] = 0;
    // The operands of two steps: those of one are made while the other's are multiplied.
    u32 a[2][2][4];
    UNROLL_1 for (u32 chunk = 0; chunk < chunks; chunk++) {
        const u32 slot = chunk % COOP_DEPTH, round = chunk / COOP_DEPTH;
        weights.take(chunk);
        if (chunk + 1 < chunks) weights.load(chunk + 1);
        barrier_wait(full + slot, round & 1);
        const u64 inputs = operand_descriptor(memory + slot * CHUNK_BYTES);
        UNROLL for (u32 j = 0; j < 4; j++) {
            u32(&now)[2][4] = a[j % 2];
            group_mma_wait<1>();
            hold(now[0]);
            hold(now[1]);
            // All products of the chunk before have been made.
            if (j == 1 && chunk > 0 && lane_id() == 0) barrier_arrive(empty + (chunk - 1) % COOP_DEPTH);
            weights.fragment(now[0], 0, j);
            weights.fragment(now[1], 1, j);
            group_mma_fence();
            group_mma(sums[0], now[0], operand_step(inputs, j));
            group_mma(sums[1], now[1], operand_step(inputs, j));
            group_mma_commit();
        }
    }
    group_mma_wait<0>();
    hold(sums[0]);
    hold(sums[1]);
    // Nobody reads inputs any more.
    group_sync(1, COOP_PAIRS * 32);
    float* const mine = reinterpret_cast<float*>(memory + warp * (TOKENS * 128));
    UNROLL for (u32 t = 0; t < TOKENS / 8; t++) {
        const float first[4] = {sums[0][t * 4], sums[0][t * 4 + 1], sums[0][t * 4 + 2], sums[0][t * 4 + 3]};
        const float second[4] = {sums[1][t * 4], sums[1][t * 4 + 1], sums[1][t * 4 + 2], sums[1][t * 4 + 3]};
        spill_sums(mine, t * 8, first, second);
    }
    warp_sync();
    if (there) put_sums(p, tiles, mine, 0, TOKENS, rows);
}

#endif
