// As gemv_w4_rows.wgsl, on matrix units: 16x16x16 products of half precision, summed in f32, for up to ROWS rows at once.
//
// Mapping: a workgroup = 32 outputs (32 pairs with FLAG_GLU) of ROWS rows; its subgroups of 32 share the chunks of inputs
// among them, and with FLAG_GLU odd ones have the ups. A lane dequantises the chunk of an output into the part of
// workgroup memory that its subgroup has alone, and a quarter of a row's inputs beside it, so nobody waits for another
// subgroup before the end. Codes are on their way four chunks ahead, inputs two. Grid x, y number blocks of rows within
// tiles of outputs.
// Traffic: every weight once, x once a subgroup and chunk (from cache after the first).

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

// Odd pairs of inputs are staged as a sixteenth (prelude/elem_f16.wgsl), because codes are left shifted elsewhere.
const ODD: f32 = 16.0;
// Invocations that look at a row's magnitudes.
const PER_ROW: u32 = WG / ROWS;
// One vec4 holds eight staged inputs.
const_assert STAGED_VECS == 1u;

// By row and share of it: the largest magnitude and the sum of squares.
var<workgroup> parts: array<vec2<f32>, WG>;
// By row: the largest magnitude, and what the norm multiplies with.
var<workgroup> row_scales: array<vec2<f32>, ROWS>;
// By row: outputs, or gates and then ups.
var<workgroup> values: array<f32, ROWS * 2u * LANES>;

// What a lane loads of the inputs of a chunk: a quarter of rows `lane / 4` and `lane / 4 + 8`.
struct Inputs {
    first: vec4<u32>,
    second: vec4<u32>,
}

fn load_inputs(share: Share, chunk: u32) -> Inputs {
    var inputs: Inputs;
    inputs.first = x[share.starts.x + chunk * CHUNK_VECS];
    if (share.rows > 8u) {
        inputs.second = x[share.starts.y + chunk * CHUNK_VECS];
    }
    return inputs;
}

// What multiplies the inputs of those rows in the chunks of a quad: their magnitudes relative to their rows'. Quads beyond
// the last one count nothing.
struct Ratios {
    first: vec4<f32>,
    second: vec4<f32>,
}

fn load_ratios(share: Share, quads: u32, quad: u32) -> Ratios {
    var ratios: Ratios;
    if (quad >= quads) {
        return ratios;
    }
    let at = magnitudes_at(quads, quad);
    ratios.first = bitcast<vec4<f32>>(x[share.starts.z + at]) * share.inverse.x;
    if (share.rows > 8u) {
        ratios.second = bitcast<vec4<f32>>(x[share.starts.w + at]) * share.inverse.y;
    }
    return ratios;
}

// Writes eight inputs, which are relative to their chunk's magnitude, relative to their row's.
fn write_inputs(at: u32, words: vec4<u32>, ratio: f32) {
    let inputs = inputs8(words, words);
    let factors = vec4<f16>(vec4<f32>(ratio, ratio, ODD * ratio, ODD * ratio));
    x_tile[at] = inputs.x0415 * factors;
    x_tile[at + 1u] = inputs.x2637 * factors;
}

// The chunks of a quad, of which those beyond the last one repeat it and meet a ratio of zero.
fn chunks_of(quad: u32) -> vec4<u32> {
    return min(4u * quad + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(params.chunks - 1u));
}

// Parameters of the groups of chunks.
fn group_words(start: u32, chunks: vec4<u32>) -> vec4<u32> {
    let groups = (chunks * 32u) >> vec4<u32>(params.group_shift);
    let at = start + min(groups, vec4<u32>(params.groups - 1u)) * TILE_N;
    return vec4<u32>(group_params[at.x], group_params[at.y], group_params[at.z], group_params[at.w]);
}

// Where an invocation writes its share of a chunk, where its inputs of two rows and their magnitudes begin, and what the
// latter are relative to.
struct Share {
    w_at: u32,
    x_at: u32,
    starts: vec4<u32>,
    inverse: vec2<f32>,
    rows: u32,
}

// Writes a lane's share of a chunk to the subgroup's tiles.
fn write_chunk(share: Share, codes: vec4<u32>, word: u32, inputs: Inputs, ratios: vec2<f32>) {
    let group = unpack_group(word, params.flags);
    let base = vec2<f16>(f16(1024.0 + group.zero));
    let s = vec2<f16>(f16(group.s));
    let c = vec2<f16>(f16(group.c));
    // Orders the reads of the chunk before.
    subgroupBarrier();
    write_weights(share.w_at, codes.x, base, s, c);
    write_weights(share.w_at + 2u, codes.y, base, s, c);
    write_weights(share.w_at + 4u, codes.z, base, s, c);
    write_weights(share.w_at + 6u, codes.w, base, s, c);
    write_inputs(share.x_at, inputs.first, ratios.x);
    if (share.rows > 8u) {
        write_inputs(share.x_at + 8u * ROW_VECS, inputs.second, ratios.y);
    }
    // Orders the subgroup's tiles before their reads.
    subgroupBarrier();
}

