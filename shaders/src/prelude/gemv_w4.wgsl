// The product of a 4-bit matrix and one row of staged inputs, for the gemv_w4 kernels. The body defines LANES (32 or 64),
// `params` and the bindings x, qweight and group_params; gemv_w4_one.wgsl or gemv_w4_pair.wgsl follows.
//
// Mapping: LANES invocations hold an output each, or two, which then share the loads of inputs, and read chunks of 32
// inputs, a vec4 of words at a time; WG / LANES slices share the inputs, four consecutive chunks at a time. Inputs are the
// same for all lanes, so they come from cache with one transaction; no invocation waits for another before the very end.

const SLICES: u32 = WG / LANES;

// Sums are taken four at a time, so that nobody adds up many one by one.
const FOURS: u32 = (SLICES + 3u) / 4u;

var<workgroup> partial: array<Sum, WG>;
var<workgroup> partial_fours: array<Sum, FOURS * LANES>;
var<workgroup> squares: array<f32, 32>;
var<workgroup> squares_fours: array<f32, 8>;

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
