// Attention as in attention.cu for many tokens of one session at consecutive positions.
//
// Mapping: a block takes 128 tokens and a head, a warp 16 of the tokens; keys and values pass through shared memory in
// tiles of 64 positions, a tile ahead; scores never leave the registers.
// Traffic: keys and values once for 128 tokens of a head.
#include "prelude/kv.cuh"

struct AttentionCoopArgs {
    const u16* q;     // (tokens, q_stride) half precision
    const Row* rows;  // (tokens), consecutive
    u16* out;         // inputs of the next matrix, in tiles
    u32 tokens;
    u32 q_stride;
    u32 out_stride;   // elements in rows, chunks in tiles
    u32 out_tiled;
    u32 heads, kv_heads, layer;
    u32 window;       // positions a token sees, 0 for all
    float scale;      // times log2(e), or divided by the bound of scores
    float cap;        // bound of scores times log2(e), 0 for none
    u32 layers;       // of the cache
    u32 pad;
};

constexpr u32 COOP_TOKENS = 128;
constexpr u32 SPAN = 64;
constexpr float NOTHING = -1e30f;

// Sixteen codes of a row with one scale.
struct Codes {
    U4 codes;
    u16 scale;
};

// Those of keys or values in half precision, to shared memory.
DEVICE void widen(u16* to, const Codes& from) {
    const u32 scale = h2_dup(from.scale);
    const u32 words[4] = {from.codes.x, from.codes.y, from.codes.z, from.codes.w};
    u32 halves[8];
    UNROLL for (u32 i = 0; i < 4; i++) {
        const U2 pairs = halves_of_codes(words[i]);
        halves[2 * i] = h2_mul(pairs.x, scale);
        halves[2 * i + 1] = h2_mul(pairs.y, scale);
    }
    reinterpret_cast<U4*>(to)[0] = {halves[0], halves[1], halves[2], halves[3]};
    reinterpret_cast<U4*>(to)[1] = {halves[4], halves[5], halves[6], halves[7]};
}

