// out[t, h, :] = sum_j softmax_j(scale q[t, h] . k[j, h / group]) v[j] over the cached positions j that a token sees, for
// few tokens: splits of the positions in blocks of their own, which the last one to end combines.
//
// Mapping: a block works on a head of keys, up to 16 heads of queries that share it, a token and a split; each of its
// four warps takes 16 of every 64 positions through a ring of its own, and multiplies on the matrix units.
// Traffic: keys and values once. What earlier kernels than the previous one left in the cache is read before that one
// ends: all but the step's own tokens.
//
// In a cache of 8 bits, a lane reads four neighbours of a row at a time: products go over the elements of a head in another
// order than in half precision, and columns of results are other elements.
#include "prelude/kv.cuh"

struct AttentionArgs {
    const u16* q;      // (tokens, q_stride) half precision
    const Row* rows;   // (tokens)
    u16* out;          // inputs of the next matrix
    float* partial;    // (tokens, heads, splits, head_dim): sums of the splits
    float* weights;    // (tokens, heads, splits, 2): largest score and sum of weights
    u32* arrived;      // (tokens, blocks of heads) zeros, and zeros again afterwards
    u32 q_stride;
    u32 out_stride;    // elements in rows, chunks in tiles
    u32 out_tiled;
    u32 heads, kv_heads, layer;
    u32 window;        // positions a token sees, 0 for all
    float scale;       // times log2(e), or divided by the bound of scores
    float cap;         // bound of scores times log2(e), 0 for none
    u32 layers;        // of the cache
};

constexpr u32 ATTENTION_WARPS = 4;
constexpr u32 BLOCK_POSITIONS = 64;
constexpr u32 MANY_HEADS = 16;
// Blocks of positions of a split, if there are as many: combining takes longer than a few more of them.
constexpr u32 LEAST_BLOCKS = 2;

// Blocks of positions in a warp's ring, and bytes of the keys (or values) of one: twin of `attention_shared`.
DEVICE constexpr u32 attention_depth(u32 head_dim, bool q8) { return head_dim > 128 ? (q8 ? 3 : 2) : q8 ? 5 : 3; }
DEVICE constexpr u32 attention_pitch(u32 head_dim, bool q8) { return q8 ? head_dim + 16 : (head_dim + 8) * 2; }
DEVICE constexpr u32 attention_bytes(u32 head_dim, bool q8) {
    return 16 * (attention_pitch(head_dim, q8) + (q8 ? scale_bytes(head_dim) : 0));
}

// Adds up `n` results get(i) of a head's quad, with their largest scores and sums of weights.
template <class Get, class Weights>
DEVICE F4 add_up(Get get, Weights get_weights, u32 n, float& top, float& total) {
    F4 sum = {0, 0, 0, 0};
    top = LEAST;
    for (u32 i = 0; i < n; i++) top = fmaxf(top, get_weights(i).x);
    total = 0;
    for (u32 i = 0; i < n; i++) {
        const F2 w = get_weights(i);
        const float factor = exp2_approx(w.x - top);
        const F4 v = get(i);
        total += w.y * factor;
        sum = {sum.x + v.x * factor, sum.y + v.y * factor, sum.z + v.z * factor, sum.w + v.w * factor};
    }
    return sum;
}

