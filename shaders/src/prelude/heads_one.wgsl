// Axis heads = one: what attention_subgroup.wgsl holds of the query head of a workgroup; after softcap.wgsl.

const HEADS: u32 = 1u;

alias PerHead = f32;

// Elements of the query head, or sums of elements of the values.
alias OfHeads = Part;

fn set_query(query: ptr<function, OfHeads>, h: u32, q: Part) {
    *query = q;
}

fn products(k: Part, query: OfHeads) -> PerHead {
    return part_product(k, query);
}

fn capped(scores: PerHead, cap: f32) -> PerHead {
    return softcap(scores, cap);
}

fn add_weighted(sums: ptr<function, OfHeads>, weight: PerHead, v: Part) {
    *sums = part_plus(*sums, weight, v);
}

fn scaled(sums: OfHeads, factor: PerHead) -> OfHeads {
    return part_scaled(sums, factor);
}

// The sums of this invocation and of the one `distance` away.
fn with_neighbour(sums: OfHeads, distance: u32) -> OfHeads {
    return part_with_neighbour(sums, distance);
}

fn of_head(sums: OfHeads, h: u32) -> Part {
    return sums;
}

fn number_of(values: PerHead, h: u32) -> f32 {
    return values;
}
