// Axis kv = q8: the way of an invocation of attention_lanes.wgsl over its positions, one at a time, which leaves room for
// more subgroups; after lane_q8_eight.wgsl or lane_q8_sixteen.wgsl. The lanes of a subgroup read a word of scales each
// (kv_q8.wgsl), those of several rows, and ask each other for them. A scale is multiplied with what its codes come to
// instead of with each.

// Rows that the words of a subgroup are of, in steps of as many as its lanes hold at once.
const STEPS: u32 = 4u;

// The place of lane `lane` of `lanes` in the rows of part `part` of the cache.
struct LanePlace {
    lane: u32,
    lanes: u32,
    rows: u32,
    part: u32,
}

fn lane_place(lane: u32, lanes: u32, rows: u32, part: u32) -> LanePlace {
    return LanePlace(lane, lanes, rows, part);
}

// Over the positions of `split` with what was found before; position 0 would be row `start`.
fn sweep(before: Found, split: Split, start: u32, spot: Spot, place: LanePlace, query: OfHeads) -> Found {
    let words = kv_scale_words(params.head_dim);
    let scales_start = place.rows * params.head_dim / 4u;
    // The lane's own scale is the half from bit `shift` on of word `mine` of a row.
    let group = place.lane * LANE_VECS * 4u / KV_GROUP;
    let mine = group % words;
    let shift = group / words * 16u;
    let slot = spot.lane / place.lanes;
    // A subgroup has a lane for every word.
    let steps = min(STEPS, place.lanes / words);
    let at_once = steps * spot.slots;
    var found = before;
    for (var tile = split.begin + spot.subgroup * at_once; tile < split.end; tile += spot.subgroups * at_once) {
        // Positions beyond the last one repeat it and get no weight.
        let scales_row = start + min(tile + spot.lane / words, split.end - 1u);
        let word = scales_start + scales_row * words + spot.lane % words;
        let key_scales = key_words(place.part, word / LANE_VECS)[word % LANE_VECS];
        let value_scales = value_words(place.part, word / LANE_VECS)[word % LANE_VECS];
        for (var s = 0u; s < steps; s++) {
            let in_tile = s * spot.slots + slot;
            let row = start + min(tile + in_tile, split.end - 1u);
            let k = key_words(place.part, row * place.lanes + place.lane);
            let v = value_words(place.part, row * place.lanes + place.lane);
            let k_scale = unpack2x16float(subgroupShuffle(key_scales, in_tile * words + mine) >> shift).x;
            let v_scale = unpack2x16float(subgroupShuffle(value_scales, in_tile * words + mine) >> shift).x;
            let score = score_of(lane_part(k), k_scale, query, place.lanes, tile + in_tile < split.end);
            raise(&found, max(found.top, score));
            add(&found, score, lane_part(v), v_scale);
        }
    }
    return found;
}
