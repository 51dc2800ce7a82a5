// As rope_append.wgsl, for one token each of up to MEMBERS sessions with caches of their own: rotates q in place and writes
// rotated k and plain v to the sessions' caches. Sessions are rows first_row.. of qkv, and of the rotary table, which holds
// the rows of their positions.
//
// Mapping: as in rope_append.wgsl; grid z numbers sessions. Traffic: every element of the row once or twice.

struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    rotary_dim: u32,
    qkv_stride: u32,
    first_row: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> places: array<vec4<u32>>;     // (rows): position, context, prefix
@group(0) @binding(3) var<storage, read_write> qkv: array<f32>;        // (rows, qkv_stride)
@group(0) @binding(4) var<storage, read> rope: array<vec2<f32>>;       // (rows, rotary_dim / 2): cos, sin
// By session: (context - prefix, kv_heads, head_dim).
@group(0) @binding(5) var<storage, read_write> k0: array<u32>;
@group(0) @binding(6) var<storage, read_write> v0: array<u32>;
@group(0) @binding(7) var<storage, read_write> k1: array<u32>;
@group(0) @binding(8) var<storage, read_write> v1: array<u32>;
@group(0) @binding(9) var<storage, read_write> k2: array<u32>;
@group(0) @binding(10) var<storage, read_write> v2: array<u32>;
@group(0) @binding(11) var<storage, read_write> k3: array<u32>;
@group(0) @binding(12) var<storage, read_write> v3: array<u32>;
@group(0) @binding(13) var<storage, read_write> k4: array<u32>;
@group(0) @binding(14) var<storage, read_write> v4: array<u32>;
@group(0) @binding(15) var<storage, read_write> k5: array<u32>;
@group(0) @binding(16) var<storage, read_write> v5: array<u32>;
@group(0) @binding(17) var<storage, read_write> k6: array<u32>;
@group(0) @binding(18) var<storage, read_write> v6: array<u32>;
@group(0) @binding(19) var<storage, read_write> k7: array<u32>;
@group(0) @binding(20) var<storage, read_write> v7: array<u32>;

// The token of session `z`.
fn place_of(z: u32) -> Place {
    let row = params.first_row + z;
    let place = places[row];
    return Place(row, place.x, row, place.y, place.z, z < MEMBERS);
}

// Stores a word of the cache of session `z`.
fn put_key(z: u32, at: u32, word: u32) {
    switch z {
        case 0u: { k0[at] = word; }
        case 1u: { k1[at] = word; }
        case 2u: { k2[at] = word; }
        case 3u: { k3[at] = word; }
        case 4u: { k4[at] = word; }
        case 5u: { k5[at] = word; }
        case 6u: { k6[at] = word; }
        default: { k7[at] = word; }
    }
}

fn put_value(z: u32, at: u32, word: u32) {
    switch z {
        case 0u: { v0[at] = word; }
        case 1u: { v1[at] = word; }
        case 2u: { v2[at] = word; }
        case 3u: { v3[at] = word; }
        case 4u: { v4[at] = word; }
        case 5u: { v5[at] = word; }
        case 6u: { v6[at] = word; }
        default: { v7[at] = word; }
    }
}
