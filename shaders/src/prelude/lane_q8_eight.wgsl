// Axis kv = q8, lanes of eight elements.

alias KvWords = vec2<u32>;

// The codes that were read.
fn lane_part(codes: KvWords) -> Part {
    return Eight(vec4<f32>(unpack4xI8(codes.x)), vec4<f32>(unpack4xI8(codes.y)));
}

