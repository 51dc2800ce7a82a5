// Axis kv = f16: what a lane of attention_lanes.wgsl reads of a row of the cache.

alias KvWords = vec4<u32>;
alias LaneRead = vec4<u32>;

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
    return key_words(place.part, row * place.lanes + place.lane);
}

fn read_value(row: u32, place: LanePlace) -> LaneRead {
    return value_words(place.part, row * place.lanes + place.lane);
}

// The elements that were read.
fn lane_part(read: LaneRead) -> Part {
    return Eight(
        vec4<f32>(unpack2x16float(read.x), unpack2x16float(read.y)),
        vec4<f32>(unpack2x16float(read.z), unpack2x16float(read.w)),
    );
}
