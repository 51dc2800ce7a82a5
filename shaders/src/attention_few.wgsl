// As attention.wgsl, for few tokens and heads of whole eights: unnormalised output, largest score m and sum l of
// exp(score - m) of one split for the query heads of one kv head.
//
// Mapping: a workgroup = (kv head and HEADS of its query heads, split, row) on grid x, y, z. LANES = head_dim / 8
// invocations share a position, eight elements each, so that WG / LANES positions are read at once and PASSES times that
// many before anyone waits; a vec4 holds the HEADS query heads.
// Traffic: the split's keys and values once for HEADS query heads. Online softmax in f32 over tiles of positions.

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
    prefix: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> qkv: array<vec4<f32>>;              // (n_tokens, qkv_stride / 4), q first
@group(0) @binding(3) var<storage, read> k_cache: array<KvWords>;            // (context - prefix, kv_heads, head_dim)
@group(0) @binding(4) var<storage, read> v_cache: array<KvWords>;            // (context - prefix, kv_heads, head_dim)
@group(0) @binding(5) var<storage, read_write> partial_out: array<f32>;      // (n_tokens, heads, splits_max, head_dim)
@group(0) @binding(6) var<storage, read_write> partial_ml: array<vec2<f32>>; // (n_tokens, heads, splits_max): m, l
@group(0) @binding(7) var<storage, read> k_prefix: array<KvWords>;           // (prefix, kv_heads, head_dim)
@group(0) @binding(8) var<storage, read> v_prefix: array<KvWords>;           // (prefix, kv_heads, head_dim)

// The token of row `z`.
fn place_of(z: u32) -> Place {
    return Place(z, step.position + z, params.context, params.prefix, z < step.n_tokens);
}

// Four keys and four values, in the shared part or the session's own.
fn four_keys(z: u32, at: vec4<u32>, is_shared: bool) -> Four {
    if (is_shared) {
        return Four(k_prefix[at.x], k_prefix[at.y], k_prefix[at.z], k_prefix[at.w]);
    }
    return Four(k_cache[at.x], k_cache[at.y], k_cache[at.z], k_cache[at.w]);
}

fn four_values(z: u32, at: vec4<u32>, is_shared: bool) -> Four {
    if (is_shared) {
        return Four(v_prefix[at.x], v_prefix[at.y], v_prefix[at.z], v_prefix[at.w]);
    }
    return Four(v_cache[at.x], v_cache[at.y], v_cache[at.z], v_cache[at.w]);
}
