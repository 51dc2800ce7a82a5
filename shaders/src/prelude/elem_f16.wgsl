// Axis elem = f16: codes and inputs are multiplied in half precision, at most four products deep, and summed in f32.

alias Elem = f16;
alias Elem4 = vec4<f16>;
const ELEM_BYTES: u32 = 2u;

// Magnitude that inputs with this norm (root of the sum of squares) are divided by before they become Elem: no input
// then leaves [-1, 1], so that no product or partial sum leaves the range of f16.
fn input_magnitude(norm: f32) -> f32 {
    return max(norm, 1e-30);
}

// Eight inputs as pairs (i, i + 4), the pairs that one mask takes out of a word of codes.
struct Inputs8 {
    x0415: Elem4,
    x2637: Elem4,
}

fn inputs8(lo: vec4<f32>, hi: vec4<f32>) -> Inputs8 {
    return Inputs8(Elem4(vec4<f32>(lo.x, hi.x, lo.y, hi.y)), Elem4(vec4<f32>(lo.z, hi.z, lo.w, hi.w)));
}

// 1024 plus nibbles 0 and 4: 0x6400 | code is the half precision number 1024 + code, so this is exact.
fn codes04(word: u32) -> vec2<f16> {
    return vec2<f16>(unpack2x16float(0x64006400u | (word & 0x000f000fu)));
}

// Sum of (code - zero) * input over the eight codes of a word; base is 1024 + zero, exact for an integral zero.
fn code_dot(word: u32, x0415: Elem4, x2637: Elem4, base: Elem) -> f32 {
    let o = vec2<f16>(base);
    var sum = (codes04(word) - o) * x0415.xy;
    sum = fma(codes04(word >> 4u) - o, x0415.zw, sum);
    sum = fma(codes04(word >> 8u) - o, x2637.xy, sum);
    sum = fma(codes04(word >> 12u) - o, x2637.zw, sum);
    return f32(sum.x) + f32(sum.y);
}
