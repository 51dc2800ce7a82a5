// The q, k and v projections of few rows t, rotated where they belong: y = w norm(x[t]) (+ bias), w in the 4-bit layout of
// the device with the rows of all heads of q, then k, then v; q goes to out, rotated k and plain v to the KV cache at
// the step's positions. Pairs of a head are (i, i + rotary_dim / 2): (a, b) becomes (a cos - b sin, b cos + a sin).
//
// Mapping: see prelude/gemv_w4.wgsl, an invocation holds both elements of a pair, or of v, k and q beyond rotary_dim the
// elements half of the rest apart; grid x, y number blocks of 32 pairs of all heads, z rows.
// Traffic: every weight once a row, x and norm once a workgroup (from cache after the first).

struct Params {
    n: u32,
    k: u32,
    chunks: u32,
    group_size: u32,
    groups: u32,
    x_stride: u32,
    out_stride: u32,
    out_offset: u32,
    bias_offset: u32,
    flags: u32,
    row_mode: u32,
    eps: f32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    rotary_dim: u32,
    context: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;             // (n_tokens, x_stride / 4)
@group(0) @binding(3) var<storage, read> qweight: array<vec4<u32>>;       // (tiles, chunks, 32)
@group(0) @binding(4) var<storage, read> group_params: array<u32>;        // (tiles, groups, 32)
// Norm and bias in one binding, because a stage may have no more than eight: (k) norm weights, then (n) biases.
@group(0) @binding(5) var<storage, read> norm_bias: array<f32>;
@group(0) @binding(6) var<storage, read> rope: array<vec2<f32>>;          // (context, rotary_dim / 2): cos, sin
@group(0) @binding(7) var<storage, read_write> out: array<f32>;           // (n_tokens, out_stride)
@group(0) @binding(8) var<storage, read_write> k_cache: array<u32>;       // (kv_heads, context, head_dim)
@group(0) @binding(9) var<storage, read_write> v_cache: array<u32>;       // (kv_heads, context, head_dim)

const ROWS: u32 = 2u;
var<workgroup> elements: array<vec2<f32>, 32>;

fn input4(x_start: u32, column: u32) -> vec4<f32> {
    return x[x_start + column];
}

fn norm_weight4(column: u32) -> vec4<f32> {
    let i = column * 4u;
    return vec4<f32>(norm_bias[i], norm_bias[i + 1u], norm_bias[i + 2u], norm_bias[i + 3u]);
}

// The two elements of a head that pair `pair` stands for.
fn pair_elements(pair: u32) -> vec2<u32> {
    let half = params.rotary_dim / 2u;
    if (pair < half) {
        return vec2<u32>(pair, pair + half);
    }
    let rest = (params.head_dim - params.rotary_dim) / 2u;
    let first = params.rotary_dim + pair - half;
    return vec2<u32>(first, first + rest);
}

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local_index: u32,
) {
    let pairs = params.head_dim / 2u;
    let all_pairs = params.n / 2u;
    let block = group.x + group.y * groups.x;
    let token = group.z;
    let position = step.position + token;
    if (block * TILE_N >= all_pairs || token >= step.n_tokens || position >= params.context) {
        return;
    }
    let x_start = token * params.x_stride / 4u;
    let lane = local_index % TILE_N;
    // Pairs beyond the last repeat it and are not stored.
    let index = min(block * TILE_N + lane, all_pairs - 1u);
    let head = index / pairs;
    let pair = index % pairs;
    let at = pair_elements(pair);
    let n = at + head * params.head_dim;
    var pair_of_y = gemv(n, x_start, local_index);
    if (local_index < TILE_N) {
        if ((params.flags & FLAG_BIAS) != 0u) {
            pair_of_y += vec2<f32>(norm_bias[params.k + n.x], norm_bias[params.k + n.y]);
        }
        if (pair * 2u < params.rotary_dim && head < params.heads + params.kv_heads) {
            let turn = rope[position * (params.rotary_dim / 2u) + pair];
            pair_of_y = vec2<f32>(
                pair_of_y.x * turn.x - pair_of_y.y * turn.y,
                pair_of_y.y * turn.x + pair_of_y.x * turn.y,
            );
        }
        elements[local_index] = pair_of_y;
    }
    // Orders the rotated pairs before neighbours are packed into words.
    workgroupBarrier();
    if (local_index >= TILE_N || block * TILE_N + lane >= all_pairs) {
        return;
    }
    if (head < params.heads) {
        let start = token * params.out_stride + params.out_offset + head * params.head_dim;
        out[start + at.x] = pair_of_y.x;
        out[start + at.y] = pair_of_y.y;
        return;
    }
    // Pairs, halves and heads are even in number, so an even pair has its right neighbour in the same half.
    if (lane % 2u == 1u) {
        return;
    }
    let right = elements[lane + 1u];
    let kv_head = (head - params.heads) % params.kv_heads;
    let start = (kv_head * params.context + position) * params.head_dim;
    let first = kv_pack(vec2<f32>(pair_of_y.x, right.x));
    let second = kv_pack(vec2<f32>(pair_of_y.y, right.y));
    let first_word = (start + at.x) / 2u * KV_PAIR_WORDS;
    let second_word = (start + at.y) / 2u * KV_PAIR_WORDS;
    if (head < params.heads + params.kv_heads) {
        k_cache[first_word] = first.x;
        k_cache[first_word + KV_PAIR_WORDS - 1u] = first[KV_PAIR_WORDS - 1u];
        k_cache[second_word] = second.x;
        k_cache[second_word + KV_PAIR_WORDS - 1u] = second[KV_PAIR_WORDS - 1u];
    } else {
        v_cache[first_word] = first.x;
        v_cache[first_word + KV_PAIR_WORDS - 1u] = first[KV_PAIR_WORDS - 1u];
        v_cache[second_word] = second.x;
        v_cache[second_word + KV_PAIR_WORDS - 1u] = second[KV_PAIR_WORDS - 1u];
    }
}
