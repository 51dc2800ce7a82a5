// Writes a chunk of staged inputs (prelude/stage.wgsl) to the binding `staged` of the body.

var<workgroup> chunk_values: array<f32, 32>;
var<workgroup> chunk_squares: array<f32, 32>;

// Stages chunk `chunk` of row `row`: invocation `lane` (its local index, all of the workgroup call this in uniform control
// flow) below 32 gives input `value`, 0 beyond K, and `factor`, its weight in the norm that follows, or 1.
fn stage_chunk(lane: u32, value: f32, factor: f32, chunk: u32, row: u32, quads: u32) {
    if (lane < 32u) {
        chunk_values[lane] = value * factor;
        chunk_squares[lane] = value * value;
    }
    // Orders the values before their reads.
    workgroupBarrier();
    if (lane < 4u) {
        var largest = 0.0;
        for (var i = 0u; i < 32u; i++) {
            largest = max(largest, abs(chunk_values[i]));
        }
        // At least the smallest normal number, so that the inverse is finite; zeros stay zeros.
        let magnitude = max(largest, 1.2e-38);
        let start = row * staged_row(quads);
        let at = 8u * lane;
        let lo = vec4<f32>(chunk_values[at], chunk_values[at + 1u], chunk_values[at + 2u], chunk_values[at + 3u]);
        let hi = vec4<f32>(chunk_values[at + 4u], chunk_values[at + 5u], chunk_values[at + 6u], chunk_values[at + 7u]);
        let words = stage8(lo / magnitude, hi / magnitude);
        let target_vec = start + chunk * CHUNK_VECS + lane * STAGED_VECS;
        staged[target_vec] = words.first;
        staged[target_vec + STAGED_VECS - 1u] = select(words.first, words.last, STAGED_VECS == 2u);
        if (lane == 0u) {
            var squares = 0.0;
            for (var i = 0u; i < 32u; i++) {
                squares += chunk_squares[i];
            }
            staged[start + magnitudes_at(quads, chunk / 4u)][chunk % 4u] = bitcast<u32>(magnitude);
            staged[start + squares_at(quads, chunk / 4u)][chunk % 4u] = bitcast<u32>(squares);
        }
    }
    // Orders these reads before the writes of another call.
    workgroupBarrier();
}
