// Axis reduce = subgroup: sums over the WG invocations of a workgroup by subgroup operations, then workgroup memory.
// The subgroup size is only known at run time (4 to 128). Consecutive local indices fill one subgroup after the other
// in a one-dimensional workgroup, so the smallest local index of a subgroup numbers it;
// sizes are powers of two like WG, so every subgroup holds the same number of lanes.

// One slot for each subgroup of the smallest size.
var<workgroup> reduce_scratch: array<vec4<f32>, WG / 4u>;

// Sum of `value` over the workgroup, returned to every invocation; call in uniform control flow.
fn workgroup_sum4(value: vec4<f32>, local_index: u32) -> vec4<f32> {
    // Orders the reads of an earlier call before these writes, and brings the lanes of a subgroup together again after
    // loops that some of them left early.
    workgroupBarrier();
    let subgroup_total = subgroupAdd(value);
    let first = subgroupMin(local_index);
    let lanes = subgroupAdd(1u);
    if (local_index == first) {
        reduce_scratch[first / lanes] = subgroup_total;
    }
    // Orders the subgroups' sums before the reads.
    workgroupBarrier();
    var total = reduce_scratch[0];
    for (var i = 1u; i < (WG + lanes - 1u) / lanes; i++) {
        total += reduce_scratch[i];
    }
    return total;
}

fn workgroup_sum(value: f32, local_index: u32) -> f32 {
    return workgroup_sum4(vec4<f32>(value, 0.0, 0.0, 0.0), local_index).x;
}
