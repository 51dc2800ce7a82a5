// Products of a packed matrix (w4.cuh) with few tokens, which go where Product says.
//
// Mapping: a block has a pair of row tiles; its warps share the inputs, and the matrix units multiply 16 rows with up to
// 8 tokens at once. A warp copies its codes, group parameters and, for several tokens, inputs to a ring of stages of its
// own, so that no warp waits for another before the end; the first stages are under way before the previous kernel
// ends. One token: each warp makes the half precision inputs of its own stages; the factor of a norm in front, which is
// the same for all of them, multiplies the sums. Traffic: weights once, inputs once a block.
#pragma once
#include "rows.cuh"

struct GemvW4Args {
    Product product;
    const float* x;       // (rows, x_stride) f32, of which a single one is read; k a multiple of 4
    const u16* half_x;    // (rows, x_stride) f16, read where x is null
    const float* norm;    // (k) weights of the norm in front of x, or null
    float eps;
    u32 k;
    u32 x_stride;         // elements; of half_x: a multiple of STAGE, with zeros behind the k-th
    u32 tokens;
};

// Stages of a warp's ring.
constexpr u32 GEMV_DEPTH = 3;
// Bytes of a stage: codes and parameters of two tiles, `per_stage` groups; inputs of `n_tiles` times 8 tokens.
DEVICE constexpr u32 gemv_slot(int n_tiles, u32 per_stage) { return 2048 + 128 * per_stage + n_tiles * 2048; }

// Power of two that brings the largest of some numbers, `top`, to about the middle of the range of half precision.
DEVICE float scale_of(float top) {
    const u32 exponent = as_u32(top) >> 23;
    // Zeros and infinities stay what they are.
    return exponent < 8 || exponent == 255 ? 1.f : as_f32((254 + 7 - exponent) << 23);
}

// Sum of `n` quads, `step` of them apart.
DEVICE F4 sum_of(const F4* quads, u32 step, u32 n) {
    F4 sum = {0, 0, 0, 0};
    UNROLL_1 for (u32 i = 0; i < n; i++) {
        const F4 v = quads[i * step];
        sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
    }
    return sum;
}

