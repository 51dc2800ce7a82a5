// Axis elem = f16: codes and inputs are multiplied in half precision, at most four products deep, and summed in f32.

alias Elem = f16;
alias Elem4 = vec4<f16>;

// Eight inputs as pairs (i, i + 4), the pairs that one mask takes out of a word of codes.
struct Inputs8 {
    x04: vec2<f16>,
    x15: vec2<f16>,
    x26: vec2<f16>,
    x37: vec2<f16>,
}

// Magnitude that inputs are divided by, so that no input, product or partial sum leaves the range of f16.
fn input_magnitude(largest: f32) -> f32 {
    return max(largest, 1e-30);
}

fn inputs8(lo: vec4<f32>, hi: vec4<f32>, inverse_magnitude: f32) -> Inputs8 {
    let a = lo * inverse_magnitude;
    let b = hi * inverse_magnitude;
    return Inputs8(
        vec2<f16>(vec2<f32>(a.x, b.x)),
        vec2<f16>(vec2<f32>(a.y, b.y)),
        vec2<f16>(vec2<f32>(a.z, b.z)),
        vec2<f16>(vec2<f32>(a.w, b.w)),
    );
}

// Code minus 8 of nibbles 0 and 4. 0x6400 | code is the half precision number 1024 + code, so this is exact.
fn codes04(word: u32) -> vec2<f16> {
    return vec2<f16>(unpack2x16float(0x64006400u | (word & 0x000f000fu))) - vec2<f16>(1032.0h);
}

// Sum of (code - 8) * input over the eight codes of a word.
fn code_dot(word: u32, x: Inputs8) -> f32 {
    var sum = codes04(word) * x.x04;
    sum = fma(codes04(word >> 4u), x.x15, sum);
    sum = fma(codes04(word >> 8u), x.x26, sum);
    sum = fma(codes04(word >> 12u), x.x37, sum);
    return f32(sum.x) + f32(sum.y);
}
