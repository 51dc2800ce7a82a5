// What a lane of attention_lanes.wgsl has of a row: eight elements.

const LANE_VECS: u32 = 2u;

alias Part = Eight;

// The query's, from vec4 `at` on.
fn query_part(at: u32) -> Part {
    return Eight(qkv[at] * params.scale, qkv[at + 1u] * params.scale);
}

// To workgroup memory.
fn put_part(at: u32, part: Part) {
    parts[at] = part.lo;
    parts[at + 1u] = part.hi;
}

fn part_product(a: Part, b: Part) -> f32 {
    return dot(a.lo, b.lo) + dot(a.hi, b.hi);
}

fn part_plus(sum: Part, weight: f32, v: Part) -> Part {
    return Eight(fma(vec4<f32>(weight), v.lo, sum.lo), fma(vec4<f32>(weight), v.hi, sum.hi));
}

fn part_scaled(part: Part, factor: f32) -> Part {
    return Eight(part.lo * factor, part.hi * factor);
}

// The sums of this invocation and of the one `distance` away.
fn part_with_neighbour(part: Part, distance: u32) -> Part {
    return Eight(part.lo + subgroupShuffleXor(part.lo, distance), part.hi + subgroupShuffleXor(part.hi, distance));
}
