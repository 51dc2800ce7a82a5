// Axis kv = f16: a pair of cache elements is one word.

const KV_PAIR_WORDS: u32 = 1u;

// The pair held by its first and its last word (here the same word).
fn kv_unpack(first: u32, last: u32) -> vec2<f32> {
    return unpack2x16float(first);
}

// First and last word of a pair. Saturates, because packing a number beyond the range of f16 is undefined.
fn kv_pack(pair: vec2<f32>) -> vec2<u32> {
    return vec2<u32>(pack2x16float(clamp(pair, vec2<f32>(-65504.0), vec2<f32>(65504.0))));
}
