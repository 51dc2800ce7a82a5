// The product of a 4-bit matrix and one row of inputs, for the gemv_w4 kernels. The body defines `params`, the bindings
// qweight and group_params, and `input4(x_start, column)`, `norm_weight4(column)` for vec4 columns below K / 4; x_start is
// the first vec4 of the row.
//
// Mapping: 32 invocations hold an output each (or two, ROWS = 2) and read chunks of 32 inputs; SLICES such groups share
// the inputs, four consecutive chunks at a time. Inputs lie in workgroup memory as Elem, X_BYTES of them at once,
// divided by their norm; the root mean square norm in front of the matrix (FLAG_NORM) costs one factor at the end.

const SLICES: u32 = WG / TILE_N;
const X_CHUNKS: u32 = X_BYTES / ELEM_BYTES / 32u;
const QUAD: u32 = 4u;

// By chunk: eight Elem4, two for each word of codes.
var<workgroup> x_tile: array<Elem4, X_CHUNKS * 8u>;
var<workgroup> partial: array<vec2<f32>, WG>;

// Four chunks of an output, and the parameters of their groups.
struct Codes {
    q0: vec4<u32>,
    q1: vec4<u32>,
    q2: vec4<u32>,
    q3: vec4<u32>,
    group: vec4<u32>,
}

fn load_codes(n: u32, chunk: u32) -> Codes {
    let chunks = vec4<u32>(chunk, chunk + 1u, chunk + 2u, chunk + 3u);
    // Chunks beyond the last one repeat it and meet inputs of zero.
    let at = min(chunks, vec4<u32>(params.chunks - 1u));
    let start = chunk_index(n, 0u, params.chunks);
    let groups = min(at * 32u / params.group_size, vec4<u32>(params.groups - 1u)) * TILE_N;
    let group_start = group_index(n, 0u, params.groups);
    return Codes(
        qweight[start + at.x * TILE_N],
        qweight[start + at.y * TILE_N],
        qweight[start + at.z * TILE_N],
        qweight[start + at.w * TILE_N],
        vec4<u32>(
            group_params[group_start + groups.x],
            group_params[group_start + groups.y],
            group_params[group_start + groups.z],
            group_params[group_start + groups.w],
        ),
    );
}

// Sum of the eight inputs of word `word` of the chunk at `x`.
fn inputs_sum(x: u32, word: u32) -> f32 {
    let sum = vec4<f32>(x_tile[x + 2u * word]) + vec4<f32>(x_tile[x + 2u * word + 1u]);
    return dot(sum, vec4<f32>(1.0));
}

// Product of one word with its inputs under the group `params_word`.
fn word_product(word: u32, x: u32, i: u32, params_word: u32) -> f32 {
    let group = unpack_group(params_word, params.flags);
    let product = code_dot(word, x_tile[x + 2u * i], x_tile[x + 2u * i + 1u], Elem(1024.0 + group.zero));
    return fma(group.s, product, group.c * inputs_sum(x, i));
}

// Product of a chunk whose inputs share a group with the inputs at `x`.
fn chunk_product(q: vec4<u32>, params_word: u32, x: u32) -> f32 {
    let group = unpack_group(params_word, params.flags);
    let base = Elem(1024.0 + group.zero);
    var sum = code_dot(q.x, x_tile[x], x_tile[x + 1u], base);
    sum += code_dot(q.y, x_tile[x + 2u], x_tile[x + 3u], base);
    sum += code_dot(q.z, x_tile[x + 4u], x_tile[x + 5u], base);
    sum += code_dot(q.w, x_tile[x + 6u], x_tile[x + 7u], base);
    sum *= group.s;
    if ((params.flags & FLAG_SUMS) != 0u) {
        sum += group.c * (inputs_sum(x, 0u) + inputs_sum(x, 1u) + inputs_sum(x, 2u) + inputs_sum(x, 3u));
    }
    return sum;
}

