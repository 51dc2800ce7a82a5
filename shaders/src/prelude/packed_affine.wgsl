// Axis packed = affine: codes of BITS bits, the code of input k at bit k * BITS of its row. A weight is (q - o) * s, or
// q * s + o with FLAG_OFFSET_IS_BIAS; a group has a word of f16 s (low) and o (high), or two words of f32 with FLAG_WIDE.
// FLAG_BF16 and FLAG_ROUND_PRODUCTS round them as the software does that defines them.

const MASK: u32 = (1u << BITS) - 1u;

// Scale and offset of the group of input `k` of output `n`.
fn group_numbers(n: u32, k: u32) -> vec2<f32> {
    let index = n * params.groups + k / params.group_size;
    if ((params.flags & FLAG_WIDE) != 0u) {
        return vec2<f32>(bitcast<f32>(group_params[2u * index]), bitcast<f32>(group_params[2u * index + 1u]));
    }
    return unpack2x16float(group_params[index]);
}

// Field `i` of the run of bits that starts with `first` and goes on with `next`.
fn field(first: u32, next: u32, i: u32) -> u32 {
    let at = i * BITS;
    if (at >= 32u) {
        return (next >> (at - 32u)) & MASK;
    }
    var bits = first >> at;
    if (at + BITS > 32u) {
        bits |= next << (32u - at);
    }
    return bits & MASK;
}

// Weights of output `n` for inputs k..k+8; k is a multiple of 8, and the buffer ends a word after the last row.
fn weights8(n: u32, k: u32) -> Weights8 {
    let bit = k * BITS;
    let at = n * params.row_words + bit / 32u;
    let shift = bit % 32u;
    let word = codes[at];
    var first = word >> shift;
    var next = 0u;
    // Eight codes that begin within a word reach into the next one only from 3 bits on.
    if (BITS != 2u && BITS != 4u) {
        next = codes[at + 1u];
        if (shift != 0u) {
            first |= next << (32u - shift);
            next >>= shift;
        }
    }
    let lo = vec4<u32>(field(first, next, 0u), field(first, next, 1u), field(first, next, 2u), field(first, next, 3u));
    let hi = vec4<u32>(field(first, next, 4u), field(first, next, 5u), field(first, next, 6u), field(first, next, 7u));
    let so = group_numbers(n, k);
    var w = Weights8(vec4<f32>(lo), vec4<f32>(hi));
    if ((params.flags & FLAG_OFFSET_IS_BIAS) == 0u) {
        w = Weights8((w.lo - so.y) * so.x, (w.hi - so.y) * so.x);
    } else {
        w = Weights8(w.lo * so.x, w.hi * so.x);
        if ((params.flags & FLAG_ROUND_PRODUCTS) != 0u) {
            w = Weights8(to_bf16(w.lo), to_bf16(w.hi));
        }
        w = Weights8(w.lo + so.y, w.hi + so.y);
    }
    if ((params.flags & FLAG_BF16) != 0u) {
        return Weights8(to_bf16(w.lo), to_bf16(w.hi));
    }
    return w;
}
