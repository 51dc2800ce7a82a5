// Axis kv = f16: a pair of cache elements is one word.

const KV_PAIR_WORDS: u32 = 1u;

// First and last word of a pair. Saturates, because packing a number beyond the range of f16 is undefined.
fn kv_pack(pair: vec2<f32>) -> vec2<u32> {
    return vec2<u32>(pack2x16float(clamp(pair, vec2<f32>(-65504.0), vec2<f32>(65504.0))));
}