// Product of four chunks from `chunk` on with the inputs at `x`.
fn quad_product(codes: Codes, n: u32, chunk: u32, x: u32) -> f32 {
    var sum = 0.0;
    if (params.group_size % 32u == 0u) {
        sum = chunk_product(codes.q0, codes.group.x, x);
        sum += chunk_product(codes.q1, codes.group.y, x + 8u);
        sum += chunk_product(codes.q2, codes.group.z, x + 16u);
        sum += chunk_product(codes.q3, codes.group.w, x + 24u);
        return sum;
    }
    // Groups that end within a chunk; rare, and the codes are read again so that those above can stay in registers.
    let group_start = group_index(n, 0u, params.groups);
    for (var i = 0u; i < QUAD && chunk + i < params.chunks; i++) {
        let q = qweight[chunk_index(n, chunk + i, params.chunks)];
        for (var w = 0u; w < 4u; w++) {
            let group = min(((chunk + i) * 32u + w * 8u) / params.group_size, params.groups - 1u);
            sum += word_product(q[w], x + 8u * i, w, group_params[group_start + group * TILE_N]);
        }
    }
    return sum;
}

// Four inputs as the matrix sees them but for the factors; zero from K on.
fn weighted4(x_start: u32, column: u32) -> vec4<f32> {
    if (column * 4u >= params.k) {
        return vec4<f32>(0.0);
    }
    if ((params.flags & FLAG_NORM) != 0u) {
        return input4(x_start, column) * norm_weight4(column);
    }
    return input4(x_start, column);
}

// Products of outputs n.x and (ROWS = 2) n.y, complete in every invocation of lane `local_index % 32` of slice 0.
fn gemv(n: vec2<u32>, x_start: u32, local_index: u32) -> vec2<f32> {
    let slice = local_index / TILE_N;
    // On their way while the inputs are prepared.
    var a = load_codes(n.x, slice * QUAD);
    var b = a;
    if (ROWS == 2u) {
        b = load_codes(n.y, slice * QUAD);
    }

    var squares = vec4<f32>(0.0);
    for (var column = local_index; column < params.k / 4u; column += WG) {
        let plain = input4(x_start, column);
        let weighted = weighted4(x_start, column);
        squares += vec4<f32>(dot(plain, plain), dot(weighted, weighted), 0.0, 0.0);
    }
    squares = workgroup_sum4(squares, local_index);
    let magnitude = input_magnitude(sqrt(squares.y));
    var factor = magnitude;
    if ((params.flags & FLAG_NORM) != 0u) {
        factor *= inverseSqrt(squares.x / f32(params.k) + params.eps);
    }

    var sum = vec2<f32>(0.0);
    for (var start = 0u; start < params.chunks; start += X_CHUNKS) {
        let here = min(X_CHUNKS, params.chunks - start);
        // Whole quads, padded with zeros.
        for (var i = local_index; i < (here + QUAD - 1u) / QUAD * QUAD * 4u; i += WG) {
            let column = start * 8u + i * 2u;
            let inputs = inputs8(weighted4(x_start, column) / magnitude, weighted4(x_start, column + 1u) / magnitude);
            x_tile[i * 2u] = inputs.x0415;
            x_tile[i * 2u + 1u] = inputs.x2637;
        }
        // Orders the inputs' writes before their reads.
        workgroupBarrier();
        for (var chunk = slice * QUAD; chunk < here; chunk += SLICES * QUAD) {
            let next = chunk + SLICES * QUAD;
            // What comes after: of this phase, or the first of the next.
            let following = select(start + next, start + X_CHUNKS + slice * QUAD, next >= here);
            if (ROWS == 2u) {
                sum += vec2<f32>(
                    quad_product(a, n.x, start + chunk, chunk * 8u),
                    quad_product(b, n.y, start + chunk, chunk * 8u),
                );
                if (following < params.chunks) {
                    a = load_codes(n.x, following);
                    b = load_codes(n.y, following);
                }
            } else {
                let current = a;
                if (following < params.chunks) {
                    a = load_codes(n.x, following);
                }
                sum.x += quad_product(current, n.x, start + chunk, chunk * 8u);
            }
        }
        // Orders these reads before the writes of the next phase.
        workgroupBarrier();
    }

    partial[local_index] = sum;
    // Orders the slices' sums before their reads.
    workgroupBarrier();
    if (local_index < TILE_N) {
        for (var i = 1u; i < SLICES; i++) {
            sum += partial[i * TILE_N + local_index];
        }
    }
    return sum * factor;
}
