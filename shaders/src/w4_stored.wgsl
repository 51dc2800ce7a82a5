// Packed matrices from the layout of AutoAWQ's `gemm` files to that of prelude/w4.wgsl, some inputs of all outputs at a
// time: a word of these files has eight outputs for one input, nibble i that of output [0, 2, 4, 6, 1, 3, 5, 7][i].
//
// Mapping: an invocation makes a vec4 of codes, or the parameters of one output and group; grid x numbers blocks of WG
// outputs, z chunks of 32 inputs or groups.
// Traffic: everything once; eight neighbouring invocations read the same words.

struct Params {
    n: u32,          // outputs of what is stored, a multiple of 8
    inputs: u32,     // inputs in `stored`
    skip: u32,       // outputs in front of those that are wanted, a multiple of TILE_N
    rows: u32,       // outputs that are wanted
    first_row: u32,  // the first one's in the matrix, a multiple of TILE_N
    first: u32,      // first chunk or group
    per_row: u32,    // chunks or groups of a row of the matrix
    scales: u32,     // where scales begin in `stored`, words; 0 for codes
    zeros: u32,      // where zero points begin, words
}
@group(0) @binding(0) var<uniform> params: Params;
// (inputs, n / 8) codes, (groups, n / 2) pairs of half precision scales, (groups, n / 8) zero points
@group(0) @binding(2) var<storage, read> stored: array<u32>;
@group(0) @binding(3) var<storage, read_write> codes: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read_write> group_params: array<u32>;

// Where the nibble of output `n` lies in its words.
fn shift_of(n: u32) -> u32 {
    return 4u * (n % 8u / 2u + n % 2u * 4u);
}

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x >= params.rows) {
        return;
    }
    let n = params.skip + id.x;
    let row = params.first_row + id.x;
    let columns = params.n / 8u;
    let shift = shift_of(n);
    if (params.scales == 0u) {
        var words: vec4<u32>;
        for (var w = 0u; w < 4u; w++) {
            var word = 0u;
            for (var t = 0u; t < 8u; t++) {
                let input = id.z * 32u + w * 8u + t;
                if (input < params.inputs) {
                    word |= (stored[input * columns + n / 8u] >> shift & 15u) << (4u * t);
                }
            }
            words[w] = word;
        }
        codes[chunk_index(row, params.first + id.z, params.per_row)] = words;
    } else {
        let pair = stored[params.scales + (id.z * params.n + n) / 2u];
        let zero = stored[params.zeros + id.z * columns + n / 8u] >> shift & 15u;
        let scale = pair >> (16u * (n % 2u)) & 0xffffu;
        let offset = pack2x16float(vec2<f32>(f32(zero), 0.0)) << 16u;
        group_params[group_index(row, params.first + id.z, params.per_row)] = scale | offset;
    }
}
