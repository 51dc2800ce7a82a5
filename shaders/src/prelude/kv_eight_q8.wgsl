// Axis kv = q8: eight elements of the cache are two words, and a scale in another, see kv_q8.wgsl.

alias KvWords = vec2<u32>;

// Places of eight `lane` of the rows `row`, of `rows` with `lanes` such eights each: of their codes, and of the two words
// one of which has their scale.
fn kv_firsts(row: vec4<u32>, lane: u32, lanes: u32) -> vec4<u32> {
    return row * lanes + lane;
}

fn kv_lasts(row: vec4<u32>, lane: u32, lanes: u32, rows: u32) -> vec4<u32> {
    return rows * lanes + kv_scale_word(row, lane, lanes) / 2u;
}

// The word of the scale, counted from the first one of all.
fn kv_scale_word(row: vec4<u32>, lane: u32, lanes: u32) -> vec4<u32> {
    let words = kv_scale_words(8u * lanes);
    return row * words + 8u * lane / KV_GROUP % words;
}

// What lies there.
fn kv_eight(codes: KvWords, scales: KvWords, row: u32, lane: u32, lanes: u32) -> Eight {
    let word = select(scales.x, scales.y, kv_scale_word(vec4<u32>(row), lane, lanes).x % 2u == 1u);
    let scale = unpack2x16float(word)[u32(8u * lane / KV_GROUP >= kv_scale_words(8u * lanes))];
    return Eight(vec4<f32>(unpack4xI8(codes.x)) * scale, vec4<f32>(unpack4xI8(codes.y)) * scale);
}
