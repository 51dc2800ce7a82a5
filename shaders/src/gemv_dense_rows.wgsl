// As gemv_dense.wgsl for several rows t at once: out[t, n] = sum_k x[t, k] * w[n, k] (+ bias[n]) (+ out[t, n]), w dense.
//
// Mapping: a workgroup computes WIDTH outputs of ROWS rows t; SLICES neighbours share K in chunks of one vec4 of words an
// output, and an invocation has OUTPUTS outputs of every row, so that few inputs serve a whole subgroup. Grid x, y number
// blocks of rows within blocks of outputs, so that the former find weights in the cache.
// Traffic: every weight once, x once a workgroup (from cache after the first).

struct Params {
    n: u32,
    k: u32,
    row_words: u32,
    x_stride: u32,
    out_stride: u32,
    out_offset: u32,
    bias_offset: u32,
    flags: u32,
    row_mode: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;             // (rows, x_stride / 4)
@group(0) @binding(3) var<storage, read> weight: array<vec4<u32>>;        // (n, row_words / 4)
@group(0) @binding(4) var<storage, read> bias: array<f32>;                // (bias_offset + n)
@group(0) @binding(5) var<storage, read_write> out: array<f32>;           // (rows, out_stride)

// Invocations that share an output, and outputs that an invocation has, SLOTS apart.
const SLICES: u32 = 4u;
const SLOTS: u32 = WG / SLICES;
const OUTPUTS: u32 = 2u;
const WIDTH: u32 = OUTPUTS * SLOTS;

// By half of the rows and invocation: sums of four rows and both outputs.
var<workgroup> partial: array<vec4<f32>, 2u * WG>;

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local_index: u32,
) {
    let rows = row_count(params.row_mode);
    let blocks = (rows + ROWS - 1u) / ROWS;
    let block = group.x + group.y * groups.x;
    let n_start = block / max(blocks, 1u) * WIDTH;
    if (n_start >= params.n || rows == 0u) {
        return;
    }
    let first_row = block % blocks * ROWS;
    // Outputs beyond N repeat the last one and are not stored, and so do rows.
    let slot = local_index / SLICES;
    let n = min(n_start + vec2<u32>(slot, slot + SLOTS), vec2<u32>(params.n - 1u));
    let chunks = params.row_words / 4u;
    let weight_start = n * chunks;
    var x_start: array<u32, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        let row = min(first_row + r, rows - 1u);
        x_start[r] = (row + input_row(params.row_mode, 0u)) * (params.x_stride / 4u);
    }

    // By row, an output a component.
    var sums: array<vec2<f32>, ROWS>;
    let slice = local_index % SLICES;
    let last = chunks - 1u;
    // Of this chunk and the next one.
    var w0 = weight[weight_start.x + min(slice, last)];
    var w1 = weight[weight_start.y + min(slice, last)];
    for (var chunk = slice; chunk < chunks; chunk += SLICES) {
        let next = min(chunk + SLICES, last);
        let next0 = weight[weight_start.x + next];
        let next1 = weight[weight_start.y + next];
        for (var r = 0u; r < ROWS; r++) {
            let lo = inputs4(x_start[r], chunk * DENSE_PER_WORD);
            let hi = inputs4(x_start[r], chunk * DENSE_PER_WORD + DENSE_PER_WORD - 1u);
            sums[r] += vec2<f32>(words_dot(w0, lo, hi), words_dot(w1, lo, hi));
        }
        w0 = next0;
        w1 = next1;
    }

    // Half of the rows at a time.
    for (var first = 0u; first < ROWS; first += ROWS / 2u) {
        // Orders the reads of the half before.
        workgroupBarrier();
        for (var o = 0u; o < OUTPUTS; o++) {
            partial[o * WG + local_index] = vec4<f32>(
                sums[first][o],
                sums[first + 1u][o],
                sums[first + 2u][o],
                sums[first + 3u][o],
            );
        }
        // Orders the sums before their reads.
        workgroupBarrier();
        if (local_index < WIDTH && n_start + local_index < params.n) {
            let at = local_index * SLICES;
            let total = (partial[at] + partial[at + 1u]) + (partial[at + 2u] + partial[at + 3u]);
            let column = n_start + local_index;
            for (var r = 0u; r < ROWS / 2u; r++) {
                let row = first_row + first + r;
                if (row < rows) {
                    let index = row * params.out_stride + params.out_offset + column;
                    var value = total[r];
                    if ((params.flags & FLAG_BIAS) != 0u) {
                        value += bias[params.bias_offset + column];
                    }
                    if ((params.flags & FLAG_ACCUMULATE) != 0u) {
                        value += out[index];
                    }
                    out[index] = value;
                }
            }
        }
    }
}
