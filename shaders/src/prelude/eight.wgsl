// Eight elements of the cache.
struct Eight {
    lo: vec4<f32>,
    hi: vec4<f32>,
}