// Adds up an accumulator of all subgroups. Call behind a barrier.
fn sum_pieces(local_index: u32, n_start: u32, pairs: u32) {
    for (var element = local_index; element < PIECE; element += WG) {
        let at = element / 16u * 2u * LANES + n_start + element % 16u;
        var first = 0.0;
        var second = 0.0;
        for (var i = 0u; i < SUBGROUPS; i += 2u) {
            first += sums[i * PIECE + element];
            second += sums[(i + 1u) * PIECE + element];
        }
        values[at] = select(first + second, first, pairs == 2u);
        values[at + LANES] = second;
    }
}

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local_index: u32,
) {
    // Subgroups are 32 wide where this kernel runs, and fill a one-dimensional workgroup in order.
    let subgroup = local_index / LANES;
    let lane = local_index % LANES;
    let rows = row_count(params.row_mode);
    let blocks = (rows + ROWS - 1u) / ROWS;
    let block = group.x + group.y * groups.x;
    let is_glu = (params.flags & FLAG_GLU) != 0u;
    let width = select(params.n, params.n / 2u, is_glu);
    // There are no workgroups without rows. Those beyond the last tile stay, because matrix operations need everybody, and
    // store nothing.
    let tile = block / blocks;
    let first_row = block % blocks * ROWS;
    let block_rows = min(rows - first_row, ROWS);

    // Subgroups that share a matrix have every `slices`th quad of chunks each.
    let pairs = select(1u, 2u, is_glu);
    let slices = SUBGROUPS / pairs;
    let slice = subgroup / pairs;
    let quads = (params.chunks + 3u) / 4u;
    let steps = (quads + slices - 1u) / slices;

    // Outputs beyond the last repeat one that is there, and are not stored.
    let n = min(tile * LANES + lane, width - 1u) + select(0u, width, is_glu && subgroup % 2u == 1u);
    let start = chunk_index(n, 0u, params.chunks);
    let group_start = group_index(n, 0u, params.groups);
    // The next quad.
    var at = chunks_of(slice);
    var q0 = qweight[start + at.x * TILE_N];
    var q1 = qweight[start + at.y * TILE_N];
    var q2 = qweight[start + at.z * TILE_N];
    var q3 = qweight[start + at.w * TILE_N];

    // Rows beyond the last repeat it.
    let row_start = (first_row + input_row(params.row_mode, 0u)) * staged_row(quads);
    let scan_start = row_start + min(local_index / PER_ROW, block_rows - 1u) * staged_row(quads);
    var largest = 0.0;
    var squares = 0.0;
    for (var quad = local_index % PER_ROW; quad < quads; quad += PER_ROW) {
        let m = bitcast<vec4<f32>>(x[scan_start + magnitudes_at(quads, quad)]);
        largest = max(largest, max(max(m.x, m.y), max(m.z, m.w)));
        if ((params.flags & FLAG_NORM) != 0u) {
            squares += dot(bitcast<vec4<f32>>(x[scan_start + squares_at(quads, quad)]), vec4<f32>(1.0));
        }
    }
    parts[local_index] = vec2<f32>(largest, squares);
    // The rows of the tiles that no input is written to.
    x_tile[subgroup * X_VECS + 8u * ROW_VECS + lane] = vec4<f16>();
    x_tile[subgroup * X_VECS + 8u * ROW_VECS + LANES + lane] = vec4<f16>();
    x_tile[subgroup * X_VECS + 8u * ROW_VECS + min(2u * LANES + lane, 8u * ROW_VECS - 1u)] = vec4<f16>();
    // Orders the parts of the rows before their reads.
    workgroupBarrier();
    if (local_index < ROWS) {
        var total = vec2<f32>(0.0);
        for (var i = 0u; i < PER_ROW; i++) {
            let part = parts[local_index * PER_ROW + i];
            total = vec2<f32>(max(total.x, part.x), total.y + part.y);
        }
        let factor = inverseSqrt(total.y / f32(params.k) + params.eps);
        row_scales[local_index] = vec2<f32>(max(total.x, 1.2e-38), select(1.0, factor, (params.flags & FLAG_NORM) != 0u));
    }
    // Orders the numbers of the rows before their reads.
    workgroupBarrier();

    let x_row = lane / 4u;
    let x_part = lane % 4u;
    let rows_at = row_start + min(vec2<u32>(x_row, x_row + 8u), vec2<u32>(block_rows - 1u)) * staged_row(quads);
    let share = Share(
        subgroup * W_VECS + lane * ROW_VECS,
        subgroup * X_VECS + x_row * ROW_VECS + x_part * 2u,
        vec4<u32>(rows_at + x_part, rows_at),
        vec2<f32>(1.0 / row_scales[x_row].x, 1.0 / row_scales[x_row + 8u].x),
        block_rows,
    );
    var even = load_inputs(share, at.x);
    var odd = load_inputs(share, at.y);
    var ratios = load_ratios(share, quads, slice);
    var words = group_words(group_start, at);

    var c0 = coop_mat16x16<f32,C>();
    var c1 = coop_mat16x16<f32,C>();
    // Four chunks written out, because a register that passes on what is on its way waits for it.
    for (var i = 0u; i < steps; i++) {
        let quad = slice + i * slices;
        let next = chunks_of(quad + slices);
        write_chunk(share, q0, words.x, even, vec2<f32>(ratios.first.x, ratios.second.x));
        q0 = qweight[start + next.x * TILE_N];
        even = load_inputs(share, at.z);
        multiply(subgroup, &c0, &c1);
        write_chunk(share, q1, words.y, odd, vec2<f32>(ratios.first.y, ratios.second.y));
        q1 = qweight[start + next.y * TILE_N];
        odd = load_inputs(share, at.w);
        multiply(subgroup, &c0, &c1);
        write_chunk(share, q2, words.z, even, vec2<f32>(ratios.first.z, ratios.second.z));
        q2 = qweight[start + next.z * TILE_N];
        even = load_inputs(share, next.x);
        multiply(subgroup, &c0, &c1);
        write_chunk(share, q3, words.w, odd, vec2<f32>(ratios.first.w, ratios.second.w));
        q3 = qweight[start + next.w * TILE_N];
        odd = load_inputs(share, next.y);
        at = next;
        words = group_words(group_start, at);
        ratios = load_ratios(share, quads, quad + slices);
        multiply(subgroup, &c0, &c1);
    }

    // Accumulators have no addressable elements: they pass through workgroup memory, one of each subgroup at a time.
    coopStoreT(c0, &sums[subgroup * PIECE], 16u);
    workgroupBarrier();
    sum_pieces(local_index, 0u, pairs);
    workgroupBarrier();
    coopStoreT(c1, &sums[subgroup * PIECE], 16u);
    workgroupBarrier();
    sum_pieces(local_index, 16u, pairs);
    // Orders the outputs before their reads.
    workgroupBarrier();

    // From here on a subgroup has the outputs of a row, a lane one of them.
    let output = tile * LANES + lane;
    let norm = vectors[select(0u, params.norm_offset + min(output, params.n - 1u), (params.flags & FLAG_STAGE_NORM) != 0u)];
    for (var round = 0u; round < ROWS / SUBGROUPS; round++) {
        let r = round * SUBGROUPS + subgroup;
        let row = first_row + r;
        var value = 0.0;
        if (row < rows && output < width) {
            let scales = row_scales[r];
            value = values[r * 2u * LANES + lane] * scales.x * scales.y;
            if ((params.flags & FLAG_BIAS) != 0u) {
                value += vectors[params.bias_offset + output];
            }
            if (is_glu) {
                var up = values[r * 2u * LANES + LANES + lane] * scales.x * scales.y;
                if ((params.flags & FLAG_BIAS) != 0u) {
                    up += vectors[params.bias_offset + output + width];
                }
                value = activate(value, params.activation) * up;
            } else {
                let at = row * params.out_stride + params.out_offset + output;
                if ((params.flags & FLAG_ACCUMULATE) != 0u) {
                    value += out[at];
                }
                out[at] = value;
            }
        }
        if ((params.flags & (FLAG_STAGE | FLAG_GLU)) != 0u) {
            let weighted = value * select(1.0, norm, (params.flags & FLAG_STAGE_NORM) != 0u);
            var most = abs(weighted);
            var sum = value * value;
            for (var other = 1u; other < LANES; other *= 2u) {
                most = max(most, subgroupShuffleXor(most, other));
                sum += subgroupShuffleXor(sum, other);
            }
            // Only this subgroup reads the row's values.
            subgroupBarrier();
            values[r * 2u * LANES + lane] = weighted;
            // Orders what is staged before its reads.
            subgroupBarrier();
            if (lane < 4u && row < rows && tile * LANES < width) {
                let at = r * 2u * LANES + 8u * lane;
                let lo = vec4<f32>(values[at], values[at + 1u], values[at + 2u], values[at + 3u]);
                let hi = vec4<f32>(values[at + 4u], values[at + 5u], values[at + 6u], values[at + 7u]);
                stage_eight(lane, lo, hi, most, sum, tile, row, params.stage_quads);
            }
        }
    }
}
