// Axis kv = q8: rotation and the way to the cache, after rope_append.wgsl. Sixteen invocations handle the two groups of k or v
// that share a word of scales, four elements each, or as many pairs of q in turn; grid x numbers blocks of WG over all
// heads of a row.

// Of the four elements of every invocation: their largest magnitude.
var<workgroup> tops: array<f32, WG>;

// The largest magnitude of the eight invocations from `at` on.
fn top_of(at: u32) -> f32 {
    // Written out, because a loop reads one after the other.
    let low = max(max(tops[at], tops[at + 1u]), max(tops[at + 2u], tops[at + 3u]));
    return max(low, max(max(tops[at + 4u], tops[at + 5u]), max(tops[at + 6u], tops[at + 7u])));
}

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(local_invocation_index) local_index: u32) {
    let scale_words = kv_scale_words(params.head_dim);
    let head = id.x / (16u * scale_words);
    let of_head = id.x % (16u * scale_words);
    let place = place_of(id.z);
    let is_there = head < params.heads + 2u * params.kv_heads && place.is_there && place.position < place.context;
    let is_cached = is_there && head >= params.heads;
    let is_key = head < params.heads + params.kv_heads;
    let start = place.row * params.qkv_stride + head * params.head_dim;
    let half = params.rotary_dim / 2u;
    let rope_start = place.rope_row * half;
    if (is_there && !is_cached) {
        for (var pair = of_head; pair < half; pair += 16u * scale_words) {
            let turn = rope[rope_start + pair];
            let a = qkv[start + pair];
            let b = qkv[start + pair + half];
            qkv[start + pair] = a * turn.x - b * turn.y;
            qkv[start + pair + half] = b * turn.x + a * turn.y;
        }
    }

    let scale_word = of_head / 16u;
    let group = scale_word + select(0u, scale_words, of_head % 16u >= 8u);
    let first = group * KV_GROUP + of_head % 8u * 4u;
    var x = vec4<f32>(0.0);
    if (is_cached && first < params.head_dim) {
        for (var e = 0u; e < 4u; e++) {
            if (is_key) {
                x[e] = rotated(start, first + e, rope_start);
            } else {
                x[e] = qkv[start + first + e];
            }
        }
    }
    let pair_tops = max(abs(x.xy), abs(x.zw));
    tops[local_index] = max(pair_tops.x, pair_tops.y);
    // Orders the magnitudes before those of a group are compared.
    workgroupBarrier();
    if (!is_cached) {
        return;
    }
    let scales_at = local_index / 16u * 16u;
    let scales = kv_scales(vec2<f32>(top_of(scales_at), top_of(scales_at + 8u)));
    let words = params.head_dim / 4u;
    let lines = place.context - place.prefix;
    let kv_head = (head - params.heads) % params.kv_heads;
    let line = kv_row(place.position - place.prefix, kv_head, lines, params.kv_heads);
    if (first < params.head_dim) {
        let codes = kv_codes(x, unpack2x16float(scales)[of_head % 16u / 8u]);
        if (is_key) {
            put_key(id.z, line * words + first / 4u, codes);
        } else {
            put_value(id.z, line * words + first / 4u, codes);
        }
    }
    if (of_head % 16u == 0u) {
        let at = params.kv_heads * lines * words + line * scale_words + scale_word;
        if (is_key) {
            put_key(id.z, at, scales);
        } else {
            put_value(id.z, at, scales);
        }
    }
}
