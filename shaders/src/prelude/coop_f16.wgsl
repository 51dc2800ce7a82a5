// Axis kv = f16: what an invocation of attention_coop.wgsl fetches of the cache at once.

alias KvWords = vec4<f16>;
alias Fetched = vec4<f16>;

const FETCH_VECS: u32 = 1u;

// Where piece `index` of the rows of a head lies, of `per_row` a row, the first of which is row `row` of the cache.
fn piece_at(row: u32, index: u32, per_row: u32) -> u32 {
    return row * per_row + index / per_row * (kv_step(params.kv_heads) * per_row) + index % per_row;
}

fn fetch_key(row: u32, index: u32, per_row: u32) -> Fetched {
    return k_cache[piece_at(row, index, per_row)];
}

fn fetch_value(row: u32, index: u32, per_row: u32) -> Fetched {
    return v_cache[piece_at(row, index, per_row)];
}

// vec4 `v` of it.
fn fetched(piece: Fetched, v: u32, index: u32, per_row: u32) -> vec4<f16> {
    return piece;
}
