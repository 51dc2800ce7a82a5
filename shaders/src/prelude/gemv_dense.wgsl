// Products of a dense matrix, after dense_f16.wgsl and its siblings. The body defines `params` and the binding x.

// Four inputs of vec4 column `i`; zero from K on.
fn inputs4(row_start: u32, i: u32) -> vec4<f32> {
    let columns = vec4<u32>(i * 4u, i * 4u + 1u, i * 4u + 2u, i * 4u + 3u);
    if (columns.x >= params.k) {
        return vec4<f32>(0.0);
    }
    return select(vec4<f32>(0.0), x[row_start + i], columns < vec4<u32>(params.k));
}

// Dot product of four words with their inputs, eight or (single precision weights) four.
fn words_dot(words: vec4<u32>, lo: vec4<f32>, hi: vec4<f32>) -> f32 {
    if (DENSE_PER_WORD == 2u) {
        let a = vec4<f32>(dense_pair(words.x), dense_pair(words.y));
        let b = vec4<f32>(dense_pair(words.z), dense_pair(words.w));
        return dot(a, lo) + dot(b, hi);
    }
    return dot(bitcast<vec4<f32>>(words), lo);
}
