// Axis packed = q4_k: blocks of 256 inputs, 36 words: those of prelude/packed_k_scales.wgsl, then 32 words of codes. Eight
// words hold two sub-blocks, one in the low and one in the high nibbles.

const BLOCK_WORDS: u32 = 36u;

// Weights of output `n` for inputs k..k+8; k is a multiple of 8.
fn weights8(n: u32, k: u32) -> Weights8 {
    let block = n * params.row_words + k / 256u * BLOCK_WORDS;
    let j = k / 32u % 8u;
    let at = block + 4u + j / 2u * 8u + k % 32u / 4u;
    let shift = 4u * (j % 2u);
    let lo = unpack4xU8((codes[at] >> shift) & 0x0f0f0f0fu);
    let hi = unpack4xU8((codes[at + 1u] >> shift) & 0x0f0f0f0fu);
    let scale = scale_min(block, j);
    return Weights8(vec4<f32>(lo) * scale.x - scale.y, vec4<f32>(hi) * scale.x - scale.y);
}