// In 8 bits, the next tile waits in registers while one is computed with, and is widened on its way to shared memory.
template <u32 HEAD_DIM, bool Q8>
DEVICE void attention_coop(const AttentionCoopArgs& args) {
    constexpr u32 PITCH = HEAD_DIM + 8, UNITS = HEAD_DIM / 8, SIZE = SPAN * PITCH;
    // Sixteens of a row, and those of a tile that a thread brings.
    constexpr u32 SIXTEENS = HEAD_DIM / 16, EACH = (SPAN * SIXTEENS + 255) / 256;
    wait_for_previous();
    const u32 lane = lane_id(), g = lane / 4, c = lane % 4, head = blockIdx.y;
    // The tokens that see most come first.
    const u32 first_token = (gridDim.x - 1 - blockIdx.x) * COOP_TOKENS;
    const u32 mine = first_token + warp_id() * 16;
    const Row place = args.rows[0];
    const u32 kv_head = head / (args.heads / args.kv_heads);
    const u64 of_keys = u64(args.layer) * 2 * args.kv_heads + kv_head;
    const u32 last = place.position + min(first_token + COOP_TOKENS, args.tokens) - 1;
    // What a token at a position sees begins here.
    auto begin = [&](u32 position) { return args.window && position + 1 > args.window ? position + 1 - args.window : 0; };
    const u32 first_tile = begin(place.position + first_token) / SPAN, last_tile = last / SPAN;
    u16* const memory = reinterpret_cast<u16*>(shared_memory());

    Codes codes[2][Q8 ? EACH : 1];
    // Takes a tile to registers, and from there to shared memory.
    auto fetch = [&](u32 tile) {
        // A tile lies in one part of the cache.
        const Part of_tile = part_of(place, tile * SPAN);
        UNROLL for (u32 part = 0; part < 2; part++) {
            const u64 line = of_keys + part * args.kv_heads;
            const u8* const rows = rows_of(of_tile, line, HEAD_DIM);
            const u8* const scales = scales_of(of_tile, args.layers, args.kv_heads, HEAD_DIM, line);
            UNROLL for (u32 i = 0; i < EACH; i++) {
                const u32 at = i * 256 + threadIdx.x, row = at / SIXTEENS, unit = at % SIXTEENS;
                const u32 position = tile * SPAN + row;
                codes[part][i] = {{0, 0, 0, 0}, 0};
                if (row >= SPAN || position > last) continue;
                const u8* const scale = scales + u64(position) * scale_bytes(HEAD_DIM) + unit / 2 * 2;
                codes[part][i].codes = load_fresh(reinterpret_cast<const U4*>(rows + u64(position) * HEAD_DIM) + unit);
                codes[part][i].scale = load_fresh(reinterpret_cast<const u16*>(scale));
            }
        }
    };
    auto place_tile = [&](u32 tile) {
        u16* const to = memory + (tile - first_tile) % 2 * 2 * SIZE;
        UNROLL for (u32 part = 0; part < 2; part++) UNROLL for (u32 i = 0; i < EACH; i++) {
            const u32 at = i * 256 + threadIdx.x, row = at / SIXTEENS, unit = at % SIXTEENS;
            if (row < SPAN) widen(to + part * SIZE + row * PITCH + unit * 16, codes[part][i]);
        }
    };
    auto copy_tile = [&](u32 tile) {
        u16* const to = memory + (tile - first_tile) % 2 * 2 * SIZE;
        const Part part = part_of(place, tile * SPAN);
        const u16* const keys = reinterpret_cast<const u16*>(rows_of(part, of_keys, HEAD_DIM * 2));
        const u16* const values = reinterpret_cast<const u16*>(rows_of(part, of_keys + args.kv_heads, HEAD_DIM * 2));
        UNROLL for (u32 i = 0; i < SPAN * UNITS / 256; i++) {
            const u32 at = i * 256 + threadIdx.x, row = at / UNITS, unit = at % UNITS, position = tile * SPAN + row;
            const bool there = position <= last;
            const u32 from = (there ? position : tile * SPAN) * HEAD_DIM + unit * 8;
            copy_async16(to + row * PITCH + unit * 8, keys + from, there);
            copy_async16(to + SIZE + row * PITCH + unit * 8, values + from, there);
        }
        copy_async_commit();
    };
    if constexpr (Q8) {
        fetch(first_tile);
        place_tile(first_tile);
    } else {
        copy_tile(first_tile);
    }

    u32 q[HEAD_DIM / 16][4];
    UNROLL for (u32 k = 0; k < HEAD_DIM / 16; k++) UNROLL for (u32 i = 0; i < 4; i++) {
        const u32 token = mine + g + i % 2 * 8;
        const u16* const at = args.q + u64(token) * args.q_stride + head * HEAD_DIM + k * 16 + 2 * c + i / 2 * 8;
        q[k][i] = token < args.tokens ? load_fresh(reinterpret_cast<const u32*>(at)) : 0;
    }
    // Positions of the warp's tokens.
    const u32 low = place.position + mine, high = low + 15;
    const bool works = mine < args.tokens;

    float sums[HEAD_DIM / 8][4] = {};
    float largest[2] = {NOTHING, NOTHING}, weight[2] = {0, 0};
    UNROLL_1 for (u32 tile = first_tile; tile <= last_tile; tile++) {
        if constexpr (Q8) {
            if (tile < last_tile) fetch(tile + 1);
        } else if (tile < last_tile) {
            copy_tile(tile + 1);
            copy_async_wait<1>();
        } else {
            copy_async_wait<0>();
        }
        block_sync();
        const u32 start = tile * SPAN;
        // Tiles that none of the warp's tokens sees change nothing.
        if (works && start <= high && start + SPAN > begin(low)) {
            const u16* const k_rows = memory + (tile - first_tile) % 2 * 2 * SIZE;
            const u16* const v_rows = k_rows + SIZE;
            float scores[SPAN / 8][4] = {};
            UNROLL for (u32 k = 0; k < HEAD_DIM / 16; k++) UNROLL for (u32 n = 0; n < SPAN / 16; n++) {
                u32 b[4];
                const u32 row = n * 16 + lane / 16 * 8 + lane % 8;
                load_matrices(b, k_rows + row * PITCH + k * 16 + lane / 8 % 2 * 8);
                mma(scores[n * 2], q[k], b[0], b[1]);
                mma(scores[n * 2 + 1], q[k], b[2], b[3]);
            }
            float top[2] = {NOTHING, NOTHING}, fade[2];
            const bool all_see = start + SPAN - 1 <= low && start >= begin(high);
            UNROLL for (u32 n = 0; n < SPAN / 8; n++) UNROLL for (u32 i = 0; i < 4; i++) {
                scores[n][i] = bounded(scores[n][i] * args.scale, args.cap);
                if (!all_see) {
                    const u32 position = start + n * 8 + 2 * c + i % 2, token = low + g + i / 2 * 8;
                    if (position > token || position < begin(token)) scores[n][i] = NOTHING;
                }
                top[i / 2] = fmaxf(top[i / 2], scores[n][i]);
            }
            UNROLL for (u32 r = 0; r < 2; r++) {
                top[r] = fmaxf(top[r], shfl_xor(top[r], 1));
                top[r] = fmaxf(fmaxf(top[r], shfl_xor(top[r], 2)), largest[r]);
                fade[r] = exp2_approx(largest[r] - top[r]);
                largest[r] = top[r];
                weight[r] *= fade[r];
            }
            UNROLL for (u32 n = 0; n < HEAD_DIM / 8; n++) UNROLL for (u32 i = 0; i < 4; i++) sums[n][i] *= fade[i / 2];
            UNROLL for (u32 j = 0; j < SPAN / 16; j++) {
                u32 p[4];
                UNROLL for (u32 t = 0; t < 2; t++) UNROLL for (u32 r = 0; r < 2; r++) {
                    const float s0 = scores[j * 2 + t][r * 2], s1 = scores[j * 2 + t][r * 2 + 1];
                    const float a = s0 > NOTHING ? exp2_approx(s0 - top[r]) : 0.f;
                    const float b = s1 > NOTHING ? exp2_approx(s1 - top[r]) : 0.f;
                    weight[r] += a + b;
                    p[t * 2 + r] = h2_from_f32(a, b);
                }
                UNROLL for (u32 n = 0; n < HEAD_DIM / 16; n++) {
                    u32 b[4];
                    const u32 row = j * 16 + lane / 8 % 2 * 8 + lane % 8;
                    load_matrices_transposed(b, v_rows + row * PITCH + n * 16 + lane / 16 * 8);
                    mma(sums[n * 2], p, b[0], b[1]);
                    mma(sums[n * 2 + 1], p, b[2], b[3]);
                }
            }
        }
        if constexpr (Q8) {
            // To the other half, which nobody reads since the barrier above.
            if (tile < last_tile) place_tile(tile + 1);
        } else {
            // The next copies overwrite what was read here.
            block_sync();
        }
    }
    UNROLL for (u32 r = 0; r < 2; r++) {
        weight[r] += shfl_xor(weight[r], 1);
        weight[r] += shfl_xor(weight[r], 2);
        const u32 token = mine + g + r * 8;
        if (token >= args.tokens) continue;
        const float factor = 1.f / weight[r];
        UNROLL for (u32 n = 0; n < HEAD_DIM / 8; n++) {
            const u32 k = head * HEAD_DIM + n * 8 + 2 * c;
            const u64 at = args.out_tiled ? tile_offset(token, k, args.out_stride) : u64(token) * args.out_stride + k;
            *reinterpret_cast<u32*>(args.out + at) = h2_from_f32(sums[n][r * 2] * factor, sums[n][r * 2 + 1] * factor);
        }
    }
}

KERNEL(attention_coop_64, AttentionCoopArgs, 256, 1) { attention_coop<64, false>(args); }
KERNEL(attention_coop_96, AttentionCoopArgs, 256, 1) { attention_coop<96, false>(args); }
KERNEL(attention_coop_128, AttentionCoopArgs, 256, 1) { attention_coop<128, false>(args); }
KERNEL(attention_coop_256, AttentionCoopArgs, 256, 1) { attention_coop<256, false>(args); }
KERNEL(attention_coop_q8_64, AttentionCoopArgs, 256, 1) { attention_coop<64, true>(args); }
KERNEL(attention_coop_q8_96, AttentionCoopArgs, 256, 1) { attention_coop<96, true>(args); }
KERNEL(attention_coop_q8_128, AttentionCoopArgs, 256, 1) { attention_coop<128, true>(args); }
KERNEL(attention_coop_q8_256, AttentionCoopArgs, 256, 1) { attention_coop<256, true>(args); }
