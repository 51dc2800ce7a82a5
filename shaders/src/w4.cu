// Packed matrices from the forms that files have to the one of prelude/w4.cuh.
//
// Mapping: a thread makes 16 bytes of codes or the parameters of two rows. Traffic: everything once.
#include "prelude/w4.cuh"

struct W4Args {
    const u32* codes;   // w4_rows: (n, k / 8); w4_awq: (k, n / 8), from the first input of first_chunk on
    const u32* params;  // w4_rows: (n, groups), f16 scale low and offset high
    const u16* scales;  // w4_awq: (groups, n), from first_group on
    const u32* zeros;   // w4_awq: (groups, n / 8), the same
    U4* out;
    U2* out_params;
    u32 n, k;
    u32 groups;
    u32 stages;
    u32 first_tile;     // of out
    u32 tiles;
    u32 first_chunk;    // w4_awq
    u32 first_group;    // w4_awq_params
};

// Four codes, 4 bits each, at the places 0, 4, 2, 6 of a word.
DEVICE u32 spread(u32 codes) {
    return (codes & 0xf) | (codes & 0xf0) << 12 | (codes & 0xf00) | (codes & 0xf000) << 12;
}

DEVICE void store_unit(const W4Args& args, u32 tile, u32 chunk, u32 lane, const u32 (&words)[4]) {
    const u64 at = (u64(args.first_tile + tile) * args.stages * 2 + chunk) * 32 + lane;
    args.out[at] = {words[0], words[1], words[2], words[3]};
}

// Grid: chunks, tiles by eights.
KERNEL(w4_rows, W4Args, 256, 4) {
    const u32 lane = lane_id(), g = lane / 4, c = lane % 4, chunk = blockIdx.x, tile = blockIdx.y * 8 + warp_id();
    if (tile >= args.tiles) return;
    u32 words[4];
    UNROLL for (u32 half = 0; half < 2; half++) {
        u32 of_rows[2];
        UNROLL for (u32 i = 0; i < 2; i++) {
            const u32 row = tile * TILE + g + i * 8, column = chunk * 8 + half * 4 + c;
            const bool there = row < args.n && column < args.k / 8;
            of_rows[i] = there ? args.codes[u64(row) * (args.k / 8) + column] : 0;
        }
        words[half * 2] = spread(of_rows[0] & 0xffff) | spread(of_rows[1] & 0xffff) << 4;
        words[half * 2 + 1] = spread(of_rows[0] >> 16) | spread(of_rows[1] >> 16) << 4;
    }
    store_unit(args, tile, chunk, lane, words);
}

// Grid: groups, tiles by 32.
KERNEL(w4_rows_params, W4Args, 256, 4) {
    const u32 group = blockIdx.x, tile = blockIdx.y * 32 + threadIdx.x / 8, g = threadIdx.x % 8;
    if (tile >= args.tiles) return;
    auto params_of = [&](u32 row) { return row < args.n ? args.params[u64(row) * args.groups + group] : 0u; };
    args.out_params[(u64(args.first_tile + tile) * args.groups + group) * 8 + g] = {
        params_of(tile * TILE + g), params_of(tile * TILE + g + 8)};
}

// Column n of a word of AutoAWQ, 0 to 7.
DEVICE u32 awq_code(u32 word, u32 n) { return word >> (n / 2 + n % 2 * 4) * 4 & 15; }

// Grid: chunks, tiles by eights.
KERNEL(w4_awq, W4Args, 256, 4) {
    const u32 lane = lane_id(), g = lane / 4, c = lane % 4, tile = blockIdx.y * 8 + warp_id();
    if (tile >= args.tiles) return;
    const u32 columns = args.n / 8, first = args.first_chunk * CHUNK;
    u32 words[4];
    UNROLL for (u32 j = 0; j < 4; j++) {
        words[j] = 0;
        UNROLL for (u32 i = 0; i < 4; i++) {
            const u32 k = blockIdx.x * CHUNK + j / 2 * 32 + c * 8 + j % 2 * 4 + i;
            // Places 0, 4, 2, 6 for the first row.
            const u32 place = (i / 2 * 2 + i % 2 * 4) * 4;
            UNROLL for (u32 r = 0; r < 2; r++) {
                const u32 column = tile * 2 + r;
                if (first + k < args.k && column < columns) {
                    words[j] |= awq_code(args.codes[u64(k) * columns + column], g) << (place + r * 4);
                }
            }
        }
    }
    store_unit(args, tile, args.first_chunk + blockIdx.x, lane, words);
}

// Grid: groups, tiles by 32.
KERNEL(w4_awq_params, W4Args, 256, 4) {
    const u32 group = blockIdx.x, tile = blockIdx.y * 32 + threadIdx.x / 8, g = threadIdx.x % 8;
    if (tile >= args.tiles) return;
    auto params_of = [&](u32 row) {
        if (row >= args.n) return 0u;
        const u32 zero = awq_code(args.zeros[u64(group) * (args.n / 8) + row / 8], row % 8);
        return u32(args.scales[u64(group) * args.n + row]) | u32(h_from_f32(float(zero))) << 16;
    };
    args.out_params[(u64(args.first_tile + tile) * args.groups + args.first_group + group) * 8 + g] = {
        params_of(tile * TILE + g), params_of(tile * TILE + g + 8)};
}

// Dense rows to half precision rows of `stride` elements.
constexpr u32 FROM_F16 = 0, FROM_BF16 = 1, FROM_F32 = 2;

struct RowsArgs {
    const u8* from;  // (rows, k) of the type
    u16* to;         // (rows, stride)
    u32 k, stride;
    u32 type;        // FROM_F16, ...
};

KERNEL(dense_rows, RowsArgs, 256, 4) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= args.stride) return;
    const u64 row = blockIdx.y + u64(blockIdx.z) * gridDim.y, from = row * args.k + i;
    u16 bits = 0;
    if (i < args.k) {
        if (args.type == FROM_F16) {
            bits = reinterpret_cast<const u16*>(args.from)[from];
        } else {
            const float v = args.type == FROM_BF16 ? as_f32(u32(reinterpret_cast<const u16*>(args.from)[from]) << 16)
                                                   : reinterpret_cast<const float*>(args.from)[from];
            bits = h_from_f32(fminf(fmaxf(v, -LARGEST_HALF), LARGEST_HALF));
        }
    }
    args.to[row * args.stride + i] = bits;
}
