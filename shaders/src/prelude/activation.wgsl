// The function on the gate of a gated MLP, twin of `Activation`.

const ACTIVATION_SILU: u32 = 0u;
const ACTIVATION_GELU_TANH: u32 = 1u;

// erf by Abramowitz and Stegun 7.1.26: at most 1.5e-7 off.
fn erf(v: f32) -> f32 {
    let t = 1.0 / (1.0 + 0.3275911 * abs(v));
    let poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
    return sign(v) * (1.0 - poly * exp(-min(v * v, 80.0)));
}

fn activate(v: f32, activation: u32) -> f32 {
    if (activation > ACTIVATION_GELU_TANH) {
        return 0.5 * v * (1.0 + erf(v * 0.70710678));
    }
    // v / 2 * (1 + tanh(z / 2)) is v / (1 + exp(-z)). exp(80) is finite; below -80 the result is smaller than any number
    // that matters.
    let z = select(v, 1.5957691 * (v + 0.044715 * v * v * v), activation == ACTIVATION_GELU_TANH);
    return v / (1.0 + exp(-max(z, -80.0)));
}
