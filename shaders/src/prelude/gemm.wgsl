// The tiled product of the gemm kernels. The body defines `params` and the bindings x, bias, out; preludes define
// `weights8`, `x_row` and `out_row`.
//
// A workgroup computes TILE tokens by TILE outputs, 4 by 4 an invocation, over steps of K_STEP inputs held in
// workgroup memory with the inputs outermost, so that one vec4 is four tokens or four outputs of the same input.

const QUADS: u32 = TILE / 4u;
var<workgroup> x_tile: array<vec4<f32>, K_STEP * QUADS>;
var<workgroup> w_tile: array<vec4<Elem>, K_STEP * QUADS>;

// Four inputs from column `column` (a multiple of 4) of the row starting at vec4 `row_start`; zero from K on.
fn inputs4(row_start: u32, column: u32, row_is_valid: bool) -> vec4<f32> {
    if (!row_is_valid || column >= params.k) {
        return vec4<f32>(0.0);
    }
    let columns = vec4<u32>(column, column + 1u, column + 2u, column + 3u);
    return select(vec4<f32>(0.0), x[row_start + column / 4u], columns < vec4<u32>(params.k));
}

// Computes outputs from n_tile * TILE on of the rows token_start..rows, at most TILE; weights begin at row weight_start.
fn gemm_tile(n_tile: u32, weight_start: u32, token_start: u32, rows: u32, local_index: u32) {
    let n_start = n_tile * TILE;

    // Loading: invocation = (row of the tile, part), a part is eight inputs.
    let load_row = local_index % TILE;
    let load_part = local_index / TILE;
    let load_token = token_start + load_row;
    let token_is_valid = load_token < rows;
    let x_start = x_row(min(load_token, rows - 1u));
    let n_is_valid = n_start + load_row < params.n;
    let slot = load_part * 8u * QUADS + load_row / 4u;
    let lane = load_row % 4u;

    // Computing: invocation = (quad of tokens, quad of outputs).
    let n_quad = local_index % QUADS;
    let token_quad = local_index / QUADS;
    var acc0 = vec4<f32>(0.0);
    var acc1 = vec4<f32>(0.0);
    var acc2 = vec4<f32>(0.0);
    var acc3 = vec4<f32>(0.0);

    for (var k_start = 0u; k_start < params.k; k_start += K_STEP) {
        let k = k_start + load_part * 8u;
        let x_lo = inputs4(x_start, k, token_is_valid);
        let x_hi = inputs4(x_start, k + 4u, token_is_valid);
        var w = Weights8(vec4<f32>(0.0), vec4<f32>(0.0));
        if (n_is_valid && k < params.k) {
            w = weights8(weight_start + n_start + load_row, k);
        }
        for (var i = 0u; i < 4u; i++) {
            x_tile[slot + i * QUADS][lane] = x_lo[i];
            x_tile[slot + (i + 4u) * QUADS][lane] = x_hi[i];
            w_tile[slot + i * QUADS][lane] = Elem(w.lo[i]);
            w_tile[slot + (i + 4u) * QUADS][lane] = Elem(w.hi[i]);
        }
        // Orders the tiles' writes before their reads.
        workgroupBarrier();
        for (var i = 0u; i < K_STEP; i++) {
            let xs = x_tile[i * QUADS + token_quad];
            let ws = vec4<f32>(w_tile[i * QUADS + n_quad]);
            acc0 = fma(vec4<f32>(xs.x), ws, acc0);
            acc1 = fma(vec4<f32>(xs.y), ws, acc1);
            acc2 = fma(vec4<f32>(xs.z), ws, acc2);
            acc3 = fma(vec4<f32>(xs.w), ws, acc3);
        }
        // Orders these reads before the writes of the next step.
        workgroupBarrier();
    }

    let n = n_start + n_quad * 4u;
    let token = token_start + token_quad * 4u;
    store4(token, rows, n, acc0);
    store4(token + 1u, rows, n, acc1);
    store4(token + 2u, rows, n, acc2);
    store4(token + 3u, rows, n, acc3);
}

fn store4(token: u32, rows: u32, n: u32, values: vec4<f32>) {
    if (token >= rows) {
        return;
    }
    let start = out_row(token) + n;
    for (var i = 0u; i < 4u && n + i < params.n; i++) {
        let index = start + i;
        var value = values[i];
        if ((params.flags & FLAG_BIAS) != 0u) {
            value += bias[params.bias_offset + n + i];
        }
        if ((params.flags & FLAG_ACCUMULATE) != 0u) {
            value += out[index];
        }
        out[index] = value;
    }
}
