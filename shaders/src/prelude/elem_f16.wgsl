// Axis elem = f16: codes and inputs are multiplied in half precision, at most four products deep, and summed in f32.

alias Elem = f16;
alias Elem4 = vec4<f16>;

// vec4s of words that eight staged inputs take.
const STAGED_VECS: u32 = 1u;

// Eight inputs as pairs (i, i + 4), the pairs that one mask takes out of a word of codes; of those pairs that the mask
// leaves shifted left by four bits, a sixteenth.
struct Inputs8 {
    x0415: Elem4,
    x2637: Elem4,
}

// Eight inputs in [-1, 1] as words, and back; f32 needs both vec4s.
struct Staged8 {
    first: vec4<u32>,
    last: vec4<u32>,
}

fn stage8(lo: vec4<f32>, hi: vec4<f32>) -> Staged8 {
    let words = vec4<u32>(
        pack2x16float(vec2<f32>(lo.x, hi.x)),
        pack2x16float(vec2<f32>(lo.y, hi.y) * 0.0625),
        pack2x16float(vec2<f32>(lo.z, hi.z)),
        pack2x16float(vec2<f32>(lo.w, hi.w) * 0.0625),
    );
    return Staged8(words, words);
}

fn inputs8(first: vec4<u32>, last: vec4<u32>) -> Inputs8 {
    return Inputs8(
        Elem4(vec4<f32>(unpack2x16float(first.x), unpack2x16float(first.y))),
        Elem4(vec4<f32>(unpack2x16float(first.z), unpack2x16float(first.w))),
    );
}

// Sum of the eight inputs.
fn inputs8_sum(x: Inputs8) -> f32 {
    return dot(vec4<f32>(x.x0415) + vec4<f32>(x.x2637), vec4<f32>(1.0, 1.0, 16.0, 16.0));
}

// What code_dot subtracts from 1024 + code and from 1024 + 16 * code; exact for an integral zero.
fn code_base(zero: f32) -> Elem4 {
    return Elem4(vec4<f32>(vec2<f32>(1024.0 + zero), vec2<f32>(1024.0 + 16.0 * zero)));
}

// Two halves of a word whose bits 0 to 3 or 4 to 7 are codes: 0x6400 | bits is the half precision number 1024 + bits.
fn magic(bits: u32) -> vec2<f16> {
    return vec2<f16>(unpack2x16float(0x64006400u | bits));
}

// Sum of (code - zero) * input over the eight codes of a word.
fn code_dot(word: u32, x: Inputs8, base: Elem4) -> f32 {
    let high = word >> 8u;
    var sum = (magic(word & 0x000f000fu) - base.xy) * x.x0415.xy;
    sum = fma(magic(word & 0x00f000f0u) - base.zw, x.x0415.zw, sum);
    sum = fma(magic(high & 0x000f000fu) - base.xy, x.x2637.xy, sum);
    sum = fma(magic(high & 0x00f000f0u) - base.zw, x.x2637.zw, sum);
    return f32(sum.x) + f32(sum.y);
}
