// The first four words of a Q4_K or Q5_K block: f16 d and d_min, then 6-bit scales and minima of 8 sub-blocks of 32.

// Byte `i` of the 12 bytes of scales of the block at word `block`.
fn scale_byte(block: u32, i: u32) -> u32 {
    return (codes[block + 1u + i / 4u] >> (8u * (i % 4u))) & 255u;
}

// Scale and minimum of sub-block `j`: w = scale * q - minimum.
fn scale_min(block: u32, j: u32) -> vec2<f32> {
    var bits: vec2<u32>;
    if (j < 4u) {
        bits = vec2<u32>(scale_byte(block, j), scale_byte(block, j + 4u)) & vec2<u32>(63u);
    } else {
        let low = scale_byte(block, j + 4u);
        let high = vec2<u32>(scale_byte(block, j - 4u), scale_byte(block, j)) >> vec2<u32>(6u);
        bits = vec2<u32>(low & 15u, low >> 4u) | (high << vec2<u32>(4u));
    }
    return unpack2x16float(codes[block]) * vec2<f32>(bits);
}
