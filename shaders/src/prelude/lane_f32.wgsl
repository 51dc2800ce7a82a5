// Axis kv = f32: what a lane of attention_lanes.wgsl reads of a row of the cache.

alias KvWords = vec4<u32>;
alias LaneRead = Eight;

// The place of lane `lane` of `lanes` in the rows of part `part` of the cache.
struct LanePlace {
    lane: u32,
    lanes: u32,
    part: u32,
}

fn lane_place(lane: u32, lanes: u32, rows: u32, part: u32) -> LanePlace {
    return LanePlace(lane, lanes, part);
}

fn read_key(row: u32, place: LanePlace) -> LaneRead {
    let at = 2u * (row * place.lanes + place.lane);
    return Eight(bitcast<vec4<f32>>(key_words(place.part, at)), bitcast<vec4<f32>>(key_words(place.part, at + 1u)));
}

fn read_value(row: u32, place: LanePlace) -> LaneRead {
    let at = 2u * (row * place.lanes + place.lane);
    return Eight(bitcast<vec4<f32>>(value_words(place.part, at)), bitcast<vec4<f32>>(value_words(place.part, at + 1u)));
}

// The elements that were read.
fn lane_part(read: LaneRead) -> Part {
    return read;
}
