// Rotates q in place and writes rotated k and plain v of the step's tokens to the KV cache, which begins at position
// `prefix`. Pairs of a head are (i, i + rotary_dim / 2): (a, b) becomes (a cos - b sin, b cos + a sin) with the table's
// row of the position.
//
// Mapping: an invocation handles one pair of q, or the elements 2i, 2i + 1 of k or v; grid x numbers blocks of WG over
// all heads of a row, z rows. Traffic: every element of the row once or twice.

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
@group(0) @binding(4) var<storage, read_write> k_cache: array<u32>;    // (kv_heads, context - prefix, head_dim)
@group(0) @binding(5) var<storage, read_write> v_cache: array<u32>;    // (kv_heads, context - prefix, head_dim)

// Element `i` of the rotated head that starts at `start`.
fn rotated(start: u32, i: u32, rope_start: u32) -> f32 {
    let half = params.rotary_dim / 2u;
    if (i >= params.rotary_dim) {
        return qkv[start + i];
    }
    if (i < half) {
        let turn = rope[rope_start + i];
        return qkv[start + i] * turn.x - qkv[start + i + half] * turn.y;
    }
    let turn = rope[rope_start + i - half];
    return qkv[start + i] * turn.x + qkv[start + i - half] * turn.y;
}

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let pairs = params.head_dim / 2u;
    let head = id.x / pairs;
    let pair = id.x % pairs;
    let token = id.z;
    let position = step.position + token;
    if (head >= params.heads + 2u * params.kv_heads || token >= step.n_tokens || position >= params.context) {
        return;
    }
    let start = token * params.qkv_stride + head * params.head_dim;
    let half = params.rotary_dim / 2u;
    let rope_start = position * half;

    if (head < params.heads) {
        if (pair < half) {
            let turn = rope[rope_start + pair];
            let a = qkv[start + pair];
            let b = qkv[start + pair + half];
            qkv[start + pair] = a * turn.x - b * turn.y;
            qkv[start + pair + half] = b * turn.x + a * turn.y;
        }
        return;
    }

    let kv_head = (head - params.heads) % params.kv_heads;
    let line = kv_head * (params.context - params.prefix) + position - params.prefix;
    let word = (line * pairs + pair) * KV_PAIR_WORDS;
    if (head < params.heads + params.kv_heads) {
        let i = 2u * pair;
        let words = kv_pack(vec2<f32>(rotated(start, i, rope_start), rotated(start, i + 1u, rope_start)));
        k_cache[word] = words.x;
        k_cache[word + KV_PAIR_WORDS - 1u] = words[KV_PAIR_WORDS - 1u];
    } else {
        let words = kv_pack(vec2<f32>(qkv[start + 2u * pair], qkv[start + 2u * pair + 1u]));
        v_cache[word] = words.x;
        v_cache[word + KV_PAIR_WORDS - 1u] = words[KV_PAIR_WORDS - 1u];
    }
}
