// Staged inputs: what the gemv_w4 kernels multiply with, prepared once by whoever computes the inputs instead of once a
// workgroup. A row of K inputs is padded with zeros to quads of four chunks of 32: first the inputs, STAGED_VECS vec4s
// of words for each eight, divided by the largest magnitude of their chunk; then a vec4 a quad with these magnitudes;
// then a vec4 a quad with the sums of squares of the chunks before any norm weight, for the norm of the row.

const CHUNK_VECS: u32 = 4u * STAGED_VECS;
const QUAD_VECS: u32 = 4u * CHUNK_VECS;

// vec4s of a row of `quads` quads.
fn staged_row(quads: u32) -> u32 {
    return quads * (QUAD_VECS + 2u);
}

// vec4 of the magnitudes, and of the sums of squares, of quad `quad` in a row of `quads` quads.
fn magnitudes_at(quads: u32, quad: u32) -> u32 {
    return quads * QUAD_VECS + quad;
}

fn squares_at(quads: u32, quad: u32) -> u32 {
    return quads * (QUAD_VECS + 1u) + quad;
}
