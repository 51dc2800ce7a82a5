// Axis kv = q8: what an invocation of attention_coop.wgsl fetches of the cache at once: eight codes, and the word that has
// their scale, see kv_q8.wgsl.

alias KvWords = vec2<u32>;

struct Fetched {
    codes: KvWords,
    scales: u32,
}

const FETCH_VECS: u32 = 2u;

// The word with the scale of piece `index` of the rows of a head from `row` on, which have `per_row`.
fn scale_word(row: u32, index: u32, per_row: u32) -> u32 {
    let words = kv_scale_words(params.head_dim);
    let start = params.kv_heads * params.context * params.head_dim / 4u;
    return start + (row + index / per_row) * words + index % per_row * 8u / KV_GROUP % words;
}

fn fetch_key(row: u32, index: u32, per_row: u32) -> Fetched {
    let word = scale_word(row, index, per_row);
    return Fetched(k_cache[row * per_row + index], k_cache[word / 2u][word % 2u]);
}

fn fetch_value(row: u32, index: u32, per_row: u32) -> Fetched {
    let word = scale_word(row, index, per_row);
    return Fetched(v_cache[row * per_row + index], v_cache[word / 2u][word % 2u]);
}

// vec4 `v` of it, rounded to half precision.
fn fetched(piece: Fetched, v: u32, index: u32, per_row: u32) -> vec4<f16> {
    let is_high = index % per_row * 8u / KV_GROUP >= kv_scale_words(params.head_dim);
    let scale = unpack2x16float(piece.scales)[u32(is_high)];
    return vec4<f16>(vec4<f32>(unpack4xI8(piece.codes[v])) * scale);
}
