// Packed 4-bit matrices as the matrix units read them, and what becomes of their products.
//
// Rows lie in tiles of 16, inputs in stages of 128 of two chunks of 64; what is missing is zero. Codes are (tiles, stages,
// 2 chunks, 32 lanes) units of 16 bytes: word j of lane 4 g + c holds the codes of rows g (even nibbles) and g + 8 (odd
// ones) for the inputs 32 (j / 2) + 8 c + 4 (j % 2) + {0, 1, 2, 3} of the chunk, as nibbles 0, 4, 2, 6 of a row, so that
// one mask gives a register of mma()'s first operand, and eight consecutive inputs are two registers of its second one.
// Parameters are (tiles, groups, 8, 2) words, f16 scale s low and f16 offset o high, of rows g and g + 8. A weight is
// (q - o) s, or q s + o with OFFSET_IS_BIAS. w4.rs has the same in Rust.
#pragma once
#include "activation.cuh"

// Bits of Product::flags.
constexpr u32 ADD = 1;             // to what is there instead of replacing it
constexpr u32 HAS_BIAS = 2;        // Product::bias is added
constexpr u32 OFFSET_IS_BIAS = 4;  // see above
constexpr u32 FRACTIONS = 8;       // some zero points are no integers

constexpr u32 STAGE = 128;
constexpr u32 CHUNK = 64;
constexpr u32 TILE = 16;

// Half precision inputs that come neither from a norm nor from attention can be large: they are stored divided by this.
constexpr float WIDE = 32.f;
constexpr float LARGEST_HALF = 65504.f;

// Where the products of a pair of row tiles go.
constexpr u32 TO_ROWS = 0;    // f32 rows
constexpr u32 TO_GLU = 1;     // activation(first) * second, half precision inputs of the next matrix
constexpr u32 TO_ROPE = 2;    // rotated queries, and keys and values in the cache

// A token's place in a KV cache, whose first positions may lie where several sessions read them and none writes.
struct Row {
    u64 cache;   // (layers, keys then values, kv_heads, own, head_dim): positions from `shared` on
    u64 prefix;  // (layers, keys then values, kv_heads, shared, head_dim): those in front of them
    u64 rope;    // of the session: (tables, context, rotary_dim / 2, 2) cosine, sine in f32
    u32 context;
    u32 position;
    u32 shared;  // a multiple of the positions that attention takes at once; 0 for no prefix
    u32 own;
};

// Where the token's own key or value goes: the row of the cache, for line `line` of (layers, keys then values, kv_heads).
DEVICE u64 row_of(const Row& place, u64 line) { return line * place.own + (place.position - place.shared); }

// Cosines and sines of a token's position in rotary table `table`.
DEVICE const float* rotations(const Row& row, u32 table, u32 rotary_dim) {
    return reinterpret_cast<const float*>(row.rope) + (u64(table) * row.context + row.position) * rotary_dim;
}

// A matrix and the fate of its products. Rows of work are pairs of tiles: see tiles_of().
struct Product {
    const U4* codes;
    const U2* params;
    const float* bias;    // (n) f32
    float* out;           // TO_ROWS: (tokens, out_stride)
    u16* half_out;        // TO_GLU: inputs of the next matrix; TO_ROPE: (tokens, out_stride) queries
    const Row* rows;      // (tokens)
    u32 n;                // outputs
    u32 stages;
    u32 groups;           // of a row
    u32 group_shift;      // 32 << group_shift inputs a group
    u32 flags;
    u32 target;           // TO_ROWS, ...
    u32 pairs;
    u32 out_stride;       // elements; of inputs in tiles: chunks of a row
    u32 out_offset;       // first column, elements
    u32 out_tiled;        // TO_GLU: inputs in tiles, see tile_offset()
    u32 heads, kv_heads, head_dim, rotary_dim, layer;
    u32 activation;       // TO_GLU: SILU, ...
    float scale;          // of all products: WIDE if the inputs are divided by it
    u32 table;            // TO_ROPE: rotary table
};

struct Tiles {
    u32 a, b;
};

// The two tiles of pair `pair`: neighbours; or those whose rows are combined.
DEVICE Tiles tiles_of(const Product& p, u32 pair) {
    if (p.target == TO_GLU) return {pair, pair + p.n / (2 * TILE)};
    if (p.target == TO_ROPE) {
        const u32 per_head = p.head_dim / (2 * TILE), rotated = p.rotary_dim / (2 * TILE);
        const u32 head = pair / per_head, i = pair % per_head, first = head * 2 * per_head;
        if (i < rotated) return {first + i, first + i + rotated};
        return {first + 2 * i, first + 2 * i + 1};
    }
    return {2 * pair, 2 * pair + 1};
}

