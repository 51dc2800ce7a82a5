// One output an invocation, see gemv_w4.wgsl.

alias Sum = f32;

// Product of output `n` with input row `row`, complete in the first LANES invocations of the workgroup; call in uniform
// control flow.
fn gemv(n: u32, row: u32, local_index: u32) -> f32 {
    let quads = (params.chunks + 3u) / 4u;
    let x_start = row * staged_row(quads);
    sum_squares(x_start, quads, local_index);
    let start = chunk_index(n, 0u, params.chunks);
    let group_start = group_index(n, 0u, params.groups);
    var sum = 0.0;
    for (var quad = local_index / LANES; quad < quads; quad += SLICES) {
        let chunk = quad * 4u;
        // Chunks beyond the last one repeat it and meet inputs of zero.
        let at = start + min(vec4<u32>(chunk, chunk + 1u, chunk + 2u, chunk + 3u), vec4<u32>(params.chunks - 1u)) * TILE_N;
        let q0 = qweight[at.x];
        let q1 = qweight[at.y];
        let q2 = qweight[at.z];
        let q3 = qweight[at.w];
        let magnitudes = bitcast<vec4<f32>>(x[x_start + magnitudes_at(quads, quad)]);
        let x_at = x_start + quad * QUAD_VECS;
        var products: vec4<f32>;
        if (GROUPS == GROUPS_QUADS) {
            let group = group_params[group_start + min(chunk * 32u >> params.group_shift, params.groups - 1u) * TILE_N];
            products = vec4<f32>(
                chunk_product(q0, group, load_chunk(x_at)),
                chunk_product(q1, group, load_chunk(x_at + CHUNK_VECS)),
                chunk_product(q2, group, load_chunk(x_at + 2u * CHUNK_VECS)),
                chunk_product(q3, group, load_chunk(x_at + 3u * CHUNK_VECS)),
            );
        } else if (GROUPS == GROUPS_CHUNKS) {
            let inputs = vec4<u32>(chunk, chunk + 1u, chunk + 2u, chunk + 3u) * 32u;
            let index = min(inputs >> vec4<u32>(params.group_shift), vec4<u32>(params.groups - 1u)) * TILE_N + group_start;
            products = vec4<f32>(
                chunk_product(q0, group_params[index.x], load_chunk(x_at)),
                chunk_product(q1, group_params[index.y], load_chunk(x_at + CHUNK_VECS)),
                chunk_product(q2, group_params[index.z], load_chunk(x_at + 2u * CHUNK_VECS)),
                chunk_product(q3, group_params[index.w], load_chunk(x_at + 3u * CHUNK_VECS)),
            );
        } else {
            products = vec4<f32>(
                split_chunk_product(q0, chunk, group_start, x_at),
                split_chunk_product(q1, chunk + 1u, group_start, x_at + CHUNK_VECS),
                split_chunk_product(q2, chunk + 2u, group_start, x_at + 2u * CHUNK_VECS),
                split_chunk_product(q3, chunk + 3u, group_start, x_at + 3u * CHUNK_VECS),
            );
        }
        sum += dot(products, magnitudes);
    }
    return sum_slices(sum, local_index);
}
