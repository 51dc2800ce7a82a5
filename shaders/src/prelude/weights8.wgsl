// Eight consecutive weights of an output.

struct Weights8 {
    lo: vec4<f32>,
    hi: vec4<f32>,
}

// Four numbers rounded to bfloat16, to nearest, ties to even; they are finite.
fn to_bf16(values: vec4<f32>) -> vec4<f32> {
    let bits = bitcast<vec4<u32>>(values);
    let odd = (bits >> vec4<u32>(16u)) & vec4<u32>(1u);
    return bitcast<vec4<f32>>((bits + vec4<u32>(0x7fffu) + odd) & vec4<u32>(0xffff0000u));
}
