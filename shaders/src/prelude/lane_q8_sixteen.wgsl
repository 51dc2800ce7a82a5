// Axis kv = q8, lanes of sixteen elements.

alias KvWords = vec4<u32>;

// The codes that were read.
fn lane_part(codes: KvWords) -> Part {
    return Part(
        vec4<f32>(unpack4xI8(codes.x)),
        vec4<f32>(unpack4xI8(codes.y)),
        vec4<f32>(unpack4xI8(codes.z)),
        vec4<f32>(unpack4xI8(codes.w)),
    );
}

