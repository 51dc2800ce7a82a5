// Rows of a tiled product over the rows of the step.

// First vec4 of the input of row `row`.
fn x_row(row: u32) -> u32 {
    return input_row(params.row_mode, row) * params.x_stride / 4u;
}

// First element of the output of row `row`.
fn out_row(row: u32) -> u32 {
    return row * params.out_stride + params.out_offset;
}
