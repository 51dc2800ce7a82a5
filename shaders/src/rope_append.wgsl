// Rotates q in place and writes rotated k and plain v of the step's tokens to the KV cache, which begins at position
// `prefix`. Pairs of a head are (i, i + rotary_dim / 2): (a, b) becomes (a cos - b sin, b cos + a sin) with the table's
// row of the position.
//
// Mapping: see prelude/rope_append_pairs.wgsl, or rope_append_groups.wgsl for a cache of 8 bits; grid z numbers rows.
// Traffic: every element of the row once or twice.

struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    rotary_dim: u32,
    qkv_stride: u32,
    context: u32,
    prefix: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read_write> qkv: array<f32>;        // (n_tokens, qkv_stride)
@group(0) @binding(3) var<storage, read> rope: array<vec2<f32>>;       // (context, rotary_dim / 2): cos, sin
@group(0) @binding(4) var<storage, read_write> k_cache: array<u32>;    // (context - prefix, kv_heads, head_dim)
@group(0) @binding(5) var<storage, read_write> v_cache: array<u32>;    // (context - prefix, kv_heads, head_dim)

// The token of row `z`.
fn place_of(z: u32) -> Place {
    let position = step.position + z;
    return Place(z, position, position, params.context, params.prefix, z < step.n_tokens);
}

// Stores a word of the cache.
fn put_key(z: u32, at: u32, word: u32) {
    k_cache[at] = word;
}

fn put_value(z: u32, at: u32, word: u32) {
    v_cache[at] = word;
}
