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
// By session: (kv_heads, context - prefix, head_dim).
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

// First and last word of a pair of elements, of session `z`.
fn put_key(z: u32, word: u32, words: vec2<u32>) {
    let last = KV_PAIR_WORDS - 1u;
    switch z {
        case 0u: {
            k0[word] = words.x;
            k0[word + last] = words[last];
        }
        case 1u: {
            k1[word] = words.x;
            k1[word + last] = words[last];
        }
        case 2u: {
            k2[word] = words.x;
            k2[word + last] = words[last];
        }
        case 3u: {
            k3[word] = words.x;
            k3[word + last] = words[last];
        }
        case 4u: {
            k4[word] = words.x;
            k4[word + last] = words[last];
        }
        case 5u: {
            k5[word] = words.x;
            k5[word + last] = words[last];
        }
        case 6u: {
            k6[word] = words.x;
            k6[word + last] = words[last];
        }
        default: {
            k7[word] = words.x;
            k7[word + last] = words[last];
        }
    }
}

fn put_value(z: u32, word: u32, words: vec2<u32>) {
    let last = KV_PAIR_WORDS - 1u;
    switch z {
        case 0u: {
            v0[word] = words.x;
            v0[word + last] = words[last];
        }
        case 1u: {
            v1[word] = words.x;
            v1[word + last] = words[last];
        }
        case 2u: {
            v2[word] = words.x;
            v2[word + last] = words[last];
        }
        case 3u: {
            v3[word] = words.x;
            v3[word + last] = words[last];
        }
        case 4u: {
            v4[word] = words.x;
            v4[word + last] = words[last];
        }
        case 5u: {
            v5[word] = words.x;
            v5[word + last] = words[last];
        }
        case 6u: {
            v6[word] = words.x;
            v6[word + last] = words[last];
        }
        default: {
            v7[word] = words.x;
            v7[word + last] = words[last];
        }
    }
}
