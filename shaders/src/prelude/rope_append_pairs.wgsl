// Axis kv = f16 or f32: rotation and the way to the cache, after rope_append.wgsl. An invocation handles one pair of q, or
// the elements 2i, 2i + 1 of k or v; grid x numbers blocks of WG over all heads of a row.

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let pairs = params.head_dim / 2u;
    let head = id.x / pairs;
    let pair = id.x % pairs;
    let place = place_of(id.z);
    if (head >= params.heads + 2u * params.kv_heads || !place.is_there || place.position >= place.context) {
        return;
    }
    let start = place.row * params.qkv_stride + head * params.head_dim;
    let half = params.rotary_dim / 2u;
    let rope_start = place.rope_row * half;

    if (head < params.heads) {
        if (pair < half) {
            let turn = rope[rope_start + pair];
            let a = qkv[start + pair];
            let b = qkv[start + pair + half];
            qkv[start + pair] = a * turn.x - b * turn.y;
            qkv[start + pair + half] = b * turn.x + a * turn.y;
        }
        return;
    }

    let kv_head = (head - params.heads) % params.kv_heads;
    let line = kv_row(place.position - place.prefix, kv_head, place.context - place.prefix, params.kv_heads);
    let word = (line * pairs + pair) * KV_PAIR_WORDS;
    if (head < params.heads + params.kv_heads) {
        let i = 2u * pair;
        let words = kv_pack(vec2<f32>(rotated(start, i, rope_start), rotated(start, i + 1u, rope_start)));
        put_key(id.z, word, words.x);
        if (KV_PAIR_WORDS == 2u) {
            put_key(id.z, word + 1u, words.y);
        }
    } else {
        let words = kv_pack(vec2<f32>(qkv[start + 2u * pair], qkv[start + 2u * pair + 1u]));
        put_value(id.z, word, words.x);
        if (KV_PAIR_WORDS == 2u) {
            put_value(id.z, word + 1u, words.y);
        }
    }
}
