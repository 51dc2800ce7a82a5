// out[n, k] = nearest(w[n, k] * s[k]) / s[k]: what a matrix becomes when its columns are scaled, every group of a row is
// rounded to the codes that span it, and the scaling is taken back. Zero is a value of every grid.
//
// Mapping: a workgroup a group; grid x, y number them. Traffic: w once (the second time from cache), out once.

struct Params {
    n: u32,
    k: u32,
    row_words: u32,
    group_size: u32,
    max_code: f32,
    symmetric: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> w: array<f32>;              // (n, row_words)
@group(0) @binding(3) var<storage, read> s: array<f32>;              // (k)
@group(0) @binding(4) var<storage, read_write> out: array<f32>;      // (n, row_words)

// Smallest range of a group.
const MIN_RANGE: f32 = 1e-5;

var<workgroup> lows: array<f32, WG>;
var<workgroup> highs: array<f32, WG>;

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local_index: u32,
) {
    let index = group.x + group.y * groups.x;
    let per_row = params.k / params.group_size;
    if (index >= params.n * per_row) {
        return;
    }
    let first = index % per_row * params.group_size;
    let row_start = index / per_row * params.row_words;
    var low = 0.0;
    var high = 0.0;
    for (var i = local_index; i < params.group_size; i += WG) {
        let v = w[row_start + first + i] * s[first + i];
        low = min(low, v);
        high = max(high, v);
    }
    lows[local_index] = low;
    highs[local_index] = high;
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        // Orders the writes of a level before its reads.
        workgroupBarrier();
        if (local_index < half) {
            lows[local_index] = min(lows[local_index], lows[local_index + half]);
            highs[local_index] = max(highs[local_index], highs[local_index + half]);
        }
    }
    workgroupBarrier();
    low = lows[0];
    high = highs[0];
    var range = high - low;
    if (params.symmetric != 0u) {
        range = 2.0 * max(high, -low);
    }
    let step = max(range, MIN_RANGE) / params.max_code;
    var zero = clamp(round(-low / step), 0.0, params.max_code);
    if (params.symmetric != 0u) {
        zero = (params.max_code + 1.0) / 2.0;
    }
    for (var i = local_index; i < params.group_size; i += WG) {
        let scale = s[first + i];
        let code = clamp(round(w[row_start + first + i] * scale / step) + zero, 0.0, params.max_code);
        out[row_start + first + i] = (code - zero) * step / scale;
    }
}
