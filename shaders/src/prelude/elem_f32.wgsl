// Axis elem = f32: weights are dequantised and multiplied in single precision.

alias Elem = f32;
alias Elem4 = vec4<f32>;

// Eight inputs as they are multiplied with one word of codes.
struct Inputs8 {
    lo: vec4<f32>,
    hi: vec4<f32>,
}

// Magnitude that inputs are divided by before they become Elem; 1 as f32 holds any input.
fn input_magnitude(largest: f32) -> f32 {
    return 1.0;
}

fn inputs8(lo: vec4<f32>, hi: vec4<f32>, inverse_magnitude: f32) -> Inputs8 {
    return Inputs8(lo, hi);
}

// Sum of (code - 8) * input over the eight codes of a word. 0x6400 | code is the half precision number 1024 + code.
fn code_dot(word: u32, x: Inputs8) -> f32 {
    let c04 = unpack2x16float(0x64006400u | (word & 0x000f000fu));
    let c15 = unpack2x16float(0x64006400u | ((word >> 4u) & 0x000f000fu));
    let c26 = unpack2x16float(0x64006400u | ((word >> 8u) & 0x000f000fu));
    let c37 = unpack2x16float(0x64006400u | ((word >> 12u) & 0x000f000fu));
    let lo = vec4<f32>(c04.x, c15.x, c26.x, c37.x) - 1032.0;
    let hi = vec4<f32>(c04.y, c15.y, c26.y, c37.y) - 1032.0;
    return dot(lo, x.lo) + dot(hi, x.hi);
}
