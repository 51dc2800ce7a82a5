// Products of a matrix with many tokens on the matrix units that every machine has; the matrix comes from `Weights`.
//
// Mapping: a warp computes a pair of row tiles for 64 tokens. Of the 8 warps of a block, PAIRS take different pairs and
// the rest other chunks of the inputs, whose sums meet in shared memory at the end. The warps that work on the same
// chunks share their inputs, which arrive in a ring of chunks; all warps go through as many rounds, so that they meet at
// each barrier; weights go from memory to registers, a chunk ahead. Grid x
// numbers tokens by 64, y pairs, so that blocks that run side by side share weights.
#pragma once
#include "rows.cuh"

constexpr u32 GEMM_TOKENS = 64;
constexpr u32 GEMM_WARPS = 8;
constexpr u32 GEMM_DEPTH = 3;
constexpr u32 GEMM_CHUNK_BYTES = GEMM_TOKENS * CHUNK * 2;
// A warp's sums in shared memory: (tokens, rows of both tiles).
constexpr u32 GEMM_SUM_BYTES = GEMM_TOKENS * 2 * TILE * 4;

struct GemmArgs {
    Product product;
    const u16* x;      // half precision inputs in tiles
    const u16* dense;  // (rows, stages * STAGE) half precision weights, for gemm_dense
    u32 tokens;
};

// Where four rows from 4 `quad` on lie of a token's sums; quads change places for the sake of the banks.
DEVICE u32 sums_at(u32 token, u32 quad) { return token * 2 * TILE + (quad ^ token / 2 % 4 * 2) * 4; }

// The sums of eight tokens from `token` on, as mma() leaves them, to shared memory.
DEVICE void spill_sums(float* sums, u32 token, const float (&a)[4], const float (&b)[4]) {
    const u32 g = lane_id() / 4, c = lane_id() % 4;
    UNROLL for (u32 i = 0; i < 4; i++) {
        const u32 t = token + 2 * c + i % 2, quad = g / 4 + i / 2 * 2;
        sums[sums_at(t, quad) + g % 4] = a[i];
        sums[sums_at(t, quad + TILE / 4) + g % 4] = b[i];
    }
}

// Puts the sums of the block's tokens `from` to `to`.
template <class Rows>
DEVICE void put_sums(const Product& p, Tiles tiles, const float* sums, u32 from, u32 to, const Rows& rows) {
    UNROLL_1 for (u32 i = lane_id(); i < (to - from) * (TILE / 4); i += 32) {
        const u32 quad = i % (TILE / 4), token = from + i / (TILE / 4);
        const u32 row = rows.output(token);
        // None follows one that is not there.
        if (row == NONE) break;
        const F4 a = *reinterpret_cast<const F4*>(sums + sums_at(token, quad));
        const F4 b = *reinterpret_cast<const F4*>(sums + sums_at(token, quad + TILE / 4));
        put(p, tiles, quad * 4, row, a, b);
    }
}

