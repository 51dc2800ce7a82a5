// Axis kv = f32: a pair of cache elements is two words.

const KV_PAIR_WORDS: u32 = 2u;

// First and last word of a pair.
fn kv_pack(pair: vec2<f32>) -> vec2<u32> {
    return bitcast<vec2<u32>>(pair);
}
