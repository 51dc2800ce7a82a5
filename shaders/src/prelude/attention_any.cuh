// Attention as in attention.cu, of any head of at most 512 elements over any cache, from f32 queries.
//
// Mapping: a warp a head and token, one position at a time; a block eight heads. Traffic: keys and values once a token and
// head of queries.
#pragma once
#include "kv.cuh"

struct AttentionAnyArgs {
    const float* qkv;  // (tokens, qkv_stride): queries first
    const Row* rows;   // (tokens)
    float* out;        // (tokens, out_stride)
    u32 qkv_stride, out_stride;
    u32 heads, kv_heads, head_dim, layer;
    u32 window;        // 0 for all
    u32 kv;            // KV_F16, ...
    float scale;       // times log2(e), or divided by the bound of scores
    float cap;         // bound of scores times log2(e), 0 for none
    u32 layers;
    u32 pad;
};

KERNEL(attention_any, AttentionAnyArgs, 256, 2) {
    wait_for_previous();
    constexpr u32 MOST = 16;
    const u32 head = blockIdx.x * (blockDim.x / 32) + warp_id(), token = blockIdx.y, lane = lane_id();
    if (head >= args.heads) return;
    const Row place = args.rows[token];
    const u32 last = place.position, dim = args.head_dim;
    const u32 first = args.window && last + 1 > args.window ? last + 1 - args.window : 0;
    const u64 of_head = u64(args.layer) * 2 * args.kv_heads + head / (args.heads / args.kv_heads);
    // Element of a key, or of a value.
    auto element = [&](const Part& part, u32 position, bool is_value, u32 i) {
        const u64 line = of_head + (is_value ? args.kv_heads : 0);
        const u64 at = (line * part.positions + (position - part.first)) * dim + i;
        if (args.kv == KV_F32) return load_fresh(reinterpret_cast<const float*>(part.cache) + at);
        if (args.kv == KV_F16) return h_to_f32(load_fresh(reinterpret_cast<const u16*>(part.cache) + at));
        const u8* const scales = scales_of(part, args.layers, args.kv_heads, dim, line) + u64(position) * scale_bytes(dim);
        const u32 word = load_fresh(reinterpret_cast<const u32*>(part.cache + at / 4 * 4));
        const float code = static_cast<signed char>(word >> (at % 4 * 8));
        return code * h_to_f32(load_fresh(reinterpret_cast<const u16*>(scales) + i / KV_GROUP));
    };
    const float* const query = args.qkv + u64(token) * args.qkv_stride + head * dim;
    float q[MOST], sum[MOST];
    UNROLL for (u32 i = 0; i < MOST; i++) {
        q[i] = i * 32 + lane < dim ? load_fresh(query + i * 32 + lane) * args.scale : 0;
        sum[i] = 0;
    }
    float top = LEAST, total = 0;
    UNROLL_1 for (u32 position = first; position <= last; position++) {
        const Part part = part_of(place, position);
        float score = 0;
        UNROLL for (u32 i = 0; i < MOST; i++) {
            if (i * 32 + lane < dim) score += q[i] * element(part, position, false, i * 32 + lane);
        }
        score = bounded(warp_sum(score), args.cap);
        const float now = fmaxf(top, score), fade = exp2_approx(top - now), weight = exp2_approx(score - now);
        top = now;
        total = total * fade + weight;
        UNROLL for (u32 i = 0; i < MOST; i++) {
            if (i * 32 + lane < dim) {
                sum[i] = sum[i] * fade + weight * element(part, position, true, i * 32 + lane);
            }
        }
    }
    float* const out = args.out + u64(token) * args.out_stride + head * dim;
    UNROLL for (u32 i = 0; i < MOST; i++) {
        if (i * 32 + lane < dim) out[i * 32 + lane] = sum[i] / total;
    }
}
