// Half precision weights for gemm.cuh, in rows of whole stages.
#pragma once
#include "gemm.cuh"

struct HalfRows {
    const U4* rows[2][2];
    U4 next[2][2][2], now[2][2][2];

    DEVICE HalfRows(const GemmArgs& args, Tiles tiles) {
        const u32 g = lane_id() / 4, c = lane_id() % 4, stride = args.product.stages * STAGE;
        UNROLL for (u32 i = 0; i < 2; i++) {
            rows[0][i] = reinterpret_cast<const U4*>(args.dense + u64(tiles.a * TILE + g + i * 8) * stride) + c;
            rows[1][i] = reinterpret_cast<const U4*>(args.dense + u64(tiles.b * TILE + g + i * 8) * stride) + c;
        }
    }
    DEVICE void load(u32 chunk) {
        UNROLL for (u32 r = 0; r < 2; r++) UNROLL for (u32 i = 0; i < 2; i++) UNROLL for (u32 half = 0; half < 2; half++) {
            next[r][i][half] = load_weights(rows[r][i] + chunk * 8 + half * 4);
        }
    }
    DEVICE void take(u32) {
        UNROLL for (u32 r = 0; r < 2; r++) UNROLL for (u32 i = 0; i < 2; i++) UNROLL for (u32 half = 0; half < 2; half++) {
            now[r][i][half] = next[r][i][half];
        }
    }
    DEVICE void fragment(u32 (&a)[4], u32 r, u32 j) {
        const U4 p = now[r][0][j / 2], q = now[r][1][j / 2];
        a[0] = j % 2 ? p.z : p.x;
        a[1] = j % 2 ? q.z : q.x;
        a[2] = j % 2 ? p.w : p.y;
        a[3] = j % 2 ? q.w : q.y;
    }
};
