// Axis kv = f16 or f32: the way of an invocation of attention_lanes.wgsl over its positions, four at once.

// Over the positions of `split` with what was found before; position 0 would be row `start`.
fn sweep(before: Found, split: Split, start: u32, spot: Spot, place: LanePlace, query: OfHeads) -> Found {
    let at_once = spot.subgroups * spot.slots;
    let mine = spot.subgroup * spot.slots + spot.lane / place.lanes;
    var found = before;
    for (var tile = split.begin + mine; tile - mine < split.end; tile += 4u * at_once) {
        // Positions beyond the last one repeat it and get no weight.
        let row0 = start + min(tile, split.end - 1u) * kv_step(params.kv_heads);
        let row1 = start + min(tile + at_once, split.end - 1u) * kv_step(params.kv_heads);
        let row2 = start + min(tile + 2u * at_once, split.end - 1u) * kv_step(params.kv_heads);
        let row3 = start + min(tile + 3u * at_once, split.end - 1u) * kv_step(params.kv_heads);
        let k0 = read_key(row0, place);
        let k1 = read_key(row1, place);
        let k2 = read_key(row2, place);
        let k3 = read_key(row3, place);
        let v0 = read_value(row0, place);
        let v1 = read_value(row1, place);
        let v2 = read_value(row2, place);
        let v3 = read_value(row3, place);
        let s0 = score_of(lane_part(k0), 1.0, query, place.lanes, tile < split.end);
        let s1 = score_of(lane_part(k1), 1.0, query, place.lanes, tile + at_once < split.end);
        let s2 = score_of(lane_part(k2), 1.0, query, place.lanes, tile + 2u * at_once < split.end);
        let s3 = score_of(lane_part(k3), 1.0, query, place.lanes, tile + 3u * at_once < split.end);
        raise(&found, max(found.top, max(max(s0, s1), max(s2, s3))));
        add(&found, s0, lane_part(v0), 1.0);
        add(&found, s1, lane_part(v1), 1.0);
        add(&found, s2, lane_part(v2), 1.0);
        add(&found, s3, lane_part(v3), 1.0);
    }
    return found;
}
