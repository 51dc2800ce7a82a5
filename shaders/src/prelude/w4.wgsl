// The 4-bit layout of the device: tiles of 32 outputs, and in a tile chunks of 32 inputs, one vec4 of words an output, so
// that 32 invocations that take an output each read 512 consecutive bytes. A word holds eight codes, nibble t of word w
// of a chunk is input 32 * chunk + 8 * w + t. Group parameters lie the same way: (tiles, groups, 32), f16 s in the low
// half and f16 o in the high half. A weight is (q - o) * s, or q * s + o with the flag FLAG_OFFSET_IS_BIAS.

const TILE_N: u32 = 32u;

// Index of the vec4 that holds chunk `chunk` of output `n`, in a matrix of `chunks` chunks a row.
fn chunk_index(n: u32, chunk: u32, chunks: u32) -> u32 {
    return (n / TILE_N * chunks + chunk) * TILE_N + n % TILE_N;
}

// Index of the parameters of group `group` of output `n`.
fn group_index(n: u32, group: u32, groups: u32) -> u32 {
    return (n / TILE_N * groups + group) * TILE_N + n % TILE_N;
}

// A group: a weight is (q - zero) * s + c, with an integral zero.
struct Group {
    s: f32,
    zero: f32,
    c: f32,
}

fn unpack_group(word: u32, flags: u32) -> Group {
    let so = unpack2x16float(word);
    if ((flags & FLAG_OFFSET_IS_BIAS) != 0u) {
        return Group(so.x, 8.0, fma(8.0, so.x, so.y));
    }
    let zero = round(so.y);
    return Group(so.x, zero, (zero - so.y) * so.x);
}
