// Eight consecutive weights of an output.

struct Weights8 {
    lo: vec4<f32>,
    hi: vec4<f32>,
}
