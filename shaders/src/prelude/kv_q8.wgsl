// Axis kv = q8: a cache element is a signed byte, the code round(x / scale), and KV_GROUP of a row share a scale in half
// precision. The words of the scales follow the codes of all rows: word w of a row holds the scales of its groups w and
// w + kv_scale_words, so that a workgroup that has one pair of groups writes whole words. kv.rs is the same in Rust.

// The row of a head at a position of a part of the cache: the positions of a head lie together, so that a subgroup reads
// their scales, a few bytes each, at once.
fn kv_row(position: u32, head: u32, positions: u32, heads: u32) -> u32 {
    return head * positions + position;
}

// Rows from one position of a head to the next.
fn kv_step(heads: u32) -> u32 {
    return 1u;
}

// Words of the scales of a row.
fn kv_scale_words(head_dim: u32) -> u32 {
    return (head_dim + 2u * KV_GROUP - 1u) / (2u * KV_GROUP);
}

// Words of pair `pair` of row `row`, of `rows` with `pairs` each: of its codes, and of its scale.
fn kv_first(row: u32, pair: u32, pairs: u32) -> u32 {
    return (row * pairs + pair) / 2u;
}

fn kv_last(row: u32, pair: u32, pairs: u32, rows: u32) -> u32 {
    let words = kv_scale_words(2u * pairs);
    return rows * pairs / 2u + row * words + 2u * pair / KV_GROUP % words;
}

// The pair that lies in them.
fn kv_pair(codes: u32, scales: u32, pair: u32, pairs: u32) -> vec2<f32> {
    let four = vec4<f32>(unpack4xI8(codes));
    let is_high = 2u * pair / KV_GROUP >= kv_scale_words(2u * pairs);
    return select(four.xy, four.zw, pair % 2u == 1u) * unpack2x16float(scales)[u32(is_high)];
}

// The word of the scales of two groups whose largest magnitudes are these.
fn kv_scales(largest: vec2<f32>) -> u32 {
    return pack2x16float(min(largest / 127.0, vec2<f32>(LARGEST_SCALE)));
}

// The codes of four elements.
fn kv_codes(x: vec4<f32>, scale: f32) -> u32 {
    let inverse = select(0.0, 1.0 / scale, scale > 0.0);
    return pack4xI8(vec4<i32>(round(clamp(x * inverse, vec4<f32>(-127.0), vec4<f32>(127.0)))));
}
