// out[t, :] = table[token[t], :] in f32; also places the step's tokens in the cache: rows[t] is that of position + t.
//
// Mapping: a block a token, a thread every so many eights of elements. Traffic: a row of the table and of out a token.
#include "prelude/w4.cuh"

// Where a step goes, as a Row says; several sessions have one each.
struct Place {
    u64 cache;
    u64 prefix;
    u64 rope;
    u32 context;
    u32 position;  // of the first token
    u32 shared;
    u32 own;
};

struct EmbedArgs {
    const u16* table;     // (vocab, table_stride) half precision
    const u32* tokens;    // (tokens)
    const Place* places;  // (1), or (tokens) with `separate`
    Row* rows;            // (tokens)
    float* out;           // (tokens, out_stride)
    u32 width;
    u32 table_stride;     // elements, a multiple of 8
    u32 out_stride;
    u32 separate;         // each token belongs to a session of its own
    float scale;
};

KERNEL(embed, EmbedArgs, 256, 4) {
    wait_for_previous();
    const u32 token = blockIdx.x;
    if (threadIdx.x == 0) {
        const Place place = args.places[args.separate ? token : 0];
        const u32 position = place.position + (args.separate ? 0 : token);
        args.rows[token] = {place.cache, place.prefix, place.rope, place.context, position, place.shared, place.own};
    }
    const U4* const from = reinterpret_cast<const U4*>(args.table + u64(load_fresh(args.tokens + token)) * args.table_stride);
    float* const out = args.out + u64(token) * args.out_stride;
    UNROLL_1 for (u32 i = threadIdx.x; i * 8 < args.width; i += blockDim.x) {
        const U4 v = load_weights(from + i);
        const u32 pairs[4] = {v.x, v.y, v.z, v.w};
        UNROLL for (u32 j = 0; j < 4; j++) {
            const u32 at = i * 8 + j * 2;
            if (at < args.width) out[at] = h2_low(pairs[j]) * args.scale;
            if (at + 1 < args.width) out[at + 1] = h2_high(pairs[j]) * args.scale;
        }
    }
}
