// Axis dense = f16: two half precision weights in a word, the first in the low half.

const DENSE_PER_WORD: u32 = 2u;

// Weight `index` of a row, given the word that holds it.
fn dense_element(word: u32, index: u32) -> f32 {
    return unpack2x16float(word)[index % 2u];
}

// Both weights of a word.
fn dense_pair(word: u32) -> vec2<f32> {
    return unpack2x16float(word);
}
