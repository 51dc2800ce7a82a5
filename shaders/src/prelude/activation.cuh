// The function on the gate of a gated MLP, and bounded scores.
#pragma once
#include "device.cuh"

constexpr u32 SILU = 0;
constexpr u32 GELU_TANH = 1;
constexpr u32 GELU = 2;

// erf by Abramowitz and Stegun 7.1.26: at most 1.5e-7 off.
DEVICE float erf_of(float v) {
    const float t = 1.f / (1.f + 0.3275911f * fabsf(v));
    const float poly = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    return copysignf(1.f - poly * exp_fast(-v * v), v);
}

DEVICE float activate(float v, u32 activation) {
    if (activation == GELU) return 0.5f * v * (1.f + erf_of(v * 0.70710678f));
    // v / 2 * (1 + tanh(z / 2)) is v / (1 + exp(-z)).
    const float z = activation == GELU_TANH ? 1.5957691f * (v + 0.044715f * v * v * v) : v;
    return v / (1.f + exp_fast(-z));
}

// cap * tanh(v), or v where there is no cap.
DEVICE float bounded(float v, float cap) {
    // 1 - tanh is 2 / (1 + exp(2 v)).
    return cap > 0.f ? cap - 2.f * cap / (1.f + exp_fast(2.f * v)) : v;
}