// One token where N_TILES is 0. At most GROUPS groups a stage, 1, 2 or 4. SUMS: offsets need not be integers.
template <int N_TILES, int GROUPS, bool SUMS, class Rows>
DEVICE void gemv(const GemvW4Args& args, const Rows& rows) {
    constexpr bool ONE = N_TILES == 0;
    constexpr u32 NT = ONE ? 1 : N_TILES;
    constexpr u32 DEPTH = GEMV_DEPTH, SLOT = gemv_slot(N_TILES, GROUPS);
    constexpr u32 CODES = 1024, PARAMS = 64 * GROUPS;
    const Product& p = args.product;
    const u32 warps = blockDim.x / 32, warp = warp_id(), lane = lane_id(), g = lane / 4, c = lane % 4;
    const Tiles tiles = tiles_of(p, blockIdx.x);
    u8* const memory = shared_memory();
    u8* const ring = memory + warp * (DEPTH * SLOT);
    const u32 first = p.stages * warp / warps, last = p.stages * (warp + 1) / warps;

    // Lane l copies 16 bytes of group parameters: of the first tile below 16, of the second one above.
    const u32 tile_a = tiles.a + rows.first_tile(), tile_b = tiles.b + rows.first_tile();
    const u32 tile_of_lane = lane < 16 ? tile_a : tile_b;
    const bool has_params = lane % 16 < 4 * GROUPS;
    const U4* const params = reinterpret_cast<const U4*>(p.params) + u64(tile_of_lane) * p.groups * 4 + lane % 4;
    const U4* const codes_a = p.codes + u64(tile_a) * p.stages * 64 + lane;
    const U4* const codes_b = p.codes + u64(tile_b) * p.stages * 64 + lane;

    auto copy_weights = [&](u32 stage) {
        u8* const slot = ring + (stage - first) % DEPTH * SLOT + lane * 16;
        copy_async16(slot, codes_a + stage * 64);
        copy_async16(slot + 512, codes_a + stage * 64 + 32);
        copy_async16(slot + CODES, codes_b + stage * 64);
        copy_async16(slot + CODES + 512, codes_b + stage * 64 + 32);
        if (has_params) {
            // Inputs of zero lie behind the last group.
            const u32 group = min((stage * 4 + lane % 16 / 4 * (4 / GROUPS)) >> p.group_shift, p.groups - 1);
            u8* const to = ring + (stage - first) % DEPTH * SLOT + 2 * CODES;
            copy_async16_of_run(to + (lane < 16 ? 0 : PARAMS) + lane % 16 * 16, params + group * 4);
        }
    };
    // Inputs of a stage: 256 bytes a token; the halves of every other row change places, for the sake of the banks.
    auto copy_inputs = [&](u32 stage) {
        u8* const slot = ring + (stage - first) % DEPTH * SLOT + 2 * (CODES + PARAMS);
        UNROLL for (u32 i = 0; i < NT * 4; i++) {
            const u32 token = i * 2 + lane / 16, unit = lane % 16;
            const u16* const from = args.half_x + u64(rows.input(token)) * args.x_stride + stage * STAGE + unit * 8;
            copy_async16(slot + token * 256 + (unit ^ token % 2 * 4) * 16, from, rows.has(token));
        }
    };

    // The norm in front of one token, a few stages at a time: no earlier kernel writes its weights.
    constexpr u32 AT_ONCE = 4;
    const bool through_norm = ONE && args.x && args.norm;
    F4 norm[AT_ONCE];
    auto load_norm = [&](u32 stage) {
        UNROLL for (u32 i = 0; i < AT_ONCE; i++) {
            const u32 at = (stage + i) * 32 + lane;
            const bool there = stage + i < last && at < args.k / 4;
            norm[i] = there && through_norm ? reinterpret_cast<const F4*>(args.norm)[at] : F4{1, 1, 1, 1};
        }
    };
    if (ONE) load_norm(first);
    UNROLL for (u32 i = 0; i < DEPTH; i++) {
        if (first + i < last) copy_weights(first + i);
        if (ONE) copy_async_commit();
    }
    wait_for_previous();

    // One token, behind the rings: inputs (stages * STAGE), sums (warps, 2 * TILE), sums of squares (warps), and what the
    // inputs of each stage have to be multiplied by.
    u16* const row = reinterpret_cast<u16*>(memory + warps * DEPTH * SLOT);
    float* const scratch = reinterpret_cast<float*>(row + p.stages * STAGE);
    float* const factors = scratch + warps * (2 * TILE + 1);
    float squares = 0;
    if (ONE && args.x) {
        const F4* const x = reinterpret_cast<const F4*>(args.x + u64(rows.input(0)) * args.x_stride);
        UNROLL_1 for (u32 stage = first; stage < last; stage += AT_ONCE) {
            F4 v[AT_ONCE];
            UNROLL for (u32 i = 0; i < AT_ONCE; i++) {
                const u32 at = (stage + i) * 32 + lane;
                const bool there = stage + i < last && at < args.k / 4;
                v[i] = there ? load_fresh(x + at) : F4{0, 0, 0, 0};
            }
            if (stage > first) load_norm(stage);
            UNROLL for (u32 i = 0; i < AT_ONCE; i++) {
                if (stage + i >= last) break;
                squares += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
                const F4 w = norm[i], u = {v[i].x * w.x, v[i].y * w.y, v[i].z * w.z, v[i].w * w.w};
                const float scale = scale_of(
                    warp_max(fmaxf(fmaxf(fabsf(u.x), fabsf(u.y)), fmaxf(fabsf(u.z), fabsf(u.w)))));
                reinterpret_cast<U2*>(row)[(stage + i) * 32 + lane] = halves(normed(u, scale, nullptr));
                if (lane == 0) factors[stage + i] = as_f32((254u << 23) - as_u32(scale));  // 1 / scale
            }
        }
    } else if (ONE) {
        const U4* const x = reinterpret_cast<const U4*>(args.half_x + u64(rows.input(0)) * args.x_stride);
        UNROLL_4 for (u32 i = first * 16 + lane; i < last * 16; i += 32) {
            reinterpret_cast<U4*>(row)[i] = load_fresh(x + i);
            if (i % 16 == 0) factors[i / 16] = 1.f;
        }
    } else {
        UNROLL for (u32 i = 0; i < DEPTH; i++) {
            if (first + i < last) copy_inputs(first + i);
            copy_async_commit();
        }
    }

    // Sums of the first and the second words of lanes: chains of products half as long, where there are registers.
    constexpr u32 CHAINS = NT == 1 ? 2 : 1;
    float total[2][NT][4] = {};
    UNROLL_1 for (u32 stage = first; stage < last; stage++) {
        copy_async_wait<DEPTH - 1>();
        warp_sync();
        const u8* const slot = ring + (stage - first) % DEPTH * SLOT;
        const U4* const codes = reinterpret_cast<const U4*>(slot) + lane;
        const U2* const group_params = reinterpret_cast<const U2*>(slot + 2 * CODES) + g;
        const float factor = ONE ? factors[stage] : 1.f;
        Group groups[2];
        float part[CHAINS][2][NT][4], sums[NT][4];
        UNROLL for (u32 half = 0; half < 4; half++) {
            // Where a group begins.
            const bool begins = GROUPS == 4 || half == 0 || (GROUPS == 2 && half == 2);
            const bool ends = GROUPS == 4 || half == 3 || (GROUPS == 2 && half == 1);
            if (begins) {
                UNROLL for (u32 r = 0; r < 2; r++) {
                    groups[r] = group_of<SUMS>(group_params[r * PARAMS / 8 + half * GROUPS / 4 * 8], p.flags);
                    UNROLL for (u32 t = 0; t < NT; t++) UNROLL for (u32 i = 0; i < 4; i++) {
                        part[0][r][t][i] = part[CHAINS - 1][r][t][i] = 0;
                    }
                }
                UNROLL for (u32 t = 0; t < NT; t++) UNROLL for (u32 i = 0; i < 4; i++) sums[t][i] = 0;
            }
            // Inputs 32 half + 8 c..: two words' worth.
            U4 x[NT];
            UNROLL for (u32 t = 0; t < NT; t++) {
                if (ONE) {
                    x[t] = reinterpret_cast<const U4*>(row)[stage * 16 + half * 4 + c];
                } else {
                    const u32 token = t * 8 + g;
                    x[t] = reinterpret_cast<const U4*>(slot + 2 * (CODES + PARAMS))
                        [token * 16 + ((half * 4 + c) ^ token % 2 * 4)];
                }
            }
            UNROLL for (u32 r = 0; r < 2; r++) {
                const U2 words = reinterpret_cast<const U2*>(codes + r * 64 + half / 2 * 32)[half % 2];
                u32 a[4];
                unpack(a, words.x, groups[r].low, groups[r].high);
                UNROLL for (u32 t = 0; t < NT; t++) mma(part[0][r][t], a, x[t].x, x[t].y);
                unpack(a, words.y, groups[r].low, groups[r].high);
                UNROLL for (u32 t = 0; t < NT; t++) mma(part[CHAINS - 1][r][t], a, x[t].z, x[t].w);
            }
            if (SUMS) {
                const u32 ones[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};
                UNROLL for (u32 t = 0; t < NT; t++) {
                    mma(sums[t], ones, x[t].x, x[t].y);
                    mma(sums[t], ones, x[t].z, x[t].w);
                }
            }
            if (ends) {
                UNROLL for (u32 r = 0; r < 2; r++) UNROLL for (u32 t = 0; t < NT; t++) {
                    UNROLL for (u32 i = 0; i < 4; i++) {
                        const Group& group = groups[r];
                        const float s = (i < 2 ? group.s0 : group.s1) * factor;
                        const float sum = part[0][r][t][i] + (CHAINS == 2 ? part[CHAINS - 1][r][t][i] : 0.f);
                        total[r][t][i] = fmaf(s, sum, total[r][t][i]);
                        if (SUMS) {
                            const float offset = (i < 2 ? group.c0 : group.c1) * factor;
                            total[r][t][i] = fmaf(offset, sums[t][i], total[r][t][i]);
                        }
                    }
                }
            }
        }
        // All lanes have read the slot that the copies of another lane overwrite.
        warp_sync();
        if (stage + DEPTH < last) {
            copy_weights(stage + DEPTH);
            if (!ONE) copy_inputs(stage + DEPTH);
        }
        copy_async_commit();
    }

    if (ONE) {
        // Column 0 is the token.
        if (c == 0) {
            UNROLL for (u32 r = 0; r < 2; r++) {
                scratch[warp * 32 + r * 16 + g] = total[r][0][0];
                scratch[warp * 32 + r * 16 + g + 8] = total[r][0][2];
            }
        }
        squares = warp_sum(squares);
        if (lane == 0) scratch[warps * 32 + warp] = squares;
        block_sync();
        if (warp > 0) return;
        float sum = 0;
        UNROLL_4 for (u32 i = 0; i < warps; i++) sum += scratch[i * 32 + lane];
        if (args.norm) {
            squares = warp_sum(lane < warps ? scratch[warps * 32 + lane] : 0.f);
            sum *= rsqrtf(squares / args.k + args.eps);
        }
        // This warp alone uses its part.
        warp_sync();
        scratch[lane] = sum;
        warp_sync();
        if (lane < TILE / 4) {
            const F4* const sums = reinterpret_cast<const F4*>(scratch) + lane;
            put(p, tiles, lane * 4, rows.output(0), sums[0], sums[TILE / 4]);
        }
    } else {
        // Rings are read no more: (warps, 2, tokens, PITCH) of sums take their place.
        constexpr u32 PITCH = 20;
        float* const all = reinterpret_cast<float*>(memory);
        copy_async_wait<0>();
        block_sync();
        UNROLL for (u32 r = 0; r < 2; r++) UNROLL for (u32 t = 0; t < NT; t++) UNROLL for (u32 i = 0; i < 4; i++) {
            const u32 token = t * 8 + c * 2 + i % 2;
            all[((warp * 2 + r) * NT * 8 + token) * PITCH + g + i / 2 * 8] = total[r][t][i];
        }
        block_sync();
        UNROLL_1 for (u32 at = threadIdx.x; at < rows.count() * (TILE / 4); at += blockDim.x) {
            const u32 quad = at % (TILE / 4), token = at / (TILE / 4);
            const F4* const sums = reinterpret_cast<const F4*>(all + token * PITCH) + quad;
            constexpr u32 TILE_SUMS = NT * 8 * PITCH / 4;
            const u32 to = rows.output(token);
            if (to == NONE) continue;
            put(p, tiles, quad * 4, to, sum_of(sums, 2 * TILE_SUMS, warps),
                sum_of(sums + TILE_SUMS, 2 * TILE_SUMS, warps));
        }
    }
}
