// Axis dense = bf16: two bfloat16 weights in a word, the first in the low half.

const DENSE_PER_WORD: u32 = 2u;

// Weight `index` of a row, given the word that holds it.
fn dense_element(word: u32, index: u32) -> f32 {
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, index % 2u == 1u));
}

// Both weights of a word.
fn dense_pair(word: u32) -> vec2<f32> {
    return vec2<f32>(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u));
}
