// Eight elements of the cache, after kv_f16.wgsl or kv_f32.wgsl.

struct Eight {
    lo: vec4<f32>,
    hi: vec4<f32>,
}

// From the first and the last four words of them, here the same ones if a pair is one word.
fn eight(first: vec4<u32>, last: vec4<u32>) -> Eight {
    if (KV_PAIR_WORDS == 1u) {
        return Eight(
            vec4<f32>(unpack2x16float(first.x), unpack2x16float(first.y)),
            vec4<f32>(unpack2x16float(first.z), unpack2x16float(first.w)),
        );
    }
    return Eight(bitcast<vec4<f32>>(first), bitcast<vec4<f32>>(last));
}
