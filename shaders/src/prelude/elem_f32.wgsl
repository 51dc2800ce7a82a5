// Axis elem = f32: weights are dequantised and multiplied in single precision.

alias Elem = f32;
alias Elem4 = vec4<f32>;

// vec4s of words that eight staged inputs take.
const STAGED_VECS: u32 = 2u;

// Eight inputs as pairs (i, i + 4), the pairs that one mask takes out of a word of codes.
struct Inputs8 {
    x0415: Elem4,
    x2637: Elem4,
}

// Eight inputs in [-1, 1] as words, and back.
struct Staged8 {
    first: vec4<u32>,
    last: vec4<u32>,
}

fn stage8(lo: vec4<f32>, hi: vec4<f32>) -> Staged8 {
    let x0415 = vec4<f32>(lo.x, hi.x, lo.y, hi.y);
    let x2637 = vec4<f32>(lo.z, hi.z, lo.w, hi.w);
    return Staged8(bitcast<vec4<u32>>(x0415), bitcast<vec4<u32>>(x2637));
}

fn inputs8(first: vec4<u32>, last: vec4<u32>) -> Inputs8 {
    return Inputs8(bitcast<vec4<f32>>(first), bitcast<vec4<f32>>(last));
}

// Sum of the eight inputs.
fn inputs8_sum(x: Inputs8) -> f32 {
    return dot(x.x0415 + x.x2637, vec4<f32>(1.0));
}

// What code_dot subtracts from 1024 + code.
fn code_base(zero: f32) -> Elem4 {
    return vec4<f32>(1024.0 + zero);
}

// Sum of (code - zero) * input over the eight codes of a word. 0x6400 | code is the half precision number 1024 + code.
fn code_dot(word: u32, x: Inputs8, base: Elem4) -> f32 {
    let c04 = unpack2x16float(0x64006400u | (word & 0x000f000fu));
    let c15 = unpack2x16float(0x64006400u | ((word >> 4u) & 0x000f000fu));
    let c26 = unpack2x16float(0x64006400u | ((word >> 8u) & 0x000f000fu));
    let c37 = unpack2x16float(0x64006400u | ((word >> 12u) & 0x000f000fu));
    return dot(vec4<f32>(c04, c15) - base, x.x0415) + dot(vec4<f32>(c26, c37) - base, x.x2637);
}