// Inputs in tiles: element of token `token` and input `k` of half precision rows of `chunks` chunks. Tiles of 64 tokens
// and 64 inputs lie one behind the other, a row of 128 bytes a token; its 16-byte units are exchanged by the token
// modulo 8 and its elements are in the order in which mma() wants them: 16 of word j behind those of word j - 1.
DEVICE u32 tile_offset(u32 token, u32 k, u32 chunks) {
    const u32 i = k % 4, j = k / 32 % 2 * 2 + k / 4 % 2, c = k / 8 % 4;
    const u32 at = 16 * j + 2 * c + (i & 1) + 8 * (i >> 1);
    const u32 unit = at / 8 ^ token % 8;
    return ((token / 64 * chunks + k / CHUNK) * 64 + token % 64) * 64 + unit * 8 + at % 8;
}

// Calls f(i, x[i]) for every i below n that is this thread's, four loads at a time.
template <class F>
DEVICE void each_quad(const F4* x, u32 n, F f) {
    UNROLL_1 for (u32 first = threadIdx.x; first < n; first += 4 * blockDim.x) {
        F4 v[4];
        UNROLL for (u32 j = 0; j < 4; j++) {
            const u32 i = first + j * blockDim.x;
            v[j] = i < n ? load_fresh(x + i) : F4{0, 0, 0, 0};
        }
        UNROLL for (u32 j = 0; j < 4; j++) {
            const u32 i = first + j * blockDim.x;
            if (i < n) f(i, v[j]);
        }
    }
}

// 1 / sqrt(mean square + eps) of a row of k numbers, which is padded with zeros to quads; for the block.
DEVICE float norm_factor(const F4* x, u32 k, float eps, float* scratch) {
    float sum = 0;
    each_quad(x, (k + 3) / 4, [&](u32, F4 v) { sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; });
    return rsqrtf(block_sum(sum, scratch) / k + eps);
}

DEVICE float clamp_half(float v) { return fminf(fmaxf(v, -LARGEST_HALF), LARGEST_HALF); }
DEVICE U2 halves(F4 v) { return {h2_from_f32(v.x, v.y), h2_from_f32(v.z, v.w)}; }

// v * factor * weight in the range of half precision.
DEVICE F4 normed(F4 v, float factor, const F4* weight) {
    const F4 w = weight ? *weight : F4{1, 1, 1, 1};
    return {clamp_half(v.x * factor * w.x), clamp_half(v.y * factor * w.y), clamp_half(v.z * factor * w.z),
            clamp_half(v.w * factor * w.w)};
}

DEVICE float gated(float gate, float up, u32 activation) {
    return clamp_half(activate(gate, activation) * up * (1.f / WIDE));
}

// Where element `k`, a multiple of 4, and its three successors are of token `token`: behind each other in rows, in two
// pairs 8 elements apart in tiles.
DEVICE void store_inputs(u16* to, bool tiled, u32 stride, u32 token, u32 k, U2 v) {
    if (tiled) {
        const u32 at = tile_offset(token, k, stride), on = tile_offset(token, k + 2, stride);
        *reinterpret_cast<u32*>(to + at) = v.x;
        *reinterpret_cast<u32*>(to + on) = v.y;
    } else {
        *reinterpret_cast<U2*>(to + u64(token) * stride + k) = v;
    }
}

DEVICE void store_rows(const Product& p, u32 n, u32 token, F4 v) {
    if (n >= p.n) return;
    float* const out = p.out + u64(token) * p.out_stride + p.out_offset + n;
    if (n + 4 <= p.n && (p.out_stride | p.out_offset) % 4 == 0) {
        F4* const to = reinterpret_cast<F4*>(out);
        if (p.flags & ADD) {
            const F4 old = load_fresh(to);
            v = {old.x + v.x, old.y + v.y, old.z + v.z, old.w + v.w};
        }
        *to = v;
        return;
    }
    const float values[4] = {v.x, v.y, v.z, v.w};
    UNROLL for (u32 i = 0; i < 4; i++) {
        if (n + i < p.n) out[i] = values[i] + (p.flags & ADD ? load_fresh(out + i) : 0.f);
    }
}