template <u32 PAIRS, class Weights, class Rows>
DEVICE void gemm(const GemmArgs& args, const Rows& rows) {
    constexpr u32 SPLITS = GEMM_WARPS / PAIRS;
    const Product& p = args.product;
    const u32 warp = warp_id(), lane = lane_id();
    const u32 split = warp / PAIRS, in_split = threadIdx.x % (PAIRS * 32);
    const u32 pair = blockIdx.y * PAIRS + warp % PAIRS;
    const bool there = pair < p.pairs;
    const Tiles tiles = tiles_of(p, there ? pair : 0);
    const u32 chunks = p.stages * 2;
    const u32 first = chunks * split / SPLITS, last = chunks * (split + 1) / SPLITS;
    const u32 rounds = (chunks + SPLITS - 1) / SPLITS;
    u8* const ring = shared_memory() + split * (GEMM_DEPTH * GEMM_CHUNK_BYTES);
    const u8* const x = reinterpret_cast<const u8*>(args.x) + u64(blockIdx.x) * chunks * GEMM_CHUNK_BYTES;

    auto copy_inputs = [&](u32 chunk) {
        u8* const slot = ring + (chunk - first) % GEMM_DEPTH * GEMM_CHUNK_BYTES;
        const u8* const from = x + u64(chunk) * GEMM_CHUNK_BYTES;
        UNROLL for (u32 i = 0; i < GEMM_CHUNK_BYTES / 16 / (PAIRS * 32); i++) {
            const u32 at = (i * PAIRS * 32 + in_split) * 16;
            copy_async16(slot + at, from + at);
        }
    };

    Weights weights(args, {tiles.a + rows.first_tile(), tiles.b + rows.first_tile()});
    weights.load(first);
    wait_for_previous();
    UNROLL for (u32 i = 0; i < GEMM_DEPTH - 1; i++) {
        if (first + i < last) copy_inputs(first + i);
        copy_async_commit();
    }
    float sums[2][GEMM_TOKENS / 8][4] = {};
    UNROLL_1 for (u32 chunk = first; chunk < first + rounds; chunk++) {
        copy_async_wait<GEMM_DEPTH - 2>();
        // All have their part of this chunk's inputs, and have done with those of the chunk before it.
        block_sync();
        if (chunk + GEMM_DEPTH - 1 < last) copy_inputs(chunk + GEMM_DEPTH - 1);
        copy_async_commit();
        if (chunk >= last) continue;
        weights.take(chunk);
        if (chunk + 1 < last) weights.load(chunk + 1);
        const u8* const slot = ring + (chunk - first) % GEMM_DEPTH * GEMM_CHUNK_BYTES;
        UNROLL for (u32 j = 0; j < 4; j++) {
            u32 a[2][4];
            weights.fragment(a[0], 0, j);
            weights.fragment(a[1], 1, j);
            UNROLL for (u32 t = 0; t < GEMM_TOKENS / 16; t++) {
                // Matrices: the first eight tokens' 16 inputs, then those of the next eight.
                const u32 token = t * 16 + lane / 16 * 8 + lane % 8, unit = j * 2 + lane / 8 % 2;
                u32 b[4];
                load_matrices(b, slot + token * 128 + (unit ^ token % 8) * 16);
                UNROLL for (u32 r = 0; r < 2; r++) {
                    mma(sums[r][t * 2], a[r], b[0], b[1]);
                    mma(sums[r][t * 2 + 1], a[r], b[2], b[3]);
                }
            }
        }
    }
    // The rings are read no more.
    copy_async_wait<0>();
    block_sync();
    float* const mine = reinterpret_cast<float*>(shared_memory() + warp * GEMM_SUM_BYTES);
    UNROLL for (u32 t = 0; t < GEMM_TOKENS / 8; t++) spill_sums(mine, t * 8, sums[0][t], sums[1][t]);
    if (SPLITS > 1) {
        block_sync();
        // The warps of a pair add up and put different tokens.
        constexpr u32 SHARE = GEMM_TOKENS / SPLITS;
        float* const of_pair = reinterpret_cast<float*>(shared_memory() + warp % PAIRS * GEMM_SUM_BYTES);
        UNROLL_1 for (u32 i = lane; i < SHARE * 2 * TILE; i += 32) {
            float* const at = of_pair + split * SHARE * 2 * TILE + i;
            float sum = *at;
            UNROLL for (u32 s = 1; s < SPLITS; s++) sum += at[s * PAIRS * (GEMM_SUM_BYTES / 4)];
            *at = sum;
        }
        warp_sync();
        if (there) {
            put_sums(p, tiles, of_pair, split * SHARE, (split + 1) * SHARE, rows);
        }
    } else {
        warp_sync();
        if (there) put_sums(p, tiles, mine, 0, GEMM_TOKENS, rows);
    }
}

// The block's tokens, through the whole matrix.
template <u32 PAIRS, class Weights>
DEVICE void gemm(const GemmArgs& args) {
    gemm<PAIRS, Weights>(args, AllRows{blockIdx.x * GEMM_TOKENS, args.tokens});
}

// Arguments of the products of experts.
struct GemmExpertsArgs {
    GemmArgs gemm;
    Experts experts;
};

// The block's tile of slots, through the matrix of their expert.
template <class Weights>
DEVICE void gemm_experts(const GemmExpertsArgs& args) {
    wait_for_previous();
    const u32 expert = load_fresh(args.experts.tiles + blockIdx.x);
    if (expert == NONE) return;
    gemm<GEMM_WARPS, Weights>(args.gemm, ManySlots(args.experts, args.gemm.product, blockIdx.x, expert));
}
