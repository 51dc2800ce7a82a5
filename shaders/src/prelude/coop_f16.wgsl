// Axis kv = f16: what an invocation of attention_coop.wgsl fetches of the cache at once.

alias KvWords = vec4<f16>;
alias Fetched = vec4<f16>;

const FETCH_VECS: u32 = 1u;

// Piece `index` of the rows from `row` on, which have `per_row`.
fn fetch_key(row: u32, index: u32, per_row: u32) -> Fetched {
    return k_cache[row * per_row + index];
}

fn fetch_value(row: u32, index: u32, per_row: u32) -> Fetched {
    return v_cache[row * per_row + index];
}

// vec4 `v` of it.
fn fetched(piece: Fetched, v: u32, index: u32, per_row: u32) -> vec4<f16> {
    return piece;
}
