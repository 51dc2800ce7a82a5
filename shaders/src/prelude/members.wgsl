// The members of a pass: one token each of up to MEMBERS sessions, which have caches of their own and may share the first
// positions. Sessions are rows params.first_row.. of qkv. The bindings of attention_each.wgsl and
// attention_subgroup_each.wgsl from 2 to 23.

@group(0) @binding(2) var<storage, read> places: array<vec4<u32>>;           // (rows): position, context, prefix
@group(0) @binding(3) var<storage, read> qkv: array<vec4<f32>>;              // (rows, qkv_stride / 4), q first
@group(0) @binding(4) var<storage, read_write> partial_out: array<f32>;      // (rows, heads, splits_max, head_dim)
@group(0) @binding(5) var<storage, read_write> partial_ml: array<vec2<f32>>; // (rows, heads, splits_max): m, l
@group(0) @binding(6) var<storage, read> k_prefix: array<KvWords>;           // (prefix, kv_heads, head_dim)
@group(0) @binding(7) var<storage, read> v_prefix: array<KvWords>;           // (prefix, kv_heads, head_dim)
// By session: (context - prefix, kv_heads, head_dim).
@group(0) @binding(8) var<storage, read> k0: array<KvWords>;
@group(0) @binding(9) var<storage, read> v0: array<KvWords>;
@group(0) @binding(10) var<storage, read> k1: array<KvWords>;
@group(0) @binding(11) var<storage, read> v1: array<KvWords>;
@group(0) @binding(12) var<storage, read> k2: array<KvWords>;
@group(0) @binding(13) var<storage, read> v2: array<KvWords>;
@group(0) @binding(14) var<storage, read> k3: array<KvWords>;
@group(0) @binding(15) var<storage, read> v3: array<KvWords>;
@group(0) @binding(16) var<storage, read> k4: array<KvWords>;
@group(0) @binding(17) var<storage, read> v4: array<KvWords>;
@group(0) @binding(18) var<storage, read> k5: array<KvWords>;
@group(0) @binding(19) var<storage, read> v5: array<KvWords>;
@group(0) @binding(20) var<storage, read> k6: array<KvWords>;
@group(0) @binding(21) var<storage, read> v6: array<KvWords>;
@group(0) @binding(22) var<storage, read> k7: array<KvWords>;
@group(0) @binding(23) var<storage, read> v7: array<KvWords>;

// The token of session `z`.
fn place_of(z: u32) -> Place {
    let row = params.first_row + z;
    let place = places[row];
    return Place(row, place.x, place.y, place.z, z < MEMBERS);
}
