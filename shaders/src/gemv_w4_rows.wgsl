// As gemv_w4.wgsl for several rows t at once: out[t, n] = factor(t) * sum_k x[t, k] * w[n, k] (+ bias[n]) (+ out[t, n]),
// staged, too, with FLAG_STAGE. With FLAG_GLU, as gemv_w4_swiglu.wgsl: activation(g) * u is staged and nothing else, g and
// u being outputs i and n / 2 + i.
//
// Mapping: a workgroup = 64 outputs (32 pairs with FLAG_GLU) of ROWS rows. An invocation holds two outputs and shares their
// words, and their unpacking, among the rows; WG / 32 slices share the inputs, four consecutive chunks at a time. Grid x,
// y number blocks of rows within tiles of outputs, so that the blocks of a tile find its weights in the cache.
// Traffic: every weight once, x once a workgroup (from cache after the first).

struct Params {
    n: u32,
    k: u32,
    chunks: u32,
    group_size: u32,
    group_shift: u32,
    groups: u32,
    out_stride: u32,
    out_offset: u32,
    bias_offset: u32,
    flags: u32,
    row_mode: u32,
    eps: f32,
    norm_offset: u32,
    stage_quads: u32,
    activation: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;              // (rows) of staged inputs
@group(0) @binding(3) var<storage, read> qweight: array<vec4<u32>>;        // (tiles, chunks, 32)
@group(0) @binding(4) var<storage, read> group_params: array<u32>;         // (tiles, groups, 32)
// Bias of all outputs from bias_offset on, weights of the norm that follows from norm_offset on.
@group(0) @binding(5) var<storage, read> vectors: array<f32>;
@group(0) @binding(6) var<storage, read_write> out: array<f32>;            // (rows, out_stride)
@group(0) @binding(7) var<storage, read_write> staged: array<vec4<u32>>;   // (rows) of staged inputs

const LANES: u32 = 32u;
const SLICES: u32 = WG / LANES;
// Outputs of a row in a workgroup.
const WIDTH: u32 = 2u * LANES;

var<workgroup> partial: array<vec4<f32>, WG / 2u>;
var<workgroup> squares: array<f32, ROWS * 32u>;
var<workgroup> squares_fours: array<f32, ROWS * 8u>;
// By row: the outputs, then what is staged of them.
var<workgroup> values: array<f32, ROWS * WIDTH>;
var<workgroup> value_squares: array<f32, ROWS * WIDTH>;
// The largest magnitude and the sum of squares of four neighbours each.
var<workgroup> fours: array<vec2<f32>, ROWS * WIDTH / 4u>;

// Products of the two outputs with the rows.
struct Sums {
    a: vec4<f32>,
    b: vec4<f32>,
}

// Those of a chunk whose inputs share a group; `at` is where the rows' inputs lie.
fn chunk_rows(qa: vec4<u32>, qb: vec4<u32>, group_a: u32, group_b: u32, at: vec4<u32>) -> Sums {
    let x0 = load_chunk(at.x);
    let x1 = load_chunk(at.y);
    let x2 = load_chunk(at.z);
    let x3 = load_chunk(at.w);
    return Sums(
        vec4<f32>(
            chunk_product(qa, group_a, x0),
            chunk_product(qa, group_a, x1),
            chunk_product(qa, group_a, x2),
            chunk_product(qa, group_a, x3),
        ),
        vec4<f32>(
            chunk_product(qb, group_b, x0),
            chunk_product(qb, group_b, x1),
            chunk_product(qb, group_b, x2),
            chunk_product(qb, group_b, x3),
        ),
    );
}

// Those of a chunk in which groups end.
fn split_chunk_rows(q: vec4<u32>, chunk: u32, group_start: u32, at: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(
        split_chunk_product(q, chunk, group_start, at.x),
        split_chunk_product(q, chunk, group_start, at.y),
        split_chunk_product(q, chunk, group_start, at.z),
        split_chunk_product(q, chunk, group_start, at.w),
    );
}

// Of four chunks.
fn group_words(start: u32, offset: vec4<u32>) -> vec4<u32> {
    let at = start + offset;
    return vec4<u32>(group_params[at.x], group_params[at.y], group_params[at.z], group_params[at.w]);
}

// The slices' sums added up, complete in the first LANES invocations; call in uniform control flow.
fn sum_slices(own: vec4<f32>, local_index: u32) -> vec4<f32> {
    var sum = own;
    for (var half = WG / 2u; half >= LANES; half /= 2u) {
        // Orders earlier reads before these writes.
        workgroupBarrier();
        if (local_index >= half && local_index < 2u * half) {
            partial[local_index - half] = sum;
        }
        // Orders the sums of the upper half before their reads.
        workgroupBarrier();
        if (local_index < half) {
            sum += partial[local_index];
        }
    }
    return sum;
}

// What the norm divides row `row` by, from `squares_fours`, or 1.
fn norm_factor(row: u32) -> f32 {
    if ((params.flags & FLAG_NORM) == 0u) {
        return 1.0;
    }
    var total = 0.0;
    for (var i = 0u; i < 8u; i++) {
        total += squares_fours[row * 8u + i];
    }
    return inverseSqrt(total / f32(params.k) + params.eps);
}

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local_index: u32,
) {
    let rows = row_count(params.row_mode);
    let blocks = (rows + ROWS - 1u) / ROWS;
    let block = group.x + group.y * groups.x;
    let is_glu = (params.flags & FLAG_GLU) != 0u;
    let width = select(params.n, params.n / 2u, is_glu);
    let tile_width = select(WIDTH, LANES, is_glu);
    let tile = block / max(blocks, 1u);
    if (tile * tile_width >= width || rows == 0u) {
        return;
    }
    let first_row = block % blocks * ROWS;

    // Outputs beyond the last repeat one that is there, and are not stored.
    let index = tile * tile_width + local_index % LANES;
    let gate = min(index, width - 1u);
    let last = (params.n + TILE_N - 1u) / TILE_N * TILE_N - 1u;
    let n = select(min(vec2<u32>(index, index + LANES), vec2<u32>(last)), vec2<u32>(gate, gate + width), is_glu);

    // Rows beyond the last repeat it.
    let quads = (params.chunks + 3u) / 4u;
    let row_indices = min(vec4<u32>(first_row, first_row + 1u, first_row + 2u, first_row + 3u), vec4<u32>(rows - 1u));
    let x_start = (row_indices + input_row(params.row_mode, 0u)) * staged_row(quads);
    if ((params.flags & FLAG_NORM) != 0u && local_index < ROWS * 32u) {
        var sum = 0.0;
        for (var quad = local_index % 32u; quad < quads; quad += 32u) {
            sum += dot(bitcast<vec4<f32>>(x[x_start[local_index / 32u] + squares_at(quads, quad)]), vec4<f32>(1.0));
        }
        squares[local_index] = sum;
    }

    let start = vec2<u32>(chunk_index(n.x, 0u, params.chunks), chunk_index(n.y, 0u, params.chunks));
    let group_start = vec2<u32>(group_index(n.x, 0u, params.groups), group_index(n.y, 0u, params.groups));
    var a = vec4<f32>(0.0);
    var b = vec4<f32>(0.0);
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
        // Columns are rows of x.
        let magnitudes = transpose(mat4x4<f32>(
            bitcast<vec4<f32>>(x[x_start.x + magnitudes_at(quads, quad)]),
            bitcast<vec4<f32>>(x[x_start.y + magnitudes_at(quads, quad)]),
            bitcast<vec4<f32>>(x[x_start.z + magnitudes_at(quads, quad)]),
            bitcast<vec4<f32>>(x[x_start.w + magnitudes_at(quads, quad)]),
        ));
        let at = x_start + quad * QUAD_VECS;
        if (GROUPS == GROUPS_ANY) {
            a = fma(split_chunk_rows(a0, chunk, group_start.x, at), magnitudes[0], a);
            b = fma(split_chunk_rows(b0, chunk, group_start.y, at), magnitudes[0], b);
            a = fma(split_chunk_rows(a1, chunk + 1u, group_start.x, at + CHUNK_VECS), magnitudes[1], a);
            b = fma(split_chunk_rows(b1, chunk + 1u, group_start.y, at + CHUNK_VECS), magnitudes[1], b);
            a = fma(split_chunk_rows(a2, chunk + 2u, group_start.x, at + 2u * CHUNK_VECS), magnitudes[2], a);
            b = fma(split_chunk_rows(b2, chunk + 2u, group_start.y, at + 2u * CHUNK_VECS), magnitudes[2], b);
            a = fma(split_chunk_rows(a3, chunk + 3u, group_start.x, at + 3u * CHUNK_VECS), magnitudes[3], a);
            b = fma(split_chunk_rows(b3, chunk + 3u, group_start.y, at + 3u * CHUNK_VECS), magnitudes[3], b);
        } else {
            // One group for the whole quad, or one for each of its chunks.
            let inputs = vec4<u32>(chunk, chunk + 1u, chunk + 2u, chunk + 3u) * 32u;
            var offset = min(inputs >> vec4<u32>(params.group_shift), vec4<u32>(params.groups - 1u)) * TILE_N;
            if (GROUPS == GROUPS_QUADS) {
                offset = vec4<u32>(offset.x);
            }
            let ga = group_words(group_start.x, offset);
            let gb = group_words(group_start.y, offset);
            let p0 = chunk_rows(a0, b0, ga.x, gb.x, at);
            a = fma(p0.a, magnitudes[0], a);
            b = fma(p0.b, magnitudes[0], b);
            let p1 = chunk_rows(a1, b1, ga.y, gb.y, at + CHUNK_VECS);
            a = fma(p1.a, magnitudes[1], a);
            b = fma(p1.b, magnitudes[1], b);
            let p2 = chunk_rows(a2, b2, ga.z, gb.z, at + 2u * CHUNK_VECS);
            a = fma(p2.a, magnitudes[2], a);
            b = fma(p2.b, magnitudes[2], b);
            let p3 = chunk_rows(a3, b3, ga.w, gb.w, at + 3u * CHUNK_VECS);
            a = fma(p3.a, magnitudes[3], a);
            b = fma(p3.b, magnitudes[3], b);
        }
    }

    a = sum_slices(a, local_index);
    // The barriers of the sums order the squares before these reads.
    if ((params.flags & FLAG_NORM) != 0u && local_index < ROWS * 8u) {
        let first = local_index * 4u;
        squares_fours[local_index] =
            (squares[first] + squares[first + 1u]) + (squares[first + 2u] + squares[first + 3u]);
    }
    b = sum_slices(b, local_index);
    if (local_index < LANES) {
        for (var r = 0u; r < ROWS; r++) {
            let factor = norm_factor(r);
            values[r * WIDTH + local_index] = a[r] * factor;
            values[r * WIDTH + LANES + local_index] = b[r] * factor;
        }
    }
    // Orders the outputs before their reads.
    workgroupBarrier();

    // From here on an invocation has one output.
    let r = local_index / WIDTH;
    let column = local_index % WIDTH;
    let output = tile * tile_width + column;
    let row = first_row + r;
    let inside = r < ROWS && row < rows && output < width && column < tile_width;
    var value = 0.0;
    if (inside) {
        value = values[local_index];
        if (is_glu) {
            var up = values[local_index + LANES];
            if ((params.flags & FLAG_BIAS) != 0u) {
                value += vectors[params.bias_offset + output];
                up += vectors[params.bias_offset + output + width];
            }
            value = activate(value, params.activation) * up;
        } else {
            let at = row * params.out_stride + params.out_offset + output;
            if ((params.flags & FLAG_BIAS) != 0u) {
                value += vectors[params.bias_offset + output];
            }
            if ((params.flags & FLAG_ACCUMULATE) != 0u) {
                value += out[at];
            }
            out[at] = value;
        }
    }
    if ((params.flags & (FLAG_STAGE | FLAG_GLU)) == 0u) {
        return;
    }
    var factor = 1.0;
    if ((params.flags & FLAG_STAGE_NORM) != 0u) {
        factor = vectors[params.norm_offset + min(output, params.n - 1u)];
    }
    // Orders the reads of the outputs before what is staged takes their place.
    workgroupBarrier();
    if (r < ROWS) {
        values[local_index] = value * factor;
        value_squares[local_index] = value * value;
    }
    // Orders the values before their reads.
    workgroupBarrier();
    if (local_index < ROWS * WIDTH / 4u) {
        let at = 4u * local_index;
        let v = vec4<f32>(values[at], values[at + 1u], values[at + 2u], values[at + 3u]);
        let s = vec4<f32>(value_squares[at], value_squares[at + 1u], value_squares[at + 2u], value_squares[at + 3u]);
        let large = max(abs(v.xy), abs(v.zw));
        fours[local_index] = vec2<f32>(max(large.x, large.y), dot(s, vec4<f32>(1.0)));
    }
    // Orders what fours have in common before its reads.
    workgroupBarrier();
    if (local_index < ROWS * WIDTH / 8u) {
        // An invocation stages eight inputs: part `local_index % 4` of a chunk.
        let chunk_in_row = local_index / 4u % 2u;
        let chunk_start = local_index / 4u * 32u;
        let chunk_row = first_row + local_index / 8u;
        let chunk = tile * (tile_width / 32u) + chunk_in_row;
        if (chunk_row < rows && chunk * 32u < width && chunk_in_row * 32u < tile_width) {
            var largest = 0.0;
            var sum = 0.0;
            for (var i = 0u; i < 8u; i++) {
                largest = max(largest, fours[chunk_start / 4u + i].x);
                sum += fours[chunk_start / 4u + i].y;
            }
            let at = 8u * local_index;
            let lo = vec4<f32>(values[at], values[at + 1u], values[at + 2u], values[at + 3u]);
            let hi = vec4<f32>(values[at + 4u], values[at + 5u], values[at + 6u], values[at + 7u]);
            stage_eight(local_index % 4u, lo, hi, largest, sum, chunk, chunk_row, params.stage_quads);
        }
    }
}
