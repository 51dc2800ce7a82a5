// The share of a workgroup on grid x = (kv head, HEADS of its query heads), y = split, after window.wgsl; the body defines
// HEADS and `params`.

// Query heads that share the keys and values of head `kv`, which does not exist for workgroups beyond the last.
struct Heads {
    kv: u32,
    first: u32,
    count: u32,
}

fn heads_of(x: u32) -> Heads {
    let per_kv = params.heads / params.kv_heads;
    let blocks = (per_kv + HEADS - 1u) / HEADS;
    let kv = x / blocks;
    let in_kv = x % blocks * HEADS;
    return Heads(kv, kv * per_kv + in_kv, min(HEADS, per_kv - in_kv));
}

// Positions begin..end of split `y` of those that the token at `position` sees; none beyond its last split.
struct Split {
    begin: u32,
    end: u32,
}

fn split_of(position: u32, y: u32) -> Split {
    let first = first_seen(position);
    let split = first / params.split_len + y;
    let begin = max(first, split * params.split_len);
    let end = min(position + 1u, (split + 1u) * params.split_len);
    return Split(begin, select(end, begin, y >= params.splits_max));
}
