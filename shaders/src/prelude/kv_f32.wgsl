// Axis kv = f32: a pair of cache elements is two words.

const KV_PAIR_WORDS: u32 = 2u;

// The row of a head at a position of a part of the cache: all heads of a position lie together, so that what a session has
// not reached yet costs nothing.
fn kv_row(position: u32, head: u32, positions: u32, heads: u32) -> u32 {
    return position * heads + head;
}

// Rows from one position of a head to the next.
fn kv_step(heads: u32) -> u32 {
    return heads;
}

// Words of pair `pair` of row `row`, in rows of `pairs`: the first and the last one.
fn kv_first(row: u32, pair: u32, pairs: u32) -> u32 {
    return 2u * (row * pairs + pair);
}

fn kv_last(row: u32, pair: u32, pairs: u32, rows: u32) -> u32 {
    return 2u * (row * pairs + pair) + 1u;
}

// The pair that lies in them.
fn kv_pair(first: u32, last: u32, pair: u32, pairs: u32) -> vec2<f32> {
    return vec2<f32>(bitcast<f32>(first), bitcast<f32>(last));
}

// First and last word of a pair.
fn kv_pack(pair: vec2<f32>) -> vec2<u32> {
    return bitcast<vec2<u32>>(pair);
}
