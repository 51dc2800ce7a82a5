// Axis packed = w4: the tiled 4-bit layout of prelude/w4.wgsl; `row_words` is the number of chunks of a row.

// Weights of output `n` for inputs k..k+8; k is a multiple of 8.
fn weights8(n: u32, k: u32) -> Weights8 {
    let word = codes[chunk_index(n, k / 32u, params.row_words) * 4u + k / 8u % 4u];
    let group = unpack_group(group_params[group_index(n, k / params.group_size, params.groups)], params.flags);
    let even = vec4<f32>(unpack4xU8(word & 0x0f0f0f0fu)) - group.zero;
    let odd = vec4<f32>(unpack4xU8((word >> 4u) & 0x0f0f0f0fu)) - group.zero;
    let lo = vec4<f32>(even.x, odd.x, even.y, odd.y);
    let hi = vec4<f32>(even.z, odd.z, even.w, odd.w);
    return Weights8(lo * group.s + group.c, hi * group.s + group.c);
}
