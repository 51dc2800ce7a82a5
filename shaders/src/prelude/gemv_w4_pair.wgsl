// Two outputs an invocation, see gemv_w4.wgsl.

alias Sum = vec2<f32>;

// Products of outputs `n.x` and `n.y` with input row `row`, complete in the first LANES invocations of the workgroup; call
// in uniform control flow.
fn gemv_pair(n: vec2<u32>, row: u32, local_index: u32) -> vec2<f32> {
    let quads = (params.chunks + 3u) / 4u;
    let x_start = row * staged_row(quads);
    sum_squares(x_start, quads, local_index);
    let start = vec2<u32>(chunk_index(n.x, 0u, params.chunks), chunk_index(n.y, 0u, params.chunks));
    let group_start = vec2<u32>(group_index(n.x, 0u, params.groups), group_index(n.y, 0u, params.groups));
    var sum = vec2<f32>(0.0);
    for (var quad = local_index / LANES; quad < quads; quad += SLICES) {
        let chunk = quad * 4u;
        // Chunks beyond the last one repeat it and meet inputs of zero.
        let offsets = min(vec4<u32>(chunk, chunk + 1u, chunk + 2u, chunk + 3u), vec4<u32>(params.chunks - 1u)) * TILE_N;
        let a0 = qweight[start.x + offsets.x];
        let a1 = qweight[start.x + offsets.y];
        let a2 = qweight[start.x + offsets.z];
        let a3 = qweight[start.x + offsets.w];
        let b0 = qweight[start.y + offsets.x];
        let b1 = qweight[start.y + offsets.y];
        let b2 = qweight[start.y + offsets.z];
        let b3 = qweight[start.y + offsets.w];
        let magnitudes = bitcast<vec4<f32>>(x[x_start + magnitudes_at(quads, quad)]);
        let x_at = x_start + quad * QUAD_VECS;
        var a: vec4<f32>;
        var b: vec4<f32>;
        if (GROUPS == GROUPS_ANY) {
            a = vec4<f32>(
                split_chunk_product(a0, chunk, group_start.x, x_at),
                split_chunk_product(a1, chunk + 1u, group_start.x, x_at + CHUNK_VECS),
                split_chunk_product(a2, chunk + 2u, group_start.x, x_at + 2u * CHUNK_VECS),
                split_chunk_product(a3, chunk + 3u, group_start.x, x_at + 3u * CHUNK_VECS),
            );
            b = vec4<f32>(
                split_chunk_product(b0, chunk, group_start.y, x_at),
                split_chunk_product(b1, chunk + 1u, group_start.y, x_at + CHUNK_VECS),
                split_chunk_product(b2, chunk + 2u, group_start.y, x_at + 2u * CHUNK_VECS),
                split_chunk_product(b3, chunk + 3u, group_start.y, x_at + 3u * CHUNK_VECS),
            );
        } else {
            // One group for the whole quad, or one for each of its chunks.
            let inputs = vec4<u32>(chunk, chunk + 1u, chunk + 2u, chunk + 3u) * 32u;
            var index = min(inputs >> vec4<u32>(params.group_shift), vec4<u32>(params.groups - 1u)) * TILE_N;
            if (GROUPS == GROUPS_QUADS) {
                index = vec4<u32>(index.x);
            }
            let x0 = load_chunk(x_at);
            a.x = chunk_product(a0, group_params[group_start.x + index.x], x0);
            b.x = chunk_product(b0, group_params[group_start.y + index.x], x0);
            let x1 = load_chunk(x_at + CHUNK_VECS);
            a.y = chunk_product(a1, group_params[group_start.x + index.y], x1);
            b.y = chunk_product(b1, group_params[group_start.y + index.y], x1);
            let x2 = load_chunk(x_at + 2u * CHUNK_VECS);
            a.z = chunk_product(a2, group_params[group_start.x + index.z], x2);
            b.z = chunk_product(b2, group_params[group_start.y + index.z], x2);
            let x3 = load_chunk(x_at + 3u * CHUNK_VECS);
            a.w = chunk_product(a3, group_params[group_start.x + index.w], x3);
            b.w = chunk_product(b3, group_params[group_start.y + index.w], x3);
        }
        sum += vec2<f32>(dot(a, magnitudes), dot(b, magnitudes));
    }
    return sum_slices(sum, local_index);
}
