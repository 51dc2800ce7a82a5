// Axis kv = f32: a pair of cache elements is two words.

const KV_PAIR_WORDS: u32 = 2u;

// The pair held by its first and its last word.
fn kv_unpack(first: u32, last: u32) -> vec2<f32> {
    return vec2<f32>(bitcast<f32>(first), bitcast<f32>(last));
}

// First and last word of a pair.
fn kv_pack(pair: vec2<f32>) -> vec2<u32> {
    return bitcast<vec2<u32>>(pair);
}
