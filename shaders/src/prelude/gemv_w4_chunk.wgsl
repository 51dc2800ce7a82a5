// Products of a chunk of a 4-bit matrix with staged inputs. The body defines `params` and the bindings x and group_params.

// Axis groups.
const GROUPS_QUADS: u32 = 0u;
const GROUPS_CHUNKS: u32 = 1u;
const GROUPS_ANY: u32 = 2u;

fn load_inputs8(at: u32) -> Inputs8 {
    return inputs8(x[at], x[at + STAGED_VECS - 1u]);
}

// 32 staged inputs.
struct Chunk {
    x0: Inputs8,
    x1: Inputs8,
    x2: Inputs8,
    x3: Inputs8,
}

fn load_chunk(at: u32) -> Chunk {
    return Chunk(
        load_inputs8(at),
        load_inputs8(at + STAGED_VECS),
        load_inputs8(at + 2u * STAGED_VECS),
        load_inputs8(at + 3u * STAGED_VECS),
    );
}

// Product of a chunk whose inputs share a group with staged inputs.
fn chunk_product(q: vec4<u32>, params_word: u32, x: Chunk) -> f32 {
    let group = unpack_group(params_word, params.flags);
    let base = code_base(group.zero);
    let product =
        (code_dot(q.x, x.x0, base) + code_dot(q.y, x.x1, base)) + (code_dot(q.z, x.x2, base) + code_dot(q.w, x.x3, base));
    if ((params.flags & FLAG_SUMS) != 0u) {
        let sum = inputs8_sum(x.x0) + inputs8_sum(x.x1) + inputs8_sum(x.x2) + inputs8_sum(x.x3);
        return fma(group.s, product, group.c * sum);
    }
    return group.s * product;
}

// Product of a chunk in which groups end.
fn split_chunk_product(q: vec4<u32>, chunk: u32, group_start: u32, at: u32) -> f32 {
    var sum = 0.0;
    for (var w = 0u; w < 4u; w++) {
        let index = min((chunk * 32u + w * 8u) / params.group_size, params.groups - 1u);
        let group = unpack_group(group_params[group_start + index * TILE_N], params.flags);
        let inputs = load_inputs8(at + w * STAGED_VECS);
        sum += fma(group.s, code_dot(q[w], inputs, code_base(group.zero)), group.c * inputs8_sum(inputs));
    }
    return sum;
}
