// Rotates queries and keys of the step's tokens, after a norm of each head where there is one, and takes keys and values
// to the cache. Queries go to half precision rows, or stay where they are in f32.
//
// Mapping: a warp a head, a block eight heads of a token. A cache of 8 bits takes a head through shared memory, a group
// of elements at a time. Traffic: qkv once, twice with norms.
#include "prelude/kv.cuh"

struct RopeAppendArgs {
    float* qkv;           // (tokens, qkv_stride): heads of queries, keys, values
    u16* q;               // (tokens, q_stride) half precision; null: in place
    const float* q_norm;  // (head_dim), null for none
    const float* k_norm;
    const Row* rows;      // (tokens)
    u32 qkv_stride, q_stride;
    u32 heads, kv_heads, head_dim, rotary_dim, layer;
    u32 kv;               // KV_F16, ...
    float eps;
    u32 table;            // rotary table
    u32 layers;           // of the cache
    u32 pad;
};

KERNEL(rope_append, RopeAppendArgs, 256, 4) {
    wait_for_previous();
    const u32 head = blockIdx.x * (blockDim.x / 32) + warp_id(), token = blockIdx.y, lane = lane_id();
    if (head >= args.heads + 2 * args.kv_heads) return;
    const bool is_q = head < args.heads, is_k = !is_q && head < args.heads + args.kv_heads;
    float* const x = args.qkv + u64(token) * args.qkv_stride + head * args.head_dim;
    const float* const norm = is_q ? args.q_norm : is_k ? args.k_norm : nullptr;
    float factor = 1;
    if (norm) {
        float sum = 0;
        UNROLL_1 for (u32 i = lane; i < args.head_dim; i += 32) {
            const float v = load_fresh(x + i);
            sum += v * v;
        }
        factor = rsqrtf(warp_sum(sum) / args.head_dim + args.eps);
    }
    const Row place = args.rows[token];
    const u64 of_head = u64(args.layer) * 2 * args.kv_heads + (head - args.heads), line = row_of(place, of_head);
    auto store = [&](u32 i, float v) {
        if (is_q) {
            if (args.q) {
                args.q[u64(token) * args.q_stride + head * args.head_dim + i] = h_from_f32(v);
            } else {
                x[i] = v;
            }
        } else if (args.kv == KV_Q8) {
            reinterpret_cast<float*>(shared_memory())[warp_id() * args.head_dim + i] = v;
        } else if (args.kv == KV_F16) {
            reinterpret_cast<u16*>(place.cache)[line * args.head_dim + i] = h_from_f32(v);
        } else {
            reinterpret_cast<float*>(place.cache)[line * args.head_dim + i] = v;
        }
    };
    const F2* const turns = reinterpret_cast<const F2*>(rotations(place, args.table, args.rotary_dim));
    const u32 half = is_q || is_k ? args.rotary_dim / 2 : 0;
    auto normed = [&](u32 i) { return load_fresh(x + i) * factor * (norm ? norm[i] : 1.f); };
    UNROLL_1 for (u32 i = lane; i < half; i += 32) {
        const F2 turn = turns[i];
        const float a = normed(i), b = normed(i + half);
        store(i, a * turn.x - b * turn.y);
        store(i + half, b * turn.x + a * turn.y);
    }
    UNROLL_1 for (u32 i = 2 * half + lane; i < args.head_dim; i += 32) store(i, normed(i));
    if (is_q || args.kv != KV_Q8) return;
    warp_sync();
    const float* const row = reinterpret_cast<const float*>(shared_memory()) + warp_id() * args.head_dim;
    const Part part = part_of(place, place.position);
    const u8* const scales = scales_of(part, args.layers, args.kv_heads, args.head_dim, of_head);
    const u64 scale_at = u64(place.position) * scale_bytes(args.head_dim);
    u16* const to = reinterpret_cast<u16*>(const_cast<u8*>(scales) + scale_at);
    UNROLL_1 for (u32 group = 0; group * KV_GROUP < args.head_dim; group++) {
        const u32 i = group * KV_GROUP + lane;
        const float v = i < args.head_dim ? row[i] : 0.f;
        const u16 scale = h_from_f32(fminf(warp_max(fabsf(v)) / 127.f, LARGEST_SCALE));
        const float wide = h_to_f32(scale);
        if (lane == 0) to[group] = scale;
        if (i < args.head_dim) {
            const float code = wide > 0.f ? rintf(fminf(fmaxf(v / wide, -127.f), 127.f)) : 0.f;
            reinterpret_cast<signed char*>(place.cache)[line * args.head_dim + i] = static_cast<signed char>(code);
        }
    }
}
