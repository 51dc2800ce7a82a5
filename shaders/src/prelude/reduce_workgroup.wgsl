// Axis reduce = workgroup: sums over the WG invocations of a workgroup by a tree in workgroup memory.

// The lower half of a level adds in registers what the upper half wrote.
var<workgroup> reduce_scratch: array<vec4<f32>, WG / 2u>;

// Sum of `value` over the workgroup, returned to every invocation; call in uniform control flow.
fn workgroup_sum4(value: vec4<f32>, local_index: u32) -> vec4<f32> {
    var total = value;
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        if (local_index >= half && local_index < 2u * half) {
            reduce_scratch[local_index - half] = total;
        }
        // Orders the writes of a level before its reads.
        workgroupBarrier();
        if (local_index < half) {
            total += reduce_scratch[local_index];
        }
        // Orders these reads before the writes of the next level.
        workgroupBarrier();
    }
    if (local_index == 0u) {
        reduce_scratch[0] = total;
    }
    // Orders the total before its reads, and after that these reads before the writes of a following call.
    workgroupBarrier();
    total = reduce_scratch[0];
    workgroupBarrier();
    return total;
}

fn workgroup_sum(value: f32, local_index: u32) -> f32 {
    return workgroup_sum4(vec4<f32>(value, 0.0, 0.0, 0.0), local_index).x;
}
