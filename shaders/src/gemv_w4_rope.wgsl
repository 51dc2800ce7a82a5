// The q, k and v projections of few rows t, rotated where they belong: y = factor(t) * w x[t] (+ bias), w in the 4-bit
// layout of the device with the rows of all heads of q, then k, then v, x staged, factor as in gemv_w4; q goes to out,
// rotated k and plain v to the KV cache, which begins at position `prefix`, at the step's positions. Pairs of a head are
// (i, i + rotary_dim / 2): (a, b) becomes (a cos - b sin, b cos + a sin).
//
// Mapping: see prelude/gemv_w4.wgsl, a lane holds the elements of a pair, or of v, and of k and q beyond rotary_dim, the
// elements half of the rest apart; grid x, y number blocks of 32 pairs of all heads, z rows. What a workgroup has of k or v
// goes to the cache by prelude/append_pairs.wgsl or append_groups.wgsl. Traffic: every weight once a row, x once a workgroup
// (from cache after the first).

struct Params {
    n: u32,
    k: u32,
    chunks: u32,
    group_size: u32,
    group_shift: u32,
    groups: u32,
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
    prefix: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;              // (rows) of staged inputs
@group(0) @binding(3) var<storage, read> qweight: array<vec4<u32>>;        // (tiles, chunks, 32)
@group(0) @binding(4) var<storage, read> group_params: array<u32>;         // (tiles, groups, 32)
@group(0) @binding(5) var<storage, read> bias: array<f32>;                 // (n)
@group(0) @binding(6) var<storage, read> rope: array<vec2<f32>>;           // (context, rotary_dim / 2): cos, sin
@group(0) @binding(7) var<storage, read_write> out: array<f32>;            // (n_tokens, out_stride)
@group(0) @binding(8) var<storage, read_write> k_cache: array<u32>;        // (context - prefix, kv_heads, head_dim)
@group(0) @binding(9) var<storage, read_write> v_cache: array<u32>;        // (context - prefix, kv_heads, head_dim)

const LANES: u32 = 32u;
var<workgroup> elements: array<f32, 64>;

// The first of the two elements of a head that pair `pair` stands for, and how far the second one is.
fn pair_elements(pair: u32) -> vec2<u32> {
    let half = params.rotary_dim / 2u;
    if (pair < half) {
        return vec2<u32>(pair, half);
    }
    return vec2<u32>(params.rotary_dim + pair - half, (params.head_dim - params.rotary_dim) / 2u);
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
    if (block * 32u >= all_pairs || token >= step.n_tokens || position >= params.context) {
        return;
    }
    let lane = local_index % 32u;
    let is_second = local_index / 32u % 2u;
    // Pairs beyond the last repeat it and are not stored.
    let index = min(block * 32u + lane, all_pairs - 1u);
    let head = index / pairs;
    let pair = index % pairs;
    let elements_of_pair = pair_elements(pair);
    let element = elements_of_pair.x + is_second * elements_of_pair.y;
    let n = head * params.head_dim + vec2<u32>(elements_of_pair.x, elements_of_pair.x + elements_of_pair.y);
    var values = gemv_pair(n, token, local_index);
    if ((params.flags & FLAG_BIAS) != 0u) {
        values += vec2<f32>(bias[n.x], bias[n.y]);
    }
    if (pair * 2u < params.rotary_dim && head < params.heads + params.kv_heads) {
        let turn = rope[position * (params.rotary_dim / 2u) + pair];
        values = vec2<f32>(values.x * turn.x - values.y * turn.y, values.y * turn.x + values.x * turn.y);
    }
    if (local_index < 32u) {
        elements[lane] = values.x;
        elements[lane + 32u] = values.y;
    }
    // Orders the rotated elements before neighbours are packed into words.
    workgroupBarrier();
    before_append(local_index);
    if (local_index >= 64u || block * 32u + lane >= all_pairs) {
        return;
    }
    if (head < params.heads) {
        out[token * params.out_stride + params.out_offset + head * params.head_dim + element] = elements[local_index];
        return;
    }
    let kv_head = (head - params.heads) % params.kv_heads;
    let positions = params.context - params.prefix;
    let row = kv_row(position - params.prefix, kv_head, positions, params.kv_heads);
    append(local_index, element, row, params.kv_heads * positions, head);
}

// Stores a word of the cache that `head` belongs to.
fn put(head: u32, at: u32, word: u32) {
    if (head < params.heads + params.kv_heads) {
        k_cache[at] = word;
    } else {
        v_cache[at] = word;
    }
}
