// What a lane of attention_lanes.wgsl has of a row: sixteen elements.

const LANE_VECS: u32 = 4u;

struct Part {
    a: vec4<f32>,
    b: vec4<f32>,
    c: vec4<f32>,
    d: vec4<f32>,
}

// The query's, from vec4 `at` on.
fn query_part(at: u32) -> Part {
    return Part(
        qkv[at] * params.scale,
        qkv[at + 1u] * params.scale,
        qkv[at + 2u] * params.scale,
        qkv[at + 3u] * params.scale,
    );
}

// To workgroup memory.
fn put_part(at: u32, part: Part) {
    parts[at] = part.a;
    parts[at + 1u] = part.b;
    parts[at + 2u] = part.c;
    parts[at + 3u] = part.d;
}

fn part_product(a: Part, b: Part) -> f32 {
    return dot(a.a, b.a) + dot(a.b, b.b) + dot(a.c, b.c) + dot(a.d, b.d);
}

fn part_plus(sum: Part, weight: f32, v: Part) -> Part {
    let w = vec4<f32>(weight);
    return Part(fma(w, v.a, sum.a), fma(w, v.b, sum.b), fma(w, v.c, sum.c), fma(w, v.d, sum.d));
}

fn part_scaled(part: Part, factor: f32) -> Part {
    return Part(part.a * factor, part.b * factor, part.c * factor, part.d * factor);
}

// The sums of this invocation and of the one `distance` away.
fn part_with_neighbour(part: Part, distance: u32) -> Part {
    return Part(
        part.a + subgroupShuffleXor(part.a, distance),
        part.b + subgroupShuffleXor(part.b, distance),
        part.c + subgroupShuffleXor(part.c, distance),
        part.d + subgroupShuffleXor(part.d, distance),
    );
}
