// The product of a 4-bit matrix and one row of staged inputs, for the gemv_w4 kernels. The body defines LANES (32 or 64),
// `params` and the bindings x, qweight and group_params.
//
// Mapping: LANES invocations hold an output each and read chunks of 32 inputs, a vec4 of words at a time; WG / LANES
// slices share the inputs, four consecutive chunks at a time. Inputs are the same for all lanes, so they come from cache
// with one transaction; no invocation waits for another before the very end.

const SLICES: u32 = WG / LANES;

var<workgroup> partial: array<f32, WG>;
var<workgroup> squares: array<f32, 32>;

fn load_inputs8(at: u32) -> Inputs8 {
    return inputs8(x[at], x[at + STAGED_VECS - 1u]);
}

// Product of a chunk whose inputs share a group with the staged inputs at `at`.
fn chunk_product(q: vec4<u32>, params_word: u32, at: u32) -> f32 {
    let group = unpack_group(params_word, params.flags);
    let base = code_base(group.zero);
    let x0 = load_inputs8(at);
    let x1 = load_inputs8(at + STAGED_VECS);
    let x2 = load_inputs8(at + 2u * STAGED_VECS);
    let x3 = load_inputs8(at + 3u * STAGED_VECS);
    let product = (code_dot(q.x, x0, base) + code_dot(q.y, x1, base)) + (code_dot(q.z, x2, base) + code_dot(q.w, x3, base));
    if ((params.flags & FLAG_SUMS) != 0u) {
        let sum = inputs8_sum(x0) + inputs8_sum(x1) + inputs8_sum(x2) + inputs8_sum(x3);
        return fma(group.s, product, group.c * sum);
    }
    return group.s * product;
}

// Product of a chunk in which groups end.
fn split_chunk_product(q: vec4<u32>, chunk: u32, group_start: u32, at: u32) -> f32 {
    var sum = 0.0;
    for (var w = 0u; w < 4u; w++) {
        let index = min((chunk * 32u + w * 8u) / params.group_size, params.groups - 1u);
        let group = unpack_group(group_params[group_start + index * TILE_N], params.flags);
        let inputs = load_inputs8(at + w * STAGED_VECS);
        sum += fma(group.s, code_dot(q[w], inputs, code_base(group.zero)), group.c * inputs8_sum(inputs));
    }
    return sum;
}

// Product of output `n` with input row `row`, complete in the first LANES invocations of the workgroup; call in uniform
// control flow.
fn gemv(n: u32, row: u32, local_index: u32) -> f32 {
    let quads = (params.chunks + 3u) / 4u;
    let x_start = row * staged_row(quads);
    if ((params.flags & FLAG_NORM) != 0u && local_index < 32u) {
        var sum = 0.0;
        for (var quad = local_index; quad < quads; quad += 32u) {
            sum += dot(bitcast<vec4<f32>>(x[x_start + squares_at(quads, quad)]), vec4<f32>(1.0));
        }
        squares[local_index] = sum;
    }

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
        if (params.group_shift >= 7u) {
            let group = group_params[group_start + min(chunk * 32u >> params.group_shift, params.groups - 1u) * TILE_N];
            products = vec4<f32>(
                chunk_product(q0, group, x_at),
                chunk_product(q1, group, x_at + CHUNK_VECS),
                chunk_product(q2, group, x_at + 2u * CHUNK_VECS),
                chunk_product(q3, group, x_at + 3u * CHUNK_VECS),
            );
        } else if (params.group_shift >= 5u) {
            let inputs = vec4<u32>(chunk, chunk + 1u, chunk + 2u, chunk + 3u) * 32u;
            let index = min(inputs >> vec4<u32>(params.group_shift), vec4<u32>(params.groups - 1u)) * TILE_N + group_start;
            products = vec4<f32>(
                chunk_product(q0, group_params[index.x], x_at),
                chunk_product(q1, group_params[index.y], x_at + CHUNK_VECS),
                chunk_product(q2, group_params[index.z], x_at + 2u * CHUNK_VECS),
                chunk_product(q3, group_params[index.w], x_at + 3u * CHUNK_VECS),
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

    partial[local_index] = sum;
    // Orders the slices' sums, and the squares, before their reads.
    workgroupBarrier();
    if (local_index < LANES) {
        for (var i = 1u; i < SLICES; i++) {
            sum += partial[i * LANES + local_index];
        }
        if ((params.flags & FLAG_NORM) != 0u) {
            var total = 0.0;
            for (var i = 0u; i < 32u; i++) {
                total += squares[i];
            }
            sum *= inverseSqrt(total / f32(params.k) + params.eps);
        }
    }
    return sum;
}
