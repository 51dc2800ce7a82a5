// The product of a 4-bit matrix and one row of staged inputs, for the gemv_w4 kernels. The body defines LANES (32 or 64),
// `params` and the bindings x, qweight and group_params; gemv_w4_one.wgsl or gemv_w4_pair.wgsl follows.
//
// Mapping: LANES invocations hold an output each, or two, which then share the loads of inputs, and read chunks of 32
// inputs, a vec4 of words at a time; WG / LANES slices share the inputs, four consecutive chunks at a time. Inputs are the
// same for all lanes, so they come from cache with one transaction; no invocation waits for another before the very end.

const SLICES: u32 = WG / LANES;

// Axis groups.
const GROUPS_QUADS: u32 = 0u;
const GROUPS_CHUNKS: u32 = 1u;
const GROUPS_ANY: u32 = 2u;

// Sums are taken four at a time, so that nobody adds up many one by one.
const FOURS: u32 = (SLICES + 3u) / 4u;

var<workgroup> partial: array<Sum, WG>;
var<workgroup> partial_fours: array<Sum, FOURS * LANES>;
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

// The slices' sums, each invocation's own `own`, added up and divided by the norm: complete in the first LANES invocations
// of the workgroup; call in uniform control flow, after sum_squares.
fn sum_slices(own: Sum, local_index: u32) -> Sum {
    var sum = own;
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
