// Axis kv = q8: the way of rotated elements of gemv_w4_rope.wgsl to the cache. The 64 elements of a workgroup are two groups
// of one head, half of it apart, which share a word of scales.

// Of every four elements: their largest magnitude.
var<workgroup> tops: array<f32, 2u * KV_GROUP / 4u>;

// The largest magnitude of the group whose first four elements are those of `at`. Written out, because a loop reads one
// after the other.
fn top_of(at: u32) -> f32 {
    let low = max(max(tops[at], tops[at + 1u]), max(tops[at + 2u], tops[at + 3u]));
    return max(low, max(max(tops[at + 4u], tops[at + 5u]), max(tops[at + 6u], tops[at + 7u])));
}

fn four_elements(i: u32) -> vec4<f32> {
    return vec4<f32>(elements[i], elements[i + 1u], elements[i + 2u], elements[i + 3u]);
}

// Called by all invocations, once the 64 elements are there.
fn before_append(local_index: u32) {
    if (local_index < 2u * KV_GROUP / 4u) {
        let x = abs(four_elements(4u * local_index));
        tops[local_index] = max(max(x.x, x.y), max(x.z, x.w));
    }
    // Orders the magnitudes before those of a group are compared.
    workgroupBarrier();
}

// Called by the invocations of the 64 elements, this one with element `element` of row `row` of the cache.
fn append(local_index: u32, element: u32, row: u32, rows: u32, head: u32) {
    if (local_index % 4u != 0u) {
        return;
    }
    let scales = kv_scales(vec2<f32>(top_of(0u), top_of(KV_GROUP / 4u)));
    let codes = kv_codes(four_elements(local_index), unpack2x16float(scales)[local_index / KV_GROUP]);
    put(head, (row * params.head_dim + element) / 4u, codes);
    if (local_index == 0u) {
        let words = kv_scale_words(params.head_dim);
        put(head, rows * params.head_dim / 4u + row * words + element / KV_GROUP, scales);
    }
}
