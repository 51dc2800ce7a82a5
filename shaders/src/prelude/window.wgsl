// First position that the token at `position` sees; the body defines `params`.
fn first_seen(position: u32) -> u32 {
    if (params.window > 0u && position + 1u > params.window) {
        return position + 1u - params.window;
    }
    return 0u;
}
