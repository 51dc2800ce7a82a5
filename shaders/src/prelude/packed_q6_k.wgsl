// Axis packed = q6_k: blocks of 256 inputs, 53 words (the 210 bytes of the format and padding): 32 words of low nibbles,
// 16 of high pairs of bits, 16 signed scales of a byte in 4 words, f16 d. A half of 128 inputs has four runs of 32: run r
// has the low (r < 2) or high nibbles of 32 bytes and bits 2r of the half's 32 bytes of pairs.

const BLOCK_WORDS: u32 = 53u;

// Weights of output `n` for inputs k..k+8; k is a multiple of 8.
fn weights8(n: u32, k: u32) -> Weights8 {
    let block = n * params.row_words + k / 256u * BLOCK_WORDS;
    let half_block = k % 256u / 128u;
    let run = k % 128u / 32u;
    let l = k % 32u / 4u;
    let low_at = block + 16u * half_block + 8u * (run % 2u) + l;
    let high_at = block + 32u + 8u * half_block + l;
    let low = vec2<u32>(codes[low_at], codes[low_at + 1u]) >> vec2<u32>(4u * (run / 2u));
    let high = vec2<u32>(codes[high_at], codes[high_at + 1u]) >> vec2<u32>(2u * run);
    let bits = (low & vec2<u32>(0x0f0f0f0fu)) | ((high & vec2<u32>(0x03030303u)) << vec2<u32>(4u));
    let index = k % 256u / 16u;
    let scale = f32(extractBits(bitcast<i32>(codes[block + 48u + index / 4u]), 8u * (index % 4u), 8u));
    let d = unpack2x16float(codes[block + 52u]).x * scale;
    return Weights8((vec4<f32>(unpack4xU8(bits.x)) - 32.0) * d, (vec4<f32>(unpack4xU8(bits.y)) - 32.0) * d);
}
