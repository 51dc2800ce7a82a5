// Axis packed = q5_k: blocks of 256 inputs, 44 words: those of prelude/packed_k_scales.wgsl, 8 words whose byte l has the
// top bits of input l of the 8 sub-blocks, then 32 words of low nibbles as in q4_k.

const BLOCK_WORDS: u32 = 44u;

// Weights of output `n` for inputs k..k+8; k is a multiple of 8.
fn weights8(n: u32, k: u32) -> Weights8 {
    let block = n * params.row_words + k / 256u * BLOCK_WORDS;
    let j = k / 32u % 8u;
    let l = k % 32u / 4u;
    let at = block + 12u + j / 2u * 8u + l;
    let shift = 4u * (j % 2u);
    let top = vec2<u32>(codes[block + 4u + l], codes[block + 5u + l]) >> vec2<u32>(j);
    let low = vec2<u32>(codes[at], codes[at + 1u]) >> vec2<u32>(shift);
    let bits = (low & vec2<u32>(0x0f0f0f0fu)) | ((top & vec2<u32>(0x01010101u)) << vec2<u32>(4u));
    let scale = scale_min(block, j);
    return Weights8(
        vec4<f32>(unpack4xU8(bits.x)) * scale.x - scale.y,
        vec4<f32>(unpack4xU8(bits.y)) * scale.x - scale.y,
    );
}
