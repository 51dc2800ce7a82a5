// Axis heads = four: what attention_subgroup.wgsl holds of up to four query heads of a workgroup; after softcap.wgsl.

const HEADS: u32 = 4u;

alias PerHead = vec4<f32>;

// Eight elements of the query heads, which are columns, or sums of eight elements of the values, which are columns with
// one number for each of the heads.
struct OfHeads {
    lo: mat4x4<f32>,
    hi: mat4x4<f32>,
}

fn set_query(query: ptr<function, OfHeads>, h: u32, q: Eight) {
    (*query).lo[h] = q.lo;
    (*query).hi[h] = q.hi;
}

fn products(k: Eight, query: OfHeads) -> PerHead {
    return k.lo * query.lo + k.hi * query.hi;
}

fn capped(scores: PerHead, cap: f32) -> PerHead {
    return softcap4(scores, cap);
}

fn add_weighted(sums: ptr<function, OfHeads>, weight: PerHead, v: Eight) {
    (*sums).lo[0] = fma(weight, vec4<f32>(v.lo.x), (*sums).lo[0]);
    (*sums).lo[1] = fma(weight, vec4<f32>(v.lo.y), (*sums).lo[1]);
    (*sums).lo[2] = fma(weight, vec4<f32>(v.lo.z), (*sums).lo[2]);
    (*sums).lo[3] = fma(weight, vec4<f32>(v.lo.w), (*sums).lo[3]);
    (*sums).hi[0] = fma(weight, vec4<f32>(v.hi.x), (*sums).hi[0]);
    (*sums).hi[1] = fma(weight, vec4<f32>(v.hi.y), (*sums).hi[1]);
    (*sums).hi[2] = fma(weight, vec4<f32>(v.hi.z), (*sums).hi[2]);
    (*sums).hi[3] = fma(weight, vec4<f32>(v.hi.w), (*sums).hi[3]);
}

fn scaled_columns(m: mat4x4<f32>, factors: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(m[0] * factors, m[1] * factors, m[2] * factors, m[3] * factors);
}

fn scaled(sums: OfHeads, factors: PerHead) -> OfHeads {
    return OfHeads(scaled_columns(sums.lo, factors), scaled_columns(sums.hi, factors));
}

fn shuffled_columns(m: mat4x4<f32>, distance: u32) -> mat4x4<f32> {
    return mat4x4<f32>(
        subgroupShuffleXor(m[0], distance),
        subgroupShuffleXor(m[1], distance),
        subgroupShuffleXor(m[2], distance),
        subgroupShuffleXor(m[3], distance),
    );
}

// The sums of this invocation and of the one `distance` away.
fn with_neighbour(sums: OfHeads, distance: u32) -> OfHeads {
    return OfHeads(sums.lo + shuffled_columns(sums.lo, distance), sums.hi + shuffled_columns(sums.hi, distance));
}

fn of_head(sums: OfHeads, h: u32) -> Eight {
    // A product with a unit vector is a row.
    let row = vec4<f32>(vec4<u32>(0u, 1u, 2u, 3u) == vec4<u32>(h));
    return Eight(row * sums.lo, row * sums.hi);
}

fn number_of(values: PerHead, h: u32) -> f32 {
    return values[h];
}
