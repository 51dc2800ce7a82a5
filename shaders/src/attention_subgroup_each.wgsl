// As attention_subgroup.wgsl, for one token each of up to MEMBERS sessions, which have caches of their own and may share the
// first positions. Sessions are rows first_row.. of qkv.
//
// Mapping: as in attention_subgroup.wgsl; grid z numbers sessions.
// Traffic: the split's keys and values once for HEADS query heads. Online softmax in f32.

struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    qkv_stride: u32,
    first_row: u32,
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
@group(0) @binding(24) var<storage, read_write> out: array<f32>;             // (rows, out_stride)
@group(0) @binding(25) var<storage, read_write> staged: array<vec4<u32>>;    // (rows) of staged inputs

// The number of the part that sessions share.
const SHARED: u32 = 0xffffffffu;

// Keys at `at` of session `part`, or of the shared part.
fn key_words(part: u32, at: u32) -> KvWords {
    switch part {
        case 0u: { return k0[at]; }
        case 1u: { return k1[at]; }
        case 2u: { return k2[at]; }
        case 3u: { return k3[at]; }
        case 4u: { return k4[at]; }
        case 5u: { return k5[at]; }
        case 6u: { return k6[at]; }
        case SHARED: { return k_prefix[at]; }
        default: { return k7[at]; }
    }
}

// Values at `at` of session `part`, or of the shared part.
fn value_words(part: u32, at: u32) -> KvWords {
    switch part {
        case 0u: { return v0[at]; }
        case 1u: { return v1[at]; }
        case 2u: { return v2[at]; }
        case 3u: { return v3[at]; }
        case 4u: { return v4[at]; }
        case 5u: { return v5[at]; }
        case 6u: { return v6[at]; }
        case SHARED: { return v_prefix[at]; }
        default: { return v7[at]; }
    }
}
