// Rows of a tiled product over pairs (token * top_k + i) of tokens and experts, in the order that group.wgsl gives them;
// the body has its outputs, pairs and tiles, as bindings.

// First vec4 of the input of pair `row`.
fn x_row(row: u32) -> u32 {
    let pair = pairs[row];
    return select(pair, pair / params.top_k, params.shared_input != 0u) * params.x_stride / 4u;
}

// First element of the output of pair `row`.
fn out_row(row: u32) -> u32 {
    return pairs[row] * params.out_stride + params.out_offset;
}

// Computes tile `n_tile` of the outputs for tile `tile_index` of the pairs, if this part has its expert.
fn expert_tile(n_tile: u32, tile_index: u32, local_index: u32) {
    let tile = tiles[tile_index];
    // Numbers below first_expert wrap to large ones.
    let expert = tile.x - params.first_expert;
    if (n_tile * TILE >= params.n || tile.z == 0u || expert >= params.experts) {
        return;
    }
    gemm_tile(n_tile, expert * params.expert_rows, tile.y, tile.y + tile.z, local_index);
}
