// out[t, n] = scales[t] * sum_k x[t, k] * w[n, k] (+ bias[n]) (+ out[t, n]), w dense in half precision, x as halve leaves it,
// for up to ROWS rows t at once, on matrix units: 16x16x16 products of half precision, summed in f32.
//
// Mapping: a workgroup = 32 outputs of ROWS rows; its subgroups of 32 share the pairs of chunks of 32 inputs among them. A
// subgroup brings a chunk of the outputs and of the rows into a part of workgroup memory that it has alone, so nobody waits
// for another subgroup before the end; two chunks are on their way. Grid x, y number blocks of rows within tiles of outputs.
// Traffic: every weight once, x once a workgroup (from cache after the first).

struct Params {
    n: u32,
    k: u32,
    row_words: u32,
    chunks: u32,
    out_stride: u32,
    out_offset: u32,
    bias_offset: u32,
    flags: u32,
    row_mode: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<f16>>;         // (rows, chunks, 8), rows padded to blocks
@group(0) @binding(3) var<storage, read> weight: array<vec4<f16>>;    // (n, row_words / 2)
@group(0) @binding(4) var<storage, read> bias: array<f32>;            // (bias_offset + n)
@group(0) @binding(5) var<storage, read_write> out: array<f32>;       // (rows, out_stride)
@group(0) @binding(6) var<storage, read> scales: array<f32>;          // (rows)

const CHUNK_VECS: u32 = 8u;

// What a lane brings of a chunk: vec4 `lane % 8` of outputs `lane / 4 + 4 * i`, and eight inputs of rows `lane / 4` and
// `lane / 4 + 8`.
struct Piece {
    w0: vec4<f16>,
    w1: vec4<f16>,
    w2: vec4<f16>,
    w3: vec4<f16>,
    w4: vec4<f16>,
    w5: vec4<f16>,
    w6: vec4<f16>,
    w7: vec4<f16>,
    x0: vec4<f16>,
    x1: vec4<f16>,
    x2: vec4<f16>,
    x3: vec4<f16>,
}

// Where a lane reads: its outputs' rows of the weights, its vec4 of a chunk, and its inputs.
struct Share {
    low: vec4<u32>,
    high: vec4<u32>,
    part: u32,
    x_at: u32,
    both: bool,
}

// Chunks beyond the last one count nothing.
fn load_piece(share: Share, chunk: u32) -> Piece {
    var piece: Piece;
    if (chunk < params.chunks) {
        // The last chunk may reach beyond the row, where inputs are zero.
        let at = min(chunk * CHUNK_VECS + share.part, params.row_words / 2u - 1u);
        piece.w0 = weight[share.low.x + at];
        piece.w1 = weight[share.low.y + at];
        piece.w2 = weight[share.low.z + at];
        piece.w3 = weight[share.low.w + at];
        piece.w4 = weight[share.high.x + at];
        piece.w5 = weight[share.high.y + at];
        piece.w6 = weight[share.high.z + at];
        piece.w7 = weight[share.high.w + at];
        let x_at = share.x_at + chunk * CHUNK_VECS;
        piece.x0 = x[x_at];
        piece.x1 = x[x_at + 1u];
        if (share.both) {
            let second = x_at + 8u * params.chunks * CHUNK_VECS;
            piece.x2 = x[second];
            piece.x3 = x[second + 1u];
        }
    }
    return piece;
}

// Writes eight inputs in their own order: halve leaves them in that of packed codes.
fn write_inputs(at: u32, a: vec4<f16>, b: vec4<f16>) {
    x_tile[at] = vec4<f16>(a.xz, b.xz);
    x_tile[at + 1u] = vec4<f16>(a.yw, b.yw);
}

fn write_piece(subgroup: u32, lane: u32, both: bool, piece: Piece) {
    let w_at = subgroup * W_VECS + lane / CHUNK_VECS * ROW_VECS + lane % CHUNK_VECS;
    let x_at = subgroup * X_VECS + lane / 4u * ROW_VECS + lane % 4u * 2u;
    // Orders the reads of the chunk before.
    subgroupBarrier();
    w_tile[w_at] = piece.w0;
    w_tile[w_at + 4u * ROW_VECS] = piece.w1;
    w_tile[w_at + 8u * ROW_VECS] = piece.w2;
    w_tile[w_at + 12u * ROW_VECS] = piece.w3;
    w_tile[w_at + 16u * ROW_VECS] = piece.w4;
    w_tile[w_at + 20u * ROW_VECS] = piece.w5;
    w_tile[w_at + 24u * ROW_VECS] = piece.w6;
    w_tile[w_at + 28u * ROW_VECS] = piece.w7;
    write_inputs(x_at, piece.x0, piece.x1);
    if (both) {
        write_inputs(x_at + 8u * ROW_VECS, piece.x2, piece.x3);
    }
    // Orders the subgroup's tiles before their reads.
    subgroupBarrier();
}

// Stores 16 outputs of every row, the sums of all subgroups' accumulators. Call behind a barrier.
fn store(local_index: u32, first_row: u32, rows: u32, n_start: u32) {
    let row = first_row + local_index / 16u;
    let n = n_start + local_index % 16u;
    if (row >= rows || n >= params.n) {
        return;
    }
    var total = 0.0;
    for (var i = 0u; i < SUBGROUPS; i++) {
        total += sums[i * PIECE + local_index];
    }
    let at = row * params.out_stride + params.out_offset + n;
    var value = total * scales[row];
    if ((params.flags & FLAG_BIAS) != 0u) {
        value += bias[params.bias_offset + n];
    }
    if ((params.flags & FLAG_ACCUMULATE) != 0u) {
        value += out[at];
    }
    out[at] = value;
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
    // There are no workgroups without rows. Those beyond the last tile stay, because matrix operations need everybody, and
    // store nothing.
    let n_start = block / blocks * LANES;
    let first_row = block % blocks * ROWS;

    // Outputs beyond N repeat the last one.
    let first = vec4<u32>(n_start + lane / CHUNK_VECS) + vec4<u32>(0u, 4u, 8u, 12u);
    let last = vec4<u32>(params.n - 1u);
    let row_vecs = params.row_words / 2u;
    let share = Share(
        min(first, last) * row_vecs,
        min(first + vec4<u32>(16u), last) * row_vecs,
        lane % CHUNK_VECS,
        (first_row + lane / 4u) * params.chunks * CHUNK_VECS + lane % 4u * 2u,
        rows - first_row > 8u,
    );
    if (!share.both) {
        // The rows of the tile that no input is written to: the first barrier of a subgroup orders this before their reads.
        for (var i = lane; i < 8u * ROW_VECS; i += LANES) {
            x_tile[subgroup * X_VECS + 8u * ROW_VECS + i] = vec4<f16>();
        }
    }

    let pairs = (params.chunks + 1u) / 2u;
    let steps = (pairs + SUBGROUPS - 1u) / SUBGROUPS;
    var c0 = coop_mat16x16<f32,C>();
    var c1 = coop_mat16x16<f32,C>();
    var even = load_piece(share, 2u * subgroup);
    var odd = load_piece(share, 2u * subgroup + 1u);
    for (var i = 0u; i < steps; i++) {
        let next = 2u * (subgroup + (i + 1u) * SUBGROUPS);
        write_piece(subgroup, lane, share.both, even);
        even = load_piece(share, next);
        multiply(subgroup, &c0, &c1);
        write_piece(subgroup, lane, share.both, odd);
        odd = load_piece(share, next + 1u);
        multiply(subgroup, &c0, &c1);
    }

    // Accumulators have no addressable elements: they pass through workgroup memory, one of each subgroup at a time.
    coopStoreT(c0, &sums[subgroup * PIECE], 16u);
    workgroupBarrier();
    store(local_index, first_row, rows, n_start);
    workgroupBarrier();
    coopStoreT(c1, &sums[subgroup * PIECE], 16u);
    workgroupBarrier();
    store(local_index, first_row, rows, n_start + 16u);
}
