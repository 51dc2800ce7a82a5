// What rope_append_pairs.wgsl and rope_append_groups.wgsl have in common: the bodies of rope_append.wgsl and
// rope_append_each.wgsl, which say where keys and values go. They define `params` and the bindings qkv and rope.

// A token: its row, position, row of the rotary table, and cache, of which the first `prefix` positions lie elsewhere.
struct Place {
    row: u32,
    position: u32,
    rope_row: u32,
    context: u32,
    prefix: u32,
    is_there: bool,
}

// Element `i` of the rotated head that starts at `start`.
fn rotated(start: u32, i: u32, rope_start: u32) -> f32 {
    let half = params.rotary_dim / 2u;
    if (i >= params.rotary_dim) {
        return qkv[start + i];
    }
    if (i < half) {
        let turn = rope[rope_start + i];
        return qkv[start + i] * turn.x - qkv[start + i + half] * turn.y;
    }
    let turn = rope[rope_start + i - half];
    return qkv[start + i] * turn.x + qkv[start + i - half] * turn.y;
}

