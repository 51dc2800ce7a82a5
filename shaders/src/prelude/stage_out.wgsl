// Writes a chunk of staged inputs, after stage_eight.wgsl.

var<workgroup> chunk_values: array<f32, 32>;
var<workgroup> chunk_squares: array<f32, 32>;
// The largest magnitude and the sum of squares of four neighbours each.
var<workgroup> chunk_fours: array<vec2<f32>, 8>;

// Stages chunk `chunk` of row `row`: invocation `lane` (its local index, all of the workgroup call this in uniform control
// flow) below 32 gives input `value`, 0 beyond K, and `factor`, its weight in the norm that follows, or 1.
fn stage_chunk(lane: u32, value: f32, factor: f32, chunk: u32, row: u32, quads: u32) {
    if (lane < 32u) {
        chunk_values[lane] = value * factor;
        chunk_squares[lane] = value * value;
    }
    // Orders the values before their reads.
    workgroupBarrier();
    if (lane < 8u) {
        let at = 4u * lane;
        let values = vec4<f32>(chunk_values[at], chunk_values[at + 1u], chunk_values[at + 2u], chunk_values[at + 3u]);
        let squares = vec4<f32>(chunk_squares[at], chunk_squares[at + 1u], chunk_squares[at + 2u], chunk_squares[at + 3u]);
        let large = max(abs(values.xy), abs(values.zw));
        chunk_fours[lane] = vec2<f32>(max(large.x, large.y), dot(squares, vec4<f32>(1.0)));
    }
    // Orders what fours have in common before its reads.
    workgroupBarrier();
    if (lane < 4u) {
        var largest = 0.0;
        var squares = 0.0;
        for (var i = 0u; i < 8u; i++) {
            largest = max(largest, chunk_fours[i].x);
            squares += chunk_fours[i].y;
        }
        let at = 8u * lane;
        let lo = vec4<f32>(chunk_values[at], chunk_values[at + 1u], chunk_values[at + 2u], chunk_values[at + 3u]);
        let hi = vec4<f32>(chunk_values[at + 4u], chunk_values[at + 5u], chunk_values[at + 6u], chunk_values[at + 7u]);
        stage_eight(lane, lo, hi, largest, squares, chunk, row, quads);
    }
    // Orders these reads before the writes of another call.
    workgroupBarrier();
}
