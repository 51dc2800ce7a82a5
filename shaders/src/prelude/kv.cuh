// The KV cache: (layers, keys then values, kv_heads, positions, head_dim) of its element type. In 8 bits an element is a
// signed byte, and KV_GROUP of them share a scale in half precision; the scales of all rows follow the codes of all rows,
// with room for whole words of them, and for a multiple of four positions. Its first positions may lie in a cache of
// their own, of the same form: see Row.
#pragma once
#include "w4.cuh"

// Element types of the cache.
constexpr u32 KV_F16 = 0, KV_F32 = 1, KV_Q8 = 2;
// Elements that share a scale.
constexpr u32 KV_GROUP = 32;
// The largest scale whose largest code, 127 of it, is a number of half precision.
constexpr float LARGEST_SCALE = 515.5f;

// Less than every score of attention.
constexpr float LEAST = -1e30f;

// Bytes of the scales of a row.
DEVICE constexpr u32 scale_bytes(u32 head_dim) { return (head_dim + 2 * KV_GROUP - 1) / (2 * KV_GROUP) * 4; }

// The part of a cache that a position lies in.
struct Part {
    u64 cache;
    u32 first, positions;
};
DEVICE Part part_of(const Row& place, u32 position) {
    if (position < place.shared) return {place.prefix, 0, place.shared};
    return {place.cache, place.shared, place.own};
}

// The rows of a line, a head of the keys or values of a layer: that of position p of the part begins p * row_bytes from
// here.
DEVICE const u8* rows_of(const Part& part, u64 line, u32 row_bytes) {
    return reinterpret_cast<const u8*>(part.cache + (line * part.positions - part.first) * row_bytes);
}

// The scales of a line in the same way, scale_bytes() a position.
DEVICE const u8* scales_of(const Part& part, u32 layers, u32 kv_heads, u32 head_dim, u64 line) {
    const u64 codes = u64(layers) * 2 * kv_heads * part.positions * head_dim;
    const u32 positions = (part.positions + 3) / 4 * 4;
    return reinterpret_cast<const u8*>(part.cache + codes + (line * positions - part.first) * scale_bytes(head_dim));
}

// Four signed bytes in half precision.
DEVICE U2 halves_of_codes(u32 codes) {
    // 1024 plus a byte without sign has that byte as its last bits.
    constexpr u32 MAGIC = 0x64646464, ZERO = 0x64806480;
    const u32 bytes = codes ^ 0x80808080;
    return {h2_sub(byte_perm(bytes, MAGIC, 0x4140), ZERO), h2_sub(byte_perm(bytes, MAGIC, 0x4342), ZERO)};
}

// Two scales in one word, as pairs for two rows: those of the first of the two groups, and of the second.
DEVICE U2 scale_pairs(u32 row, u32 next) { return {byte_perm(row, next, 0x5410), byte_perm(row, next, 0x7632)}; }
