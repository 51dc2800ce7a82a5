// Axis reduce = workgroup: sums over the WG invocations of a workgroup by a tree in workgroup memory.

var<workgroup> reduce_scratch: array<vec4<f32>, WG>;

// Sum of `value` over the workgroup, returned to every invocation; call in uniform control flow.
fn workgroup_sum4(value: vec4<f32>, local_index: u32) -> vec4<f32> {
    reduce_scratch[local_index] = value;
    // Orders the writes before the reads of the tree.
    workgroupBarrier();
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        if (local_index < half) {
            reduce_scratch[local_index] += reduce_scratch[local_index + half];
        }
        // Orders one level of the tree before the next.
        workgroupBarrier();
    }
    let total = reduce_scratch[0];
    // Orders this read before the writes of a following call.
    workgroupBarrier();
    return total;
}

fn workgroup_sum(value: f32, local_index: u32) -> f32 {
    return workgroup_sum4(vec4<f32>(value, 0.0, 0.0, 0.0), local_index).x;
}
