// Total order of scores, twin of `argmax::sort_key`: a larger key is a larger score, NaN has the smallest key.

// Key of negative infinity: it, NaN and empty places are never chosen.
const NEVER_KEY: u32 = 0x007fffffu;
// Id of a place that holds no candidate.
const NO_ID: u32 = 0xffffffffu;

fn sort_key(bits: u32) -> u32 {
    let magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return 0u;
    }
    if (magnitude == 0u) {
        return 0x80000000u;
    }
    return select(bits | 0x80000000u, ~bits, (bits & 0x80000000u) != 0u);
}

// Bits of the score of a key; keys of NaN have none.
fn key_bits(key: u32) -> u32 {
    return select(~key, key & 0x7fffffffu, (key & 0x80000000u) != 0u);
}

// Whether candidate a = (key, id) comes before b: larger key first, then smaller id.
fn comes_before(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.x > b.x || (a.x == b.x && a.y < b.y);
}
