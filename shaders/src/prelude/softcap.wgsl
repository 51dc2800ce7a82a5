// Bounded scores.

// cap * tanh(value / cap), or the value itself for a cap of 0.
fn softcap(value: f32, cap: f32) -> f32 {
    if (cap > 0.0) {
        // Beyond 15 tanh is 1 to the last bit, and some devices compute it from powers that overflow.
        return cap * tanh(clamp(value / cap, -15.0, 15.0));
    }
    return value;
}

fn softcap4(values: vec4<f32>, cap: f32) -> vec4<f32> {
    if (cap > 0.0) {
        return cap * tanh(clamp(values / cap, vec4<f32>(-15.0), vec4<f32>(15.0)));
    }
    return values;
}
