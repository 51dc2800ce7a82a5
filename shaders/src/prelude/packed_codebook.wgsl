// Axis packed = codebook: codes of 4 bits, eight to a word, the code of input k at bit 4k of its row. A weight is
// table[q] * absmax; group_params holds the table of 16 f32, then an f32 absmax for each group of a row.

// Four weights from the low nibbles of the bytes of `nibbles`.
fn looked_up(nibbles: vec4<u32>, absmax: f32) -> vec4<f32> {
    let words = vec4<u32>(group_params[nibbles.x], group_params[nibbles.y], group_params[nibbles.z], group_params[nibbles.w]);
    let weights = bitcast<vec4<f32>>(words) * absmax;
    if ((params.flags & FLAG_BF16) != 0u) {
        return to_bf16(weights);
    }
    return weights;
}

// Weights of output `n` for inputs k..k+8; k is a multiple of 8.
fn weights8(n: u32, k: u32) -> Weights8 {
    let word = codes[n * params.row_words + k / 8u];
    let absmax = bitcast<f32>(group_params[16u + n * params.groups + k / params.group_size]);
    let shifts = vec4<u32>(0u, 4u, 8u, 12u);
    let lo = (vec4<u32>(word) >> shifts) & vec4<u32>(15u);
    let hi = (vec4<u32>(word >> 16u) >> shifts) & vec4<u32>(15u);
    return Weights8(looked_up(lo, absmax), looked_up(hi, absmax));
}
