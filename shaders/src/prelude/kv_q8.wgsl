// Axis kv = q8: a cache element is a signed byte, and 32 of a row share a scale in half precision. The words of the
// scales, two scales each, follow the codes of all rows: (rows, ceil(head_dim / 64)).

alias KvEight = vec2<u32>;

// Places of pair `pair` of row `row`, of `rows` with `pairs` each: of its word, of the same one, of the word of its scale,
// and which pair and which scale it is in those.
fn kv_pair_place(row: u32, pair: u32, pairs: u32, rows: u32) -> vec4<u32> {
    let word = (row * pairs + pair) / 2u;
    let scales = rows * pairs / 2u + row * ((pairs + 31u) / 32u) + pair / 32u;
    return vec4<u32>(word, word, scales, pair % 2u + 2u * (pair / 16u % 2u));
}

// The pair that lies there.
fn kv_pair(first: u32, last: u32, scales: u32, pick: u32) -> vec2<f32> {
    let codes = vec4<f32>(unpack4xI8(first));
    return select(codes.xy, codes.zw, (pick & 1u) != 0u) * unpack2x16float(scales)[pick >> 1u];
}

// The same for eight elements `lane` of rows with `lanes` such eights.
fn kv_eight_place(row: u32, lane: u32, lanes: u32, rows: u32) -> vec4<u32> {
    let at = row * lanes + lane;
    let scales = 2u * rows * lanes + row * ((lanes + 7u) / 8u) + lane / 8u;
    return vec4<u32>(at, at, scales / 2u, scales % 2u + 2u * (lane / 4u % 2u));
}

fn kv_eight(first: KvEight, last: KvEight, scales: KvEight, pick: u32) -> Eight {
    let scale = unpack2x16float(scales[pick & 1u])[pick >> 1u];
    return Eight(vec4<f32>(unpack4xI8(first.x)) * scale, vec4<f32>(unpack4xI8(first.y)) * scale);
}

// Eight elements of the cache.
struct Eight {
    lo: vec4<f32>,
    hi: vec4<f32>,
}
