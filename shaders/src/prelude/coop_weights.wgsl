// 4-bit weights in half precision, for matrix units. The body has `w_tile` in workgroup memory.

// Weights of the codes in bits 0..4 and 16..20 of `bits`: 0x6400 | bits is the half precision number 1024 + bits.
fn weights2(bits: u32, base: vec2<f16>, s: vec2<f16>, c: vec2<f16>) -> vec2<f16> {
    return fma(vec2<f16>(unpack2x16float(0x64006400u | (bits & 0x000f000fu))) - base, s, c);
}

// Writes the eight weights of a word as the pairs (i, i + 4) of its inputs.
fn write_weights(at: u32, word: u32, base: vec2<f16>, s: vec2<f16>, c: vec2<f16>) {
    w_tile[at] = vec4<f16>(weights2(word, base, s, c), weights2(word >> 4u, base, s, c));
    w_tile[at + 1u] = vec4<f16>(weights2(word >> 8u, base, s, c), weights2(word >> 12u, base, s, c));
}
