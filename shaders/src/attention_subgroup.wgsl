// As attention.wgsl, for few tokens, and heads whose eights of elements fit a subgroup: unnormalised output, largest score
// m and sum l of exp(score - m) of one split for the query heads of one kv head. Where a token has one split only, the
// result is whole: it goes to `out`, divided by l, and with FLAG_STAGE is staged (prelude/stage.wgsl), too.
//
// Mapping: a workgroup = (kv head and HEADS of its query heads, split, row) on grid x, y, z. Lanes share a position, eight
// elements or sixteen codes each (lane_eight.wgsl, lane_sixteen.wgsl), and add up their parts of a score by shuffles, so
// that no invocation waits for another before the very end (sweep_wide.wgsl, sweep_q8.wgsl; attention_lanes.wgsl is the body).
// Traffic: the split's keys and values once for HEADS query heads.
// Online softmax in f32.

struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    qkv_stride: u32,
    context: u32,
    scale: f32,
    window: u32,
    splits_max: u32,
    split_len: u32,
    cap: f32,
    out_stride: u32,
    flags: u32,
    stage_quads: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> qkv: array<vec4<f32>>;              // (n_tokens, qkv_stride / 4), q first
@group(0) @binding(3) var<storage, read> k_cache: array<KvWords>;            // (context, kv_heads, head_dim)
@group(0) @binding(4) var<storage, read> v_cache: array<KvWords>;            // (context, kv_heads, head_dim)
@group(0) @binding(5) var<storage, read_write> partial_out: array<f32>;      // (n_tokens, heads, splits_max, head_dim)
@group(0) @binding(6) var<storage, read_write> partial_ml: array<vec2<f32>>; // (n_tokens, heads, splits_max): m, l
@group(0) @binding(7) var<storage, read_write> out: array<f32>;              // (n_tokens, out_stride)
@group(0) @binding(8) var<storage, read_write> staged: array<vec4<u32>>;     // (n_tokens) of staged inputs

// Parts of the cache are numbered by token; there is no shared one.
const SHARED: u32 = 0xffffffffu;

fn place_of(z: u32) -> Place {
    return Place(z, step.position + z, params.context, 0u, z < step.n_tokens);
}

fn key_words(part: u32, at: u32) -> KvWords {
    return k_cache[at];
}

fn value_words(part: u32, at: u32) -> KvWords {
    return v_cache[at];
}
