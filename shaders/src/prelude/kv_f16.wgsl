// Axis kv = f16: a pair of cache elements is one word.

const KV_PAIR_WORDS: u32 = 1u;

// The row of a head at a position of a part of the cache: all heads of a position lie together, so that what a session has
// not reached yet costs nothing.
fn kv_row(position: u32, head: u32, positions: u32, heads: u32) -> u32 {
    return position * heads + head;
}

// Rows from one position of a head to the next.
fn kv_step(heads: u32) -> u32 {
    return heads;
}

// Words of pair `pair` of row `row`, in rows of `pairs`: the first and the last one, here the same.
fn kv_first(row: u32, pair: u32, pairs: u32) -> u32 {
    return row * pairs + pair;
}

fn kv_last(row: u32, pair: u32, pairs: u32, rows: u32) -> u32 {
    return row * pairs + pair;
}

// The pair that lies in them.
fn kv_pair(first: u32, last: u32, pair: u32, pairs: u32) -> vec2<f32> {
    return unpack2x16float(first);
}

// First and last word of a pair. Saturates, because packing a number beyond the range of f16 is undefined.
fn kv_pack(pair: vec2<f32>) -> vec2<u32> {
    return vec2<u32>(pack2x16float(clamp(pair, vec2<f32>(-65504.0), vec2<f32>(65504.0))));
}