// Takes the products of rows `row`.. of both tiles of a pair, four each, for token `token`; `row` is a multiple of 4.
DEVICE void put(const Product& p, Tiles tiles, u32 row, u32 token, F4 a, F4 b) {
    const u32 na = tiles.a * TILE + row, nb = tiles.b * TILE + row;
    a = {a.x * p.scale, a.y * p.scale, a.z * p.scale, a.w * p.scale};
    b = {b.x * p.scale, b.y * p.scale, b.z * p.scale, b.w * p.scale};
    if (p.flags & HAS_BIAS) {
        // Padded with zeros to whole pairs of tiles.
        const F4 x = *reinterpret_cast<const F4*>(p.bias + na), y = *reinterpret_cast<const F4*>(p.bias + nb);
        a = {a.x + x.x, a.y + x.y, a.z + x.z, a.w + x.w};
        b = {b.x + y.x, b.y + y.y, b.z + y.z, b.w + y.w};
    }
    if (p.target == TO_ROWS) {
        store_rows(p, na, token, a);
        store_rows(p, nb, token, b);
    } else if (p.target == TO_GLU) {
        const u32 f = p.activation;
        const F4 v = {gated(a.x, b.x, f), gated(a.y, b.y, f), gated(a.z, b.z, f), gated(a.w, b.w, f)};
        store_inputs(p.half_out, p.out_tiled, p.out_stride, token, na, halves(v));
    } else {
        const u32 head = na / p.head_dim, i = na % p.head_dim, j = nb % p.head_dim;
        const Row place = p.rows[token];
        if (head < p.heads + p.kv_heads && i < p.rotary_dim / 2) {
            // Pairs of cosine and sine.
            const F4* const turn = reinterpret_cast<const F4*>(rotations(place, p.table, p.rotary_dim) + 2 * i);
            const F4 t = turn[0], u = turn[1], x = a;
            a = {x.x * t.x - b.x * t.y, x.y * t.z - b.y * t.w, x.z * u.x - b.z * u.y, x.w * u.z - b.w * u.w};
            b = {b.x * t.x + x.x * t.y, b.y * t.z + x.y * t.w, b.z * u.x + x.z * u.y, b.w * u.z + x.w * u.w};
        }
        u16* to;
        if (head < p.heads) {
            to = p.half_out + u64(token) * p.out_stride + head * p.head_dim;
        } else {
            // Keys of all heads, then values of all heads.
            const u64 line = u64(p.layer) * 2 * p.kv_heads + (head - p.heads);
            to = reinterpret_cast<u16*>(place.cache) + row_of(place, line) * p.head_dim;
        }
        *reinterpret_cast<U2*>(to + i) = halves(a);
        *reinterpret_cast<U2*>(to + j) = halves(b);
    }
}

// Eight codes as a register quartet of mma()'s first operand: q - z, exactly. `low` is 1024 + z of row g and `high`
// -(64 + z) of row g + 8, both doubled.
DEVICE void unpack(u32 (&a)[4], u32 word, u32 low, u32 high) {
    constexpr u32 MAGIC = 0x64006400, SIXTEENTH = 0x2c002c00;  // 1024, 1 / 16
    const u32 top = word >> 8;
    a[0] = h2_sub(and_or<0x000f000f>(word, MAGIC), low);
    a[1] = h2_fma(and_or<0x00f000f0>(word, MAGIC), SIXTEENTH, high);
    a[2] = h2_sub(and_or<0x000f000f>(top, MAGIC), low);
    a[3] = h2_fma(and_or<0x00f000f0>(top, MAGIC), SIXTEENTH, high);
}

// A group's numbers for the two rows of a lane: a weight is (q - z) s + c with an integral z.
struct Group {
    u32 low, high;  // for unpack()
    float s0, s1;
    float c0, c1;   // where the offset is no integer
};

template <bool SUMS>
DEVICE Group group_of(U2 params, u32 flags) {
    constexpr u32 MAGIC = 0x64006400;
    constexpr u32 SIXTY_FOUR = 0x54005400;
    Group group;
    group.s0 = h2_low(params.x);
    group.s1 = h2_low(params.y);
    group.c0 = group.c1 = 0;
    u32 z0 = params.x >> 16, z1 = params.y >> 16;
    if (SUMS) {
        const float o0 = h_to_f32(u16(z0)), o1 = h_to_f32(u16(z1));
        if (flags & OFFSET_IS_BIAS) {
            z0 = z1 = 0x4800;  // 8
            group.c0 = fmaf(8.f, group.s0, o0);
            group.c1 = fmaf(8.f, group.s1, o1);
        } else {
            const float r0 = rintf(o0), r1 = rintf(o1);
            z0 = h_from_f32(r0);
            z1 = h_from_f32(r1);
            group.c0 = (r0 - o0) * group.s0;
            group.c1 = (r1 - o1) * group.s1;
        }
    }
    group.low = h2_add(h2_dup(z0), MAGIC);
    group.high = h2_sub(0x80008000u ^ h2_dup(z1), SIXTY_FOUR);
    return group;
}
