// Axis kv = f16: four elements of the cache are a vector.

alias KvQuad = vec4<f16>;

// Places of quad `quad` of row `row`, of `rows` with `quads` each, and of nothing else.
fn kv_quad_place(row: u32, quad: u32, quads: u32, rows: u32) -> vec3<u32> {
    let at = row * quads + quad;
    return vec3<u32>(at, at, 0u);
}

// The quad that lies there.
fn kv_quad(quad: KvQuad, scales: KvQuad, pick: u32) -> vec4<f16> {
    return quad;
}
