// Group parameters of the canonical 4-bit layout. A word holds eight codes, nibble t is input 8 * word + t; a weight
// is (q - o) * s, or q * s + o with the flag FLAG_OFFSET_IS_BIAS. Kernels use codes minus 8: (q - 8) * s + c.

// (s, c) of a group from its word: f16 s in the low half, f16 o in the high half.
fn group_scale(word: u32, flags: u32) -> vec2<f32> {
    let so = unpack2x16float(word);
    let zero = (8.0 - so.y) * so.x;
    let bias = fma(8.0, so.x, so.y);
    return vec2<f32>(so.x, select(zero, bias, (flags & FLAG_OFFSET_IS_BIAS) != 0u));
}
