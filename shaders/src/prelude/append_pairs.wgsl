// Axis kv = f16 or f32: the way of rotated elements of gemv_w4_rope.wgsl to the cache.

// Called by all invocations, once the 64 elements are there.
fn before_append(local_index: u32) {}

// Called by the invocations of the 64 elements, this one with element `element` of row `row` of the cache.
fn append(local_index: u32, element: u32, row: u32, rows: u32, head: u32) {
    // Pairs, halves and heads are even in number, so an even pair has its right neighbour in the same half.
    if (local_index % 2u == 1u) {
        return;
    }
    let words = kv_pack(vec2<f32>(elements[local_index], elements[local_index + 1u]));
    let at = (row * params.head_dim + element) / 2u * KV_PAIR_WORDS;
    put(head, at, words.x);
    if (KV_PAIR_WORDS == 2u) {
        put(head, at + 1u, words.y);
    }
}
