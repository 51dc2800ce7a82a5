// Axis elem = f32: weights are dequantised and multiplied in single precision.

alias Elem = f32;
alias Elem4 = vec4<f32>;
const ELEM_BYTES: u32 = 4u;

// Magnitude that inputs are divided by before they become Elem; 1 as f32 holds any input.
fn input_magnitude(norm: f32) -> f32 {
    return 1.0;
}

// Eight inputs as pairs (i, i + 4), the pairs that one mask takes out of a word of codes.
struct Inputs8 {
    x0415: Elem4,
    x2637: Elem4,
}

fn inputs8(lo: vec4<f32>, hi: vec4<f32>) -> Inputs8 {
    return Inputs8(vec4<f32>(lo.x, hi.x, lo.y, hi.y), vec4<f32>(lo.z, hi.z, lo.w, hi.w));
}

// Sum of (code - zero) * input over the eight codes of a word; base is 1024 + zero. 0x6400 | code is the half
// precision number 1024 + code.
fn code_dot(word: u32, x0415: Elem4, x2637: Elem4, base: Elem) -> f32 {
    let c04 = unpack2x16float(0x64006400u | (word & 0x000f000fu));
    let c15 = unpack2x16float(0x64006400u | ((word >> 4u) & 0x000f000fu));
    let c26 = unpack2x16float(0x64006400u | ((word >> 8u) & 0x000f000fu));
    let c37 = unpack2x16float(0x64006400u | ((word >> 12u) & 0x000f000fu));
    return dot(vec4<f32>(c04, c15) - base, x0415) + dot(vec4<f32>(c26, c37) - base, x2637);
}
