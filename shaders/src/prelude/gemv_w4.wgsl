// The product of a 4-bit matrix and one row of staged inputs, for the gemv_w4 kernels. The body defines LANES (32 or 64),
// `params` and the bindings x, qweight and group_params.
//
// Mapping: LANES invocations hold an output each, or two with gemv_pair, which then share the loads of inputs, and read chunks of 32 inputs, a vec4 of words at a time; WG / LANES
// slices share the inputs, four consecutive chunks at a time. Inputs are the same for all lanes, so they come from cache
// with one transaction; no invocation waits for another before the very end.

const SLICES: u32 = WG / LANES;

// Axis groups.
const GROUPS_QUADS: u32 = 0u;
const GROUPS_CHUNKS: u32 = 1u;
const GROUPS_ANY: u32 = 2u;

// Sums are taken four at a time, so that nobody adds up many one by one.
const FOURS: u32 = (SLICES + 3u) / 4u;

var<workgroup> partial: array<f32, WG>;
var<workgroup> partial_fours: array<f32, FOURS * LANES>;
var<workgroup> squares: array<f32, 32>;
var<workgroup> squares_fours: array<f32, 8>;

fn load_inputs8(at: u32) -> Inputs8 {
    return inputs8(x[at], x[at + STAGED_VECS - 1u]);
}

// 32 staged inputs.
struct Chunk {
    x0: Inputs8,
    x1: Inputs8,
    x2: Inputs8,
    x3: Inputs8,
}

fn load_chunk(at: u32) -> Chunk {
    return Chunk(
        load_inputs8(at),
        load_inputs8(at + STAGED_VECS),
        load_inputs8(at + 2u * STAGED_VECS),
        load_inputs8(at + 3u * STAGED_VECS),
    );
}

// Product of a chunk whose inputs share a group with staged inputs.
fn chunk_product(q: vec4<u32>, params_word: u32, x: Chunk) -> f32 {
    let group = unpack_group(params_word, params.flags);
    let base = code_base(group.zero);
    let product =
        (code_dot(q.x, x.x0, base) + code_dot(q.y, x.x1, base)) + (code_dot(q.z, x.x2, base) + code_dot(q.w, x.x3, base));
    if ((params.flags & FLAG_SUMS) != 0u) {
        let sum = inputs8_sum(x.x0) + inputs8_sum(x.x1) + inputs8_sum(x.x2) + inputs8_sum(x.x3);
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

// Sums of the squares of a row of staged inputs, for the norm, in the first 32 invocations.
fn sum_squares(x_start: u32, quads: u32, local_index: u32) {
    if ((params.flags & FLAG_NORM) != 0u && local_index < 32u) {
        var sum = 0.0;
        for (var quad = local_index; quad < quads; quad += 32u) {
            sum += dot(bitcast<vec4<f32>>(x[x_start + squares_at(quads, quad)]), vec4<f32>(1.0));
        }
        squares[local_index] = sum;
    }
}

// Sums of four of the `squares`, in the last eight invocations.
fn sum_fours_of_squares(local_index: u32) {
    if ((params.flags & FLAG_NORM) != 0u && local_index >= WG - 8u) {
        let first = (local_index - (WG - 8u)) * 4u;
        squares_fours[first / 4u] = (squares[first] + squares[first + 1u]) + (squares[first + 2u] + squares[first + 3u]);
    }
}

// What the norm divides by, from `squares_fours`, or 1.
fn norm_factor() -> f32 {
    if ((params.flags & FLAG_NORM) == 0u) {
        return 1.0;
    }
    var total = 0.0;
    for (var i = 0u; i < 8u; i++) {
        total += squares_fours[i];
    }
    return inverseSqrt(total / f32(params.k) + params.eps);
}

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

    partial[local_index] = sum;
    // Orders the slices' sums, and the squares, before their reads.
    workgroupBarrier();
    if (local_index < FOURS * LANES) {
        let first = local_index / LANES * 4u;
        sum = partial[first * LANES + local_index % LANES];
        for (var i = first + 1u; i < min(first + 4u, SLICES); i++) {
            sum += partial[i * LANES + local_index % LANES];
        }
        partial_fours[local_index] = sum;
    }
    sum_fours_of_squares(local_index);
    // Orders the sums of four before their reads.
    workgroupBarrier();
    if (local_index < LANES) {
        for (var i = 1u; i < FOURS; i++) {
            sum += partial_fours[i * LANES + local_index];
        }
        sum *= norm_factor();
    }
    return sum;
}

var<workgroup> pairs: array<vec2<f32>, WG>;
var<workgroup> pairs_fours: array<vec2<f32>, FOURS * LANES>;

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

    pairs[local_index] = sum;
    // Orders the slices' sums, and the squares, before their reads.
    workgroupBarrier();
    if (local_index < FOURS * LANES) {
        let first = local_index / LANES * 4u;
        sum = pairs[first * LANES + local_index % LANES];
        for (var i = first + 1u; i < min(first + 4u, SLICES); i++) {
            sum += pairs[i * LANES + local_index % LANES];
        }
        pairs_fours[local_index] = sum;
    }
    sum_fours_of_squares(local_index);
    // Orders the sums of four before their reads.
    workgroupBarrier();
    if (local_index < LANES) {
        for (var i = 1u; i < FOURS; i++) {
            sum += pairs_fours[i * LANES + local_index];
        }
        sum *= norm_factor();
    }
    return sum;
}
