// The first candidate of a workgroup, given the order of scores.

var<workgroup> best: array<vec2<u32>, WG>;

// The candidate (key, id) that comes before all others of the workgroup; for invocation 0.
fn best_of_all(local_index: u32, mine: vec2<u32>) -> vec2<u32> {
    best[local_index] = mine;
    // Orders the writes before the tree, and below one level of the tree before the next.
    workgroupBarrier();
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        if (local_index < half && comes_before(best[local_index + half], best[local_index])) {
            best[local_index] = best[local_index + half];
        }
        workgroupBarrier();
    }
    return best[0];
}
