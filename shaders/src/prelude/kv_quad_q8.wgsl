// Axis kv = q8: four elements of the cache are a word, see kv_q8.wgsl.

alias KvQuad = u32;

// Places of quad `quad` of row `row`, of `rows` with `quads` each: of its word, of the word of its scale, and which scale
// it is in that.
fn kv_quad_place(row: u32, quad: u32, quads: u32, rows: u32) -> vec3<u32> {
    return vec3<u32>(row * quads + quad, rows * quads + row * ((quads + 15u) / 16u) + quad / 16u, quad / 8u % 2u);
}

// The quad that lies there, rounded to half precision.
fn kv_quad(quad: KvQuad, scales: KvQuad, pick: u32) -> vec4<f16> {
    return vec4<f16>(vec4<f32>(unpack4xI8(quad)) * unpack2x16float(scales)[pick]);
}
