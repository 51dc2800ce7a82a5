// Axis heads = one: what attention_subgroup.wgsl holds of the query head of a workgroup; after softcap.wgsl.

const HEADS: u32 = 1u;

alias PerHead = f32;

// Eight elements of the query head, or sums of eight elements of the values.
struct OfHeads {
    lo: vec4<f32>,
    hi: vec4<f32>,
}

fn set_query(query: ptr<function, OfHeads>, h: u32, q: Eight) {
    *query = OfHeads(q.lo, q.hi);
}

fn products(k: Eight, query: OfHeads) -> PerHead {
    return dot(k.lo, query.lo) + dot(k.hi, query.hi);
}

fn capped(scores: PerHead, cap: f32) -> PerHead {
    return softcap(scores, cap);
}

fn add_weighted(sums: ptr<function, OfHeads>, weight: PerHead, v: Eight) {
    (*sums).lo = fma(vec4<f32>(weight), v.lo, (*sums).lo);
    (*sums).hi = fma(vec4<f32>(weight), v.hi, (*sums).hi);
}

fn scaled(sums: OfHeads, factor: PerHead) -> OfHeads {
    return OfHeads(sums.lo * factor, sums.hi * factor);
}

// The sums of this invocation and of the one `distance` away.
fn with_neighbour(sums: OfHeads, distance: u32) -> OfHeads {
    return OfHeads(
        sums.lo + subgroupShuffleXor(sums.lo, distance),
        sums.hi + subgroupShuffleXor(sums.hi, distance),
    );
}

fn of_head(sums: OfHeads, h: u32) -> Eight {
    return Eight(sums.lo, sums.hi);
}

fn number_of(values: PerHead, h: u32) -> f32 {
    return values;
}
