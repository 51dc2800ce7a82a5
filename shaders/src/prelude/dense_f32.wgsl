// Axis dense = f32: one weight in a word.

const DENSE_PER_WORD: u32 = 1u;

// Weight `index` of a row, given the word that holds it.
fn dense_element(word: u32, index: u32) -> f32 {
    return bitcast<f32>(word);
}

// The weight of a word; the second place is unused in this precision.
fn dense_pair(word: u32) -> vec2<f32> {
    return vec2<f32>(bitcast<f32>(word), 0.0);
}
