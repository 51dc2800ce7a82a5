// As attention_few.wgsl, for one token each of up to MEMBERS sessions, which have caches of their own and may share the
// first positions: unnormalised output, largest score m and sum l of exp(score - m) of one split for the query heads of
// one kv head. Sessions are rows first_row.. of qkv.
//
// Mapping: as in attention_few.wgsl; grid z numbers sessions.
// Traffic: the split's keys and values once for HEADS query heads. Online softmax in f32 over tiles of positions.

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
}
@group(0) @binding(0) var<uniform> params: Params;

// Four keys of session `z`, in the shared part or its own.
fn four_keys(z: u32, at: vec4<u32>, is_shared: bool) -> Four {
    if (is_shared) {
        return Four(k_prefix[at.x], k_prefix[at.y], k_prefix[at.z], k_prefix[at.w]);
    }
    switch z {
        case 0u: { return Four(k0[at.x], k0[at.y], k0[at.z], k0[at.w]); }
        case 1u: { return Four(k1[at.x], k1[at.y], k1[at.z], k1[at.w]); }
        case 2u: { return Four(k2[at.x], k2[at.y], k2[at.z], k2[at.w]); }
        case 3u: { return Four(k3[at.x], k3[at.y], k3[at.z], k3[at.w]); }
        case 4u: { return Four(k4[at.x], k4[at.y], k4[at.z], k4[at.w]); }
        case 5u: { return Four(k5[at.x], k5[at.y], k5[at.z], k5[at.w]); }
        case 6u: { return Four(k6[at.x], k6[at.y], k6[at.z], k6[at.w]); }
        default: { return Four(k7[at.x], k7[at.y], k7[at.z], k7[at.w]); }
    }
}

// Four values of session `z`, in the shared part or its own.
fn four_values(z: u32, at: vec4<u32>, is_shared: bool) -> Four {
    if (is_shared) {
        return Four(v_prefix[at.x], v_prefix[at.y], v_prefix[at.z], v_prefix[at.w]);
    }
    switch z {
        case 0u: { return Four(v0[at.x], v0[at.y], v0[at.z], v0[at.w]); }
        case 1u: { return Four(v1[at.x], v1[at.y], v1[at.z], v1[at.w]); }
        case 2u: { return Four(v2[at.x], v2[at.y], v2[at.z], v2[at.w]); }
        case 3u: { return Four(v3[at.x], v3[at.y], v3[at.z], v3[at.w]); }
        case 4u: { return Four(v4[at.x], v4[at.y], v4[at.z], v4[at.w]); }
        case 5u: { return Four(v5[at.x], v5[at.y], v5[at.z], v5[at.w]); }
        case 6u: { return Four(v6[at.x], v6[at.y], v6[at.z], v6[at.w]); }
        default: { return Four(v7[at.x], v7[at.y], v7[at.z], v7[at.w]); }
    }
}