template <u32 HEAD_DIM, bool Q8>
DEVICE void attention(const AttentionArgs& args) {
    constexpr u32 PITCH = attention_pitch(HEAD_DIM, Q8), BYTES = attention_bytes(HEAD_DIM, Q8);
    constexpr u32 DEPTH = attention_depth(HEAD_DIM, Q8), ROW = HEAD_DIM * (Q8 ? 1 : 2), UNITS = ROW / 16;
    // Of the scales of 16 positions, in units of 16 bytes, behind their rows.
    constexpr u32 SCALES = Q8 ? scale_bytes(HEAD_DIM) : 1, SCALES_AT = 16 * PITCH;
    const u32 lane = lane_id(), warp = warp_id(), g = lane / 4, c = lane % 4;
    const u32 group = args.heads / args.kv_heads, head_blocks = (group + MANY_HEADS - 1) / MANY_HEADS;
    const u32 kv_head = blockIdx.y / head_blocks, in_group = blockIdx.y % head_blocks * MANY_HEADS;
    const u32 first_head = kv_head * group + in_group, n_heads = min(group - in_group, MANY_HEADS);
    const u32 token = blockIdx.z, splits = gridDim.x, split = blockIdx.x;
    const Row place = args.rows[token];
    const u32 last = place.position;
    const u32 seen_from = args.window && last + 1 > args.window ? last + 1 - args.window : 0;
    // Blocks of positions, and those of this split.
    const u32 first_block = seen_from / BLOCK_POSITIONS;
    const u32 blocks = last / BLOCK_POSITIONS + 1 - first_block, each = max((blocks + splits - 1) / splits, LEAST_BLOCKS);
    const u32 used = (blocks + each - 1) / each;
    if (split >= used) {
        wait_for_previous();
        return;
    }
    const u32 from = first_block + split * each, to = min(from + each, first_block + blocks);

    const u64 of_keys = u64(args.layer) * 2 * args.kv_heads + kv_head, of_values = of_keys + args.kv_heads;
    u8* const memory = shared_memory();
    u8* const ring = memory + warp * (DEPTH * 2 * BYTES);
    // Tokens of a step have consecutive positions, or caches of their own.
    const u32 old = last - min(last, token);
    // Positions of a block that are below `end`, from `begin` on.
    auto copy_positions = [&](u32 block, u32 begin, u32 end) {
        u8* const slot = ring + (block - from) % DEPTH * 2 * BYTES;
        const u32 start = block * BLOCK_POSITIONS, first = start + warp * 16;
        // A block lies in one part of the cache.
        const Part part = part_of(place, start);
        const u8 *const keys = rows_of(part, of_keys, ROW), *const values = rows_of(part, of_values, ROW);
        UNROLL for (u32 i = 0; i < UNITS / 2; i++) {
            const u32 at = i * 32 + lane, row = at / UNITS, unit = at % UNITS, position = first + row;
            if (position < begin || position >= end) continue;
            const bool seen = position >= seen_from && position <= last;
            const u32 offset = (seen ? position : start) * ROW + unit * 16;
            copy_async16(slot + row * PITCH + unit * 16, keys + offset, seen);
            copy_async16(slot + BYTES + row * PITCH + unit * 16, values + offset, seen);
        }
        if (Q8 && lane < 2 * SCALES) {
            // A unit has several positions, the first SCALES lanes those of keys.
            constexpr u32 EACH = 16 / SCALES;
            const u32 unit = lane % SCALES, position = first + unit * EACH, end_of_unit = position + EACH - 1;
            if (end_of_unit < begin || end_of_unit >= end) return;
            const bool is_value = lane >= SCALES, seen = end_of_unit >= seen_from && position <= last;
            const u8* const scales =
                scales_of(part, args.layers, args.kv_heads, HEAD_DIM, is_value ? of_values : of_keys);
            copy_async16(slot + (is_value ? BYTES : 0) + SCALES_AT + unit * 16,
                         scales + u64(seen ? position : start) * SCALES, seen);
        }
    };
    constexpr u32 ALL = 0xffffffff;
    UNROLL for (u32 i = 0; i < DEPTH - 1; i++) {
        if (from + i < to) copy_positions(from + i, 0, old);
    }
    wait_for_previous();
    UNROLL for (u32 i = 0; i < DEPTH - 1; i++) {
        if (from + i < to) copy_positions(from + i, old, ALL);
        copy_async_commit();
    }

    // Queries as the first operand: heads g and g + 8.
    u32 q[HEAD_DIM / 16][4];
    const u16* const my_q = args.q + u64(token) * args.q_stride + first_head * HEAD_DIM + (Q8 ? 4 : 2) * c;
    UNROLL for (u32 k = 0; k < HEAD_DIM / 16; k++) UNROLL for (u32 i = 0; i < 4; i++) {
        const u32 head = g + i % 2 * 8;
        const u32* const at = reinterpret_cast<const u32*>(my_q + head * HEAD_DIM + k * 16 + i / 2 * (Q8 ? 2 : 8));
        q[k][i] = head < n_heads ? load_fresh(at) : 0;
    }

    float sums[HEAD_DIM / 8][4] = {};
    float largest[2] = {LEAST, LEAST}, weight[2] = {0, 0};
    UNROLL_1 for (u32 block = from; block < to; block++) {
        if (block + DEPTH - 1 < to) copy_positions(block + DEPTH - 1, 0, ALL);
        copy_async_commit();
        copy_async_wait<DEPTH - 1>();
        warp_sync();
        const u8* const k_rows = ring + (block - from) % DEPTH * 2 * BYTES;
        const u8* const v_rows = k_rows + BYTES;
        // The word of scales number `i` of the lane's positions: 2 c, 2 c + 1 and those 8 further on.
        auto scale_word = [&](const u8* rows, u32 i, u32 word) {
            const u32 row = 2 * c + i % 2 + i / 2 * 8;
            return *reinterpret_cast<const u32*>(rows + SCALES_AT + row * SCALES + word * 4);
        };
        // Scores of heads g and g + 8 at those positions.
        float scores[2][4] = {};
        if constexpr (Q8) {
            UNROLL for (u32 group = 0; group < HEAD_DIM / KV_GROUP; group++) {
                float part[2][4] = {};
                UNROLL for (u32 k = group * 2; k < group * 2 + 2; k++) UNROLL for (u32 t = 0; t < 2; t++) {
                    const u8* const row = k_rows + (t * 8 + g) * PITCH;
                    const U2 b = halves_of_codes(*reinterpret_cast<const u32*>(row + k * 16 + 4 * c));
                    mma(part[t], q[k], b.x, b.y);
                }
                UNROLL for (u32 i = 0; i < 4; i++) {
                    const float scale = h_to_f32(u16(scale_word(k_rows, i, group / 2) >> (group % 2 * 16)));
                    scores[i / 2][i % 2] += part[i / 2][i % 2] * scale;
                    scores[i / 2][2 + i % 2] += part[i / 2][2 + i % 2] * scale;
                }
            }
        } else {
            UNROLL for (u32 k = 0; k < HEAD_DIM / 16; k++) {
                u32 b[4];
                load_matrices(b, k_rows + (lane / 16 * 8 + lane % 8) * PITCH + k * 32 + lane / 8 % 2 * 16);
                mma(scores[0], q[k], b[0], b[1]);
                mma(scores[1], q[k], b[2], b[3]);
            }
        }
        const u32 first = block * BLOCK_POSITIONS + warp * 16;
        float top[2] = {LEAST, LEAST};
        UNROLL for (u32 t = 0; t < 2; t++) UNROLL for (u32 i = 0; i < 4; i++) {
            const u32 position = first + t * 8 + 2 * c + i % 2;
            const bool seen = position >= seen_from && position <= last;
            scores[t][i] = seen ? bounded(scores[t][i] * args.scale, args.cap) : LEAST;
            top[i / 2] = fmaxf(top[i / 2], scores[t][i]);
        }
        float fade[2];
        UNROLL for (u32 r = 0; r < 2; r++) {
            top[r] = fmaxf(top[r], shfl_xor(top[r], 1));
            top[r] = fmaxf(fmaxf(top[r], shfl_xor(top[r], 2)), largest[r]);
            fade[r] = exp2_approx(largest[r] - top[r]);
            largest[r] = top[r];
            weight[r] *= fade[r];
        }
        u32 p[4];
        UNROLL for (u32 t = 0; t < 2; t++) UNROLL for (u32 r = 0; r < 2; r++) {
            // Nothing seen yet leaves nothing: the difference would be 0.
            const float a = scores[t][r * 2] > LEAST ? exp2_approx(scores[t][r * 2] - top[r]) : 0.f;
            const float b = scores[t][r * 2 + 1] > LEAST ? exp2_approx(scores[t][r * 2 + 1] - top[r]) : 0.f;
            weight[r] += a + b;
            p[t * 2 + r] = h2_from_f32(a, b);
        }
        UNROLL for (u32 n = 0; n < HEAD_DIM / 8; n++) UNROLL for (u32 i = 0; i < 4; i++) sums[n][i] *= fade[i / 2];
        if constexpr (Q8) {
            // Column g of result n of a group is its element 4 g + n.
            U2 low = {0, 0}, high = {0, 0};
            UNROLL for (u32 group = 0; group < HEAD_DIM / KV_GROUP; group++) {
                if (group % 2 == 0) {
                    low = scale_pairs(scale_word(v_rows, 0, group / 2), scale_word(v_rows, 1, group / 2));
                    high = scale_pairs(scale_word(v_rows, 2, group / 2), scale_word(v_rows, 3, group / 2));
                }
                const u32 scale = group % 2 ? low.y : low.x, scale_8 = group % 2 ? high.y : high.x;
                const u8* const at = v_rows + 2 * c * PITCH + group * KV_GROUP + 4 * g;
                u32 codes[4];
                UNROLL for (u32 i = 0; i < 4; i++) {
                    codes[i] = *reinterpret_cast<const u32*>(at + (i % 2 + i / 2 * 8) * PITCH);
                }
                UNROLL for (u32 half = 0; half < 2; half++) {
                    // Elements of two rows beside each other.
                    const u32 pick = half ? 0x7362 : 0x5140;
                    const U2 b = halves_of_codes(byte_perm(codes[0], codes[1], pick));
                    const U2 d = halves_of_codes(byte_perm(codes[2], codes[3], pick));
                    mma(sums[group * 4 + half * 2], p, h2_mul(b.x, scale), h2_mul(d.x, scale_8));
                    mma(sums[group * 4 + half * 2 + 1], p, h2_mul(b.y, scale), h2_mul(d.y, scale_8));
                }
            }
        } else {
            UNROLL for (u32 n = 0; n < HEAD_DIM / 16; n++) {
                u32 b[4];
                load_matrices_transposed(b, v_rows + (lane / 8 % 2 * 8 + lane % 8) * PITCH + n * 32 + lane / 16 * 16);
                mma(sums[n * 2], p, b[0], b[1]);
                mma(sums[n * 2 + 1], p, b[2], b[3]);
            }
        }
        warp_sync();
    }

    // The warps' results meet: (warps, heads, HEAD_DIM), and the largest scores and sums of weights of each.
    copy_async_wait<0>();
    block_sync();
    float* const all = reinterpret_cast<float*>(memory);
    float* const all_weights = all + ATTENTION_WARPS * MANY_HEADS * HEAD_DIM;
    UNROLL for (u32 r = 0; r < 2; r++) {
        weight[r] += shfl_xor(weight[r], 1);
        weight[r] += shfl_xor(weight[r], 2);
        const u32 head = g + r * 8;
        if (head < n_heads) {
            const u32 at = warp * MANY_HEADS + head;
            if (c == 0) {
                all_weights[at * 2] = largest[r];
                all_weights[at * 2 + 1] = weight[r];
            }
            UNROLL for (u32 n = 0; n < HEAD_DIM / 8; n++) {
                const u32 i = Q8 ? n / 4 * KV_GROUP + 8 * c + n % 4 : n * 8 + 2 * c;
                all[at * HEAD_DIM + i] = sums[n][r * 2];
                all[at * HEAD_DIM + i + (Q8 ? 4 : 1)] = sums[n][r * 2 + 1];
            }
        }
    }
    block_sync();
    auto write = [&](u32 head, u32 quad, F4 sum, float total) {
        const float factor = 1.f / total;
        const F4 v = {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor};
        const u32 k = (first_head + head) * HEAD_DIM + quad * 4;
        store_inputs(args.out, args.out_tiled, args.out_stride, token, k, halves(v));
    };
    constexpr u32 QUADS = HEAD_DIM / 4;
    const u64 part = (u64(token) * args.heads + first_head) * splits;
    UNROLL_1 for (u32 i = threadIdx.x; i < n_heads * QUADS; i += blockDim.x) {
        const u32 head = i / QUADS, quad = i % QUADS;
        float top, total;
        const F4 sum = add_up(
            [&](u32 w) { return reinterpret_cast<const F4*>(all + (w * MANY_HEADS + head) * HEAD_DIM)[quad]; },
            [&](u32 w) { return reinterpret_cast<const F2*>(all_weights)[w * MANY_HEADS + head]; },
            ATTENTION_WARPS, top, total);
        if (used == 1) {
            write(head, quad, sum, total);
        } else {
            const u64 at = part + u64(head) * splits + split;
            reinterpret_cast<F4*>(args.partial)[at * QUADS + quad] = sum;
            if (quad == 0) reinterpret_cast<F2*>(args.weights)[at] = {top, total};
        }
    }
    if (used == 1) return;
    u32* const flag = reinterpret_cast<u32*>(all_weights + ATTENTION_WARPS * MANY_HEADS * 2);
    fence_device();
    block_sync();
    if (threadIdx.x == 0) {
        u32* const counter = args.arrived + token * gridDim.y + blockIdx.y;
        const u32 before = atomic_add(counter, 1);
        *flag = before + 1 == used;
        if (before + 1 == used) *counter = 0;
        fence_device();
    }
    block_sync();
    if (!*flag) return;
    UNROLL_1 for (u32 i = threadIdx.x; i < n_heads * QUADS; i += blockDim.x) {
        const u32 head = i / QUADS, quad = i % QUADS;
        const u64 at = part + u64(head) * splits;
        float top, total;
        const F4 sum = add_up(
            [&](u32 s) { return load_fresh(reinterpret_cast<const F4*>(args.partial) + (at + s) * QUADS + quad); },
            [&](u32 s) {
                const U2 w = load_fresh(reinterpret_cast<const U2*>(args.weights) + at + s);
                return F2{as_f32(w.x), as_f32(w.y)};
            },
            used, top, total);
        write(head, quad, sum, total);
    }
}

KERNEL(attention_64, AttentionArgs, 128, 2) { attention<64, false>(args); }
KERNEL(attention_96, AttentionArgs, 128, 2) { attention<96, false>(args); }
KERNEL(attention_128, AttentionArgs, 128, 2) { attention<128, false>(args); }
KERNEL(attention_256, AttentionArgs, 128, 1) { attention<256, false>(args); }
KERNEL(attention_q8_64, AttentionArgs, 128, 2) { attention<64, true>(args); }
KERNEL(attention_q8_96, AttentionArgs, 128, 2) { attention<96, true>(args); }
KERNEL(attention_q8_128, AttentionArgs, 128, 2) { attention<128, true>(args); }
KERNEL(attention_q8_256, AttentionArgs, 128, 1) { attention<256, true>(args); }

// Heads and caches that these do not know.
#include "prelude/attention_any.cuh"
