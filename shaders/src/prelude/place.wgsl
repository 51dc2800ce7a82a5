// What attention_eights.wgsl and attention_lanes.wgsl have to know of a token.

// A token: its row, position and cache, of which the first `prefix` positions lie in a shared part.
struct Place {
    row: u32,
    position: u32,
    context: u32,
    prefix: u32,
    is_there: bool,
}
