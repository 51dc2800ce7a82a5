// Axis kv = f16: a pair of cache elements is one word, eight are four.

alias KvEight = vec4<u32>;

// Places of pair `pair` of row `row`, of `rows` with `pairs` each: of its first and its last word, here the same one, and
// of nothing else.
fn kv_pair_place(row: u32, pair: u32, pairs: u32, rows: u32) -> vec4<u32> {
    let word = row * pairs + pair;
    return vec4<u32>(word, word, word, 0u);
}

// The pair that lies there.
fn kv_pair(first: u32, last: u32, scales: u32, pick: u32) -> vec2<f32> {
    return unpack2x16float(first);
}

// The same for eight elements `lane` of rows with `lanes` such eights.
fn kv_eight_place(row: u32, lane: u32, lanes: u32, rows: u32) -> vec4<u32> {
    let at = row * lanes + lane;
    return vec4<u32>(at, at, at, 0u);
}

fn kv_eight(first: KvEight, last: KvEight, scales: KvEight, pick: u32) -> Eight {
    return Eight(
        vec4<f32>(unpack2x16float(first.x), unpack2x16float(first.y)),
        vec4<f32>(unpack2x16float(first.z), unpack2x16float(first.w)),
    );
}

// Eight elements of the cache.
struct Eight {
    lo: vec4<f32>,
    hi: vec4<f32>,
}
