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
@group(0) @binding(2) var<storage, read> places: array<vec4<u32>>;           // (rows): position, context, prefix
@group(0) @binding(3) var<storage, read> qkv: array<vec4<f32>>;              // (rows, qkv_stride / 4), q first
@group(0) @binding(4) var<storage, read_write> partial_out: array<f32>;      // (rows, heads, splits_max, head_dim)
@group(0) @binding(5) var<storage, read_write> partial_ml: array<vec2<f32>>; // (rows, heads, splits_max): m, l
@group(0) @binding(6) var<storage, read_write> out: array<f32>;              // (rows, out_stride)
@group(0) @binding(7) var<storage, read_write> staged: array<vec4<u32>>;     // (rows) of staged inputs
@group(0) @binding(8) var<storage, read> k_prefix: array<KvWords>;           // (kv_heads, prefix, head_dim)
@group(0) @binding(9) var<storage, read> v_prefix: array<KvWords>;           // (kv_heads, prefix, head_dim)
// By session: (kv_heads, context - prefix, head_dim).
@group(0) @binding(10) var<storage, read> k0: array<KvWords>;
@group(0) @binding(11) var<storage, read> v0: array<KvWords>;
@group(0) @binding(12) var<storage, read> k1: array<KvWords>;
@group(0) @binding(13) var<storage, read> v1: array<KvWords>;
@group(0) @binding(14) var<storage, read> k2: array<KvWords>;
@group(0) @binding(15) var<storage, read> v2: array<KvWords>;
@group(0) @binding(16) var<storage, read> k3: array<KvWords>;
@group(0) @binding(17) var<storage, read> v3: array<KvWords>;
@group(0) @binding(18) var<storage, read> k4: array<KvWords>;
@group(0) @binding(19) var<storage, read> v4: array<KvWords>;
@group(0) @binding(20) var<storage, read> k5: array<KvWords>;
@group(0) @binding(21) var<storage, read> v5: array<KvWords>;
@group(0) @binding(22) var<storage, read> k6: array<KvWords>;
@group(0) @binding(23) var<storage, read> v6: array<KvWords>;
@group(0) @binding(24) var<storage, read> k7: array<KvWords>;
@group(0) @binding(25) var<storage, read> v7: array<KvWords>;

// The number of the part that sessions share.
const SHARED: u32 = 0xffffffffu;

// The token of session `z`.
fn place_of(z: u32) -> Place {
    let row = params.first_row + z;
    let place = places[row];
    return Place(row, place.x, place.y, place.z, z < MEMBERS);
}

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
