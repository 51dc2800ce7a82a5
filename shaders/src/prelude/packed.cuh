// Packed weights for gemm.cuh: dequantised in registers, in half precision.
#pragma once
#include "gemm.cuh"

// A group's numbers for two rows, to dequantise in half precision: weights are (q - z) s + c, all rounded once.
struct GroupHalves {
    u32 low, high;  // for unpack()
    u32 s0, s1, c0, c1;
};

DEVICE GroupHalves group_halves(U2 params, u32 flags) {
    constexpr u32 MAGIC = 0x64006400, SIXTY_FOUR = 0x54005400;
    u32 z0 = params.x >> 16, z1 = params.y >> 16;
    GroupHalves group;
    group.s0 = h2_dup(params.x);
    group.s1 = h2_dup(params.y);
    group.c0 = group.c1 = 0;
    if (flags & OFFSET_IS_BIAS) {
        group.c0 = h2_dup(z0);
        group.c1 = h2_dup(z1);
        z0 = z1 = 0;
    } else if (flags & FRACTIONS) {
        // Exact for zero points of few bits.
        const float o0 = h_to_f32(u16(z0)), o1 = h_to_f32(u16(z1)), r0 = rintf(o0), r1 = rintf(o1);
        group.c0 = h2_dup(h_from_f32((r0 - o0) * h_to_f32(u16(params.x))));
        group.c1 = h2_dup(h_from_f32((r1 - o1) * h_to_f32(u16(params.y))));
        z0 = h_from_f32(r0);
        z1 = h_from_f32(r1);
    }
    group.low = h2_add(h2_dup(z0), MAGIC);
    group.high = h2_sub(0x80008000u ^ h2_dup(z1), SIXTY_FOUR);
    return group;
}

// Weights of eight codes.
DEVICE void dequantise(u32 (&a)[4], u32 word, const GroupHalves& group) {
    unpack(a, word, group.low, group.high);
    a[0] = h2_fma(a[0], group.s0, group.c0);
    a[1] = h2_fma(a[1], group.s1, group.c1);
    a[2] = h2_fma(a[2], group.s0, group.c0);
    a[3] = h2_fma(a[3], group.s1, group.c1);
}

// The packed weights of a pair of tiles, a chunk ahead. HALVES: groups of 32.
template <bool HALVES>
struct Packed {
    const U4 *codes_a, *codes_b;
    const U2 *params_a, *params_b;
    u32 groups, shift, flags;
    U4 next[2], codes[2];
    U2 next_params[2][HALVES ? 2 : 1];
    GroupHalves group[2][HALVES ? 2 : 1];

    DEVICE Packed(const GemmArgs& args, Tiles tiles) {
        const Product& p = args.product;
        const u32 lane = lane_id();
        codes_a = p.codes + u64(tiles.a) * p.stages * 64 + lane;
        codes_b = p.codes + u64(tiles.b) * p.stages * 64 + lane;
        params_a = p.params + u64(tiles.a) * p.groups * 8 + lane / 4;
        params_b = p.params + u64(tiles.b) * p.groups * 8 + lane / 4;
        groups = p.groups;
        shift = p.group_shift;
        flags = p.flags;
    }
    DEVICE void load(u32 chunk) {
        next[0] = load_weights(codes_a + chunk * 32);
        next[1] = load_weights(codes_b + chunk * 32);
        UNROLL for (u32 half = 0; half < (HALVES ? 2 : 1); half++) {
            // Inputs of zero lie behind the last group.
            const u32 at = min((chunk * 2 + half) >> shift, groups - 1) * 8;
            next_params[0][half] = load_weights(params_a + at);
            next_params[1][half] = load_weights(params_b + at);
        }
    }
    DEVICE void take(u32) {
        UNROLL for (u32 r = 0; r < 2; r++) {
            codes[r] = next[r];
            UNROLL for (u32 half = 0; half < (HALVES ? 2 : 1); half++) {
                group[r][half] = group_halves(next_params[r][half], flags);
            }
        }
    }
    DEVICE void fragment(u32 (&a)[4], u32 r, u32 j) {
        const u32 word = j == 0 ? codes[r].x : j == 1 ? codes[r].y : j == 2 ? codes[r].z : codes[r].w;
        dequantise(a, word, group[r][HALVES ? j / 2 : 0]);
    }
};
