// The step uniform and the mapping of rows, twin of `RowMode`.

struct Step {
    n_tokens: u32,
    position: u32,
    logits_start: u32,
    logits_rows: u32,
}
@group(0) @binding(1) var<uniform> step: Step;

const ROWS_ALL: u32 = 0u;
const ROWS_LOGITS: u32 = 1u;

// Rows that a kernel with this mode works on.
fn row_count(mode: u32) -> u32 {
    return select(step.logits_rows, step.n_tokens, mode == ROWS_ALL);
}

// Input row of output row `row`.
fn input_row(mode: u32, row: u32) -> u32 {
    return row + select(0u, step.logits_start, mode == ROWS_LOGITS);
}
