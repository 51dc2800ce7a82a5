// Axis kv = f16: eight elements of the cache are four words.

alias KvWords = vec4<u32>;

// Places of eight `lane` of the rows `row`, which have `lanes` such eights: of their first and their last words, here the
// same.
fn kv_firsts(row: vec4<u32>, lane: u32, lanes: u32) -> vec4<u32> {
    return row * lanes + lane;
}

fn kv_lasts(row: vec4<u32>, lane: u32, lanes: u32, rows: u32) -> vec4<u32> {
    return row * lanes + lane;
}

// What lies there.
fn kv_eight(first: KvWords, last: KvWords, row: u32, lane: u32, lanes: u32) -> Eight {
    return Eight(
        vec4<f32>(unpack2x16float(first.x), unpack2x16float(first.y)),
        vec4<f32>(unpack2x16float(first.z), unpack2x16float(first.w)),
    );
}
