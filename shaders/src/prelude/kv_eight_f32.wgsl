// Axis kv = f32: eight elements of the cache are eight words.

alias KvWords = vec4<u32>;

// Places of eight `lane` of the rows `row`, which have `lanes` such eights: of their first and their last words.
fn kv_firsts(row: vec4<u32>, lane: u32, lanes: u32) -> vec4<u32> {
    return 2u * (row * lanes + lane);
}

fn kv_lasts(row: vec4<u32>, lane: u32, lanes: u32, rows: u32) -> vec4<u32> {
    return 2u * (row * lanes + lane) + 1u;
}

// What lies there.
fn kv_eight(first: KvWords, last: KvWords, row: u32, lane: u32, lanes: u32) -> Eight {
    return Eight(bitcast<vec4<f32>>(first), bitcast<vec4<f32>>(last));
}
