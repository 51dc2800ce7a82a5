// out[t, n] = scales[t] * sum_k x[t, k] * w[n, k] (+ bias[n]) (+ out[t, n]), w in the 4-bit layout of the device, x as
// halve leaves it, for many rows t, on matrix units: 16x16x16 products of half precision, summed in f32.
//
// Mapping: a workgroup = a tile of TILE rows by TILE outputs (grid x tiles of outputs, z of rows); its eight subgroups of
// 32 hold 32 rows by 64 outputs each, in eight accumulators. A step is a chunk of 32 inputs: two invocations dequantise
// an output's chunk into workgroup memory while the next one is on its way; two buffers, so one barrier a step.
// Traffic: the weights once per TILE rows, x once per TILE outputs.

struct Params {
    n: u32,
    k: u32,
    chunks: u32,
    group_size: u32,
    groups: u32,
    x_stride: u32,
    out_stride: u32,
    out_offset: u32,
    bias_offset: u32,
    flags: u32,
    row_mode: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<f16>>;              // (rows, chunks, 8), rows padded to tiles
@group(0) @binding(3) var<storage, read> qweight: array<vec2<u32>>;        // (tiles, chunks, 32, 2)
@group(0) @binding(4) var<storage, read> group_params: array<u32>;         // (tiles, groups, 32)
@group(0) @binding(5) var<storage, read> bias: array<f32>;                 // (bias_offset + n)
@group(0) @binding(6) var<storage, read_write> out: array<f32>;            // (rows, out_stride)
@group(0) @binding(7) var<storage, read> scales: array<f32>;               // (rows)

// vec4s of a chunk, and from one row of a tile in workgroup memory to the next: ten, so that the eight rows that a
// subgroup reads at once lie in different banks.
const CHUNK_VECS: u32 = 8u;
const ROW_VECS: u32 = 10u;
const TILE_VECS: u32 = TILE * ROW_VECS;

var<workgroup> x_tile: array<vec4<f16>, 2u * TILE_VECS>;
var<workgroup> w_tile: array<vec4<f16>, 2u * TILE_VECS>;
var<workgroup> result: array<f32, WG / 32u * 256u>;

// Stores a 16x16 piece of the result. What it reads comes first: behind a store, which the driver takes to change anything,
// every read would be waited for by itself.
fn store(piece: coop_mat16x16<f32,C>, subgroup: u32, lane: u32, token_start: u32, n_start: u32) {
    // Orders the reads of the piece before.
    subgroupBarrier();
    coopStoreT(piece, &result[subgroup * 256u], 16u);
    // Orders the subgroup's piece before its reads.
    subgroupBarrier();
    let n = n_start + lane % 16u;
    let rows = row_count(params.row_mode);
    let column = params.out_offset + min(n, params.n - 1u);
    let first = token_start + lane / 16u;
    var added = 0.0;
    if ((params.flags & FLAG_BIAS) != 0u) {
        added = bias[params.bias_offset + column - params.out_offset];
    }
    var values: array<f32, 8>;
    for (var i = 0u; i < 8u; i++) {
        let token = min(first + 2u * i, rows - 1u);
        values[i] = fma(result[subgroup * 256u + 32u * i + lane], scales[token], added);
        if ((params.flags & FLAG_ACCUMULATE) != 0u) {
            values[i] += out[token * params.out_stride + column];
        }
    }
    for (var i = 0u; i < 8u; i++) {
        let token = first + 2u * i;
        if (token < rows && n < params.n) {
            out[token * params.out_stride + column] = values[i];
        }
    }
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local_index: u32) {
    // Subgroups are 32 wide where this kernel runs, and fill a one-dimensional workgroup in order.
    let subgroup = local_index / 32u;
    let lane = local_index % 32u;
    let n_start = group.x * TILE;
    let token_start = group.z * TILE;
    // The grid has no workgroup without a tile, so nobody leaves early: matrix operations need all invocations.

    // Loading weights: invocation = (output of the tile, half of its chunk). Outputs beyond N repeat the last padded one.
    let n_row = local_index % TILE;
    let part = local_index / TILE;
    let n = min(n_start + n_row, (params.n + TILE_N - 1u) / TILE_N * TILE_N - 1u);
    let qweight_start = chunk_index(n, 0u, params.chunks) * 2u + part;
    let params_start = group_index(n, 0u, params.groups);
    // Loading inputs: an invocation takes the vec4 `x_column` of the rows x_row, x_row + 32, ...
    let x_row = local_index / CHUNK_VECS;
    let x_column = local_index % CHUNK_VECS;
    let x_stride = params.chunks * CHUNK_VECS;
    let x_start = (token_start + x_row) * x_stride + x_column;

    // Computing.
    let token_part = subgroup / 2u * 32u;
    let n_part = subgroup % 2u * 64u;
    var c00 = coop_mat16x16<f32,C>();
    var c01 = coop_mat16x16<f32,C>();
    var c02 = coop_mat16x16<f32,C>();
    var c03 = coop_mat16x16<f32,C>();
    var c10 = coop_mat16x16<f32,C>();
    var c11 = coop_mat16x16<f32,C>();
    var c12 = coop_mat16x16<f32,C>();
    var c13 = coop_mat16x16<f32,C>();

    var q = qweight[qweight_start];
    var group_word = group_params[params_start];
    var x0 = x[x_start];
    var x1 = x[x_start + 32u * x_stride];
    var x2 = x[x_start + 64u * x_stride];
    var x3 = x[x_start + 96u * x_stride];
    for (var chunk = 0u; chunk < params.chunks; chunk++) {
        let buffer = chunk % 2u * TILE_VECS;
        let group_values = unpack_group(group_word, params.flags);
        let base = vec2<f16>(f16(1024.0 + group_values.zero));
        let s = vec2<f16>(f16(group_values.s));
        let c = vec2<f16>(f16(group_values.c));
        let w_at = buffer + n_row * ROW_VECS + part * 4u;
        write_weights(w_at, q.x, base, s, c);
        write_weights(w_at + 2u, q.y, base, s, c);
        x_tile[buffer + x_row * ROW_VECS + x_column] = x0;
        x_tile[buffer + (x_row + 32u) * ROW_VECS + x_column] = x1;
        x_tile[buffer + (x_row + 64u) * ROW_VECS + x_column] = x2;
        x_tile[buffer + (x_row + 96u) * ROW_VECS + x_column] = x3;
        // On their way while this chunk is multiplied.
        let next = min(chunk + 1u, params.chunks - 1u);
        q = qweight[qweight_start + next * TILE_N * 2u];
        group_word = group_params[params_start + min(next * 32u / params.group_size, params.groups - 1u) * TILE_N];
        x0 = x[x_start + next * CHUNK_VECS];
        x1 = x[x_start + 32u * x_stride + next * CHUNK_VECS];
        x2 = x[x_start + 64u * x_stride + next * CHUNK_VECS];
        x3 = x[x_start + 96u * x_stride + next * CHUNK_VECS];
        // Orders the tiles' writes before their reads; those of the chunk before last lie behind the barrier of the last.
        workgroupBarrier();
        for (var half = 0u; half < 2u; half++) {
            let x_at = buffer + token_part * ROW_VECS + half * 4u;
            let w_at = buffer + n_part * ROW_VECS + half * 4u;
            let a0 = coopLoadT<coop_mat16x16<f16,A>>(&x_tile[x_at], ROW_VECS);
            let a1 = coopLoadT<coop_mat16x16<f16,A>>(&x_tile[x_at + 16u * ROW_VECS], ROW_VECS);
            let b0 = coopLoad<coop_mat16x16<f16,B>>(&w_tile[w_at], ROW_VECS);
            c00 = coopMultiplyAdd(a0, b0, c00);
            c10 = coopMultiplyAdd(a1, b0, c10);
            let b1 = coopLoad<coop_mat16x16<f16,B>>(&w_tile[w_at + 16u * ROW_VECS], ROW_VECS);
            c01 = coopMultiplyAdd(a0, b1, c01);
            c11 = coopMultiplyAdd(a1, b1, c11);
            let b2 = coopLoad<coop_mat16x16<f16,B>>(&w_tile[w_at + 32u * ROW_VECS], ROW_VECS);
            c02 = coopMultiplyAdd(a0, b2, c02);
            c12 = coopMultiplyAdd(a1, b2, c12);
            let b3 = coopLoad<coop_mat16x16<f16,B>>(&w_tile[w_at + 48u * ROW_VECS], ROW_VECS);
            c03 = coopMultiplyAdd(a0, b3, c03);
            c13 = coopMultiplyAdd(a1, b3, c13);
        }
    }

    // Accumulators have no addressable elements: they pass through the subgroup's part of workgroup memory, one at a time.
    let token = token_start + token_part;
    let output = n_start + n_part;
    store(c00, subgroup, lane, token, output);
    store(c01, subgroup, lane, token, output + 16u);
    store(c02, subgroup, lane, token, output + 32u);
    store(c03, subgroup, lane, token, output + 48u);
    store(c10, subgroup, lane, token + 16u, output);
    store(c11, subgroup, lane, token + 16u, output + 16u);
    store(c12, subgroup, lane, token + 16u, output + 32u);
    store(c13, subgroup, lane, token + 16u, output + 48u);
}
