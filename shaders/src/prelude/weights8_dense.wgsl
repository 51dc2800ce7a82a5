// Eight weights of a dense matrix, from the binding weight.

alias Elem = f32;

// Weights of output `n` for inputs k..k+8; what lies in the padding of a row meets zero inputs.
fn weights8(n: u32, k: u32) -> Weights8 {
    let word = k / DENSE_PER_WORD;
    let start = n * params.row_words / 4u;
    let a = weight[start + word / 4u];
    if (DENSE_PER_WORD == 2u) {
        let p0 = dense_pair(a.x);
        let p1 = dense_pair(a.y);
        let p2 = dense_pair(a.z);
        let p3 = dense_pair(a.w);
        return Weights8(vec4<f32>(p0, p1), vec4<f32>(p2, p3));
    }
    // Two vec4 of single precision words; a row of fewer than eight left over has only the first.
    var b = vec4<u32>(0u);
    if (word + 4u < params.row_words) {
        b = weight[start + word / 4u + 1u];
    }
    return Weights8(bitcast<vec4<f32>>(a), bitcast<vec4<f32>>(b));
}
