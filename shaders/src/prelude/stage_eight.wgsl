// Writes eight staged inputs (prelude/stage.wgsl) to the binding `staged` of the body.

// Stages eight inputs, number `part` of the four of chunk `chunk` of row `row`, whose largest magnitude and sum of squares
// are `largest` and `squares`.
fn stage_eight(
    part: u32,
    lo: vec4<f32>,
    hi: vec4<f32>,
    largest: f32,
    squares: f32,
    chunk: u32,
    row: u32,
    quads: u32,
) {
    // At least the smallest normal number, so that the inverse is finite; zeros stay zeros.
    let magnitude = max(largest, 1.2e-38);
    let start = row * staged_row(quads);
    let words = stage8(lo / magnitude, hi / magnitude);
    let target_vec = start + chunk * CHUNK_VECS + part * STAGED_VECS;
    staged[target_vec] = words.first;
    staged[target_vec + STAGED_VECS - 1u] = select(words.first, words.last, STAGED_VECS == 2u);
    if (part == 0u) {
        staged[start + magnitudes_at(quads, chunk / 4u)][chunk % 4u] = bitcast<u32>(magnitude);
        staged[start + squares_at(quads, chunk / 4u)][chunk % 4u] = bitcast<u32>(squares);
    }
}
