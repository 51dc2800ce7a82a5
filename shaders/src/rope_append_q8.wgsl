// Rotates q in place and writes rotated k and plain v of the step's tokens to a KV cache of 8 bits, which begins at
// position `prefix`: as rope_append.wgsl, and 32 elements of a head at a time become codes round(x / scale) with
// scale = f16(max |x| / 127). Layout of the cache: see prelude/kv_q8.wgsl.
//
// Mapping: a workgroup = a head of a row, on grid x and z. Traffic: every element of the row once or twice.

struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    rotary_dim: u32,
    qkv_stride: u32,
    context: u32,
    prefix: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read_write> qkv: array<f32>;        // (n_tokens, qkv_stride)
@group(0) @binding(3) var<storage, read> rope: array<vec2<f32>>;       // (context, rotary_dim / 2): cos, sin
@group(0) @binding(4) var<storage, read_write> k_cache: array<u32>;    // (kv_heads, context - prefix, head_dim), scales
@group(0) @binding(5) var<storage, read_write> v_cache: array<u32>;    // (kv_heads, context - prefix, head_dim), scales

var<workgroup> row: array<f32, HEAD_DIM_MAX>;

// The scale of the 32 elements from `start` on as the low half of a word; 0 beyond the head.
fn scale_bits(start: u32) -> u32 {
    var most = 0.0;
    for (var i = start; i < min(start + 32u, params.head_dim); i++) {
        most = max(most, abs(row[i]));
    }
    return pack2x16float(vec2<f32>(min(most, 65504.0) / 127.0, 0.0));
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local_index: u32) {
    let head = group.x;
    let token = group.z;
    let position = step.position + token;
    if (head >= params.heads + 2u * params.kv_heads || token >= step.n_tokens || position >= params.context) {
        return;
    }
    let start = token * params.qkv_stride + head * params.head_dim;
    let half = select(params.rotary_dim / 2u, 0u, head >= params.heads + params.kv_heads);
    for (var i = local_index; i < half; i += WG) {
        let turn = rope[position * (params.rotary_dim / 2u) + i];
        let a = qkv[start + i];
        let b = qkv[start + i + half];
        row[i] = a * turn.x - b * turn.y;
        row[i + half] = b * turn.x + a * turn.y;
    }
    for (var i = 2u * half + local_index; i < params.head_dim; i += WG) {
        row[i] = qkv[start + i];
    }
    // Orders the rotated elements before what is made of them.
    workgroupBarrier();
    if (head < params.heads) {
        for (var i = local_index; i < 2u * half; i += WG) {
            qkv[start + i] = row[i];
        }
        return;
    }

    let words = params.head_dim / 4u;
    let scale_words = (params.head_dim + 63u) / 64u;
    let positions = params.context - params.prefix;
    let line = (head - params.heads) % params.kv_heads * positions + position - params.prefix;
    let scales_start = params.kv_heads * positions * words + line * scale_words;
    let is_key = head < params.heads + params.kv_heads;
    for (var i = local_index; i < words; i += WG) {
        let scale = unpack2x16float(scale_bits(i / 8u * 32u)).x;
        let x = vec4<f32>(row[4u * i], row[4u * i + 1u], row[4u * i + 2u], row[4u * i + 3u]);
        let codes = round(clamp(x / select(1.0, scale, scale > 0.0), vec4<f32>(-127.0), vec4<f32>(127.0)));
        let word = pack4xI8(select(vec4<i32>(0), vec4<i32>(codes), scale > 0.0));
        if (is_key) {
            k_cache[line * words + i] = word;
        } else {
            v_cache[line * words + i] = word;
        }
    }
    for (var i = local_index; i < scale_words; i += WG) {
        let word = scale_bits(64u * i) | (scale_bits(64u * i + 32u) << 16u);
        if (is_key) {
            k_cache[scales_start + i] = word;
        } else {
            v_cache[scales_start + i] = word;
        }
    }
}
