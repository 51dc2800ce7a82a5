//! Rotary position embedding: frequencies of every scaling rule, and rows of (cos, sin) for positions.
//!
//! Rules follow `modeling_rope_utils.py` of Transformers; YaRN is arXiv 2309.00071.

use std::f64::consts::PI;

use serde_json::Value;

use super::config::{invalid, unsupported};
use crate::error::Result;

/// Rotation of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Elements of a head that are rotated.
    pub rotary_dim: usize,
    /// Base of the geometric series of frequencies.
    pub theta: f64,
    /// How frequencies are changed for longer contexts.
    pub scaling: RopeScaling,
}

/// Change of the frequencies for contexts longer than the original one.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// Ratio of the new context to the old one.
        factor: f64,
    },
    /// Base grown with the length once it exceeds `original` ("dynamic NTK").
    Dynamic {
        /// Growth.
        factor: f64,
        /// Positions before growth starts.
        original: f64,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// Divisor of long wavelengths.
        factor: f64,
        /// Wavelengths above original / low are long.
        low: f64,
        /// Wavelengths below original / high are short.
        high: f64,
        /// Positions of the original training.
        original: f64,
    },
    /// YaRN: a ramp over dimensions between kept and divided frequencies, and a factor on cos and sin.
    Yarn {
        /// Divisor of slow dimensions.
        factor: f64,
        /// Positions of the original training.
        original: f64,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is divided.
        beta_slow: f64,
        /// Factor on cos and sin.
        attention_factor: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
}

impl Rope {
    /// Reads `rope_theta`, `rope_scaling` or the newer `rope_parameters`, and `partial_rotary_factor`.
    pub(super) fn from_json(config: &Value, head_dim: usize, max_positions: usize) -> Result<Self> {
        let parameters = config.get("rope_parameters").filter(|v| !v.is_null());
        let scaling = parameters.or_else(|| config.get("rope_scaling").filter(|v| !v.is_null()));
        if scaling.is_some_and(|s| !s.is_object()) {
            return Err(invalid("`rope_scaling` must be an object"));
        }
        let number = |key: &str| -> Result<Option<f64>> {
            match scaling.and_then(|s| s.get(key)).filter(|v| !v.is_null()) {
                None => Ok(None),
                Some(value) => match value.as_f64() {
                    Some(n) if n.is_finite() && n > 0.0 => Ok(Some(n)),
                    _ => Err(invalid(format!("`{key}` of `rope_scaling` must be a number above 0, found {value}"))),
                },
            }
        };
        let required = |key: &str| -> Result<f64> {
            number(key)?.ok_or_else(|| invalid(format!("`rope_scaling` has no `{key}`")))
        };
        let theta = match number("rope_theta")? {
            Some(theta) => theta,
            None => match config.get("rope_theta").filter(|v| !v.is_null()) {
                None => 10_000.0,
                Some(v) => v
                    .as_f64()
                    .filter(|t| t.is_finite() && *t > 0.0)
                    .ok_or_else(|| invalid(format!("`rope_theta` must be a number above 0, found {v}")))?,
            },
        };
        if theta <= 1.0 {
            return Err(invalid(format!("`rope_theta` must be above 1, found {theta}")));
        }
        let partial = match number("partial_rotary_factor")? {
            Some(partial) => partial,
            None => config.get("partial_rotary_factor").and_then(Value::as_f64).unwrap_or(1.0),
        };
        if partial != 1.0 {
            return Err(unsupported(format!("`partial_rotary_factor` {partial}")));
        }
        let kind = scaling.and_then(|s| s.get("rope_type").or_else(|| s.get("type")));
        let kind = match kind {
            None if scaling.is_none_or(|s| s.get("factor").is_none()) => "default",
            None => return Err(invalid("`rope_scaling` has a `factor` but no `rope_type`")),
            Some(kind) => kind.as_str().ok_or_else(|| invalid("`rope_type` must be a string"))?,
        };
        let max = max_positions as f64;
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: required("factor")? },
            "dynamic" => RopeScaling::Dynamic { factor: required("factor")?, original: max },
            "llama3" => {
                let (low, high) = (required("low_freq_factor")?, required("high_freq_factor")?);
                if low >= high {
                    return Err(invalid(format!("`low_freq_factor` {low} is not below `high_freq_factor` {high}")));
                }
                let original = required("original_max_position_embeddings")?;
                RopeScaling::Llama3 { factor: required("factor")?, low, high, original }
            }
            "yarn" => {
                let original = number("original_max_position_embeddings")?.unwrap_or(max);
                let factor = number("factor")?.unwrap_or(max / original);
                let magnitude = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
                let attention_factor = match (number("attention_factor")?, number("mscale")?, number("mscale_all_dim")?)
                {
                    (Some(given), _, _) => given,
                    (None, Some(m), Some(all)) => magnitude(m) / magnitude(all),
                    _ => magnitude(1.0),
                };
                RopeScaling::Yarn {
                    factor,
                    original,
                    beta_fast: number("beta_fast")?.unwrap_or(32.0),
                    beta_slow: number("beta_slow")?.unwrap_or(1.0),
                    attention_factor,
                    truncate: scaling.and_then(|s| s.get("truncate")).and_then(Value::as_bool).unwrap_or(true),
                }
            }
            other => return Err(unsupported(format!("rope scaling `{other}`"))),
        };
        Ok(Self { rotary_dim: head_dim, theta, scaling })
    }

    /// Positions the rotation is meant for, given the `max_position_embeddings` of the configuration.
    pub fn positions(&self, max_position_embeddings: usize) -> usize {
        match self.scaling {
            RopeScaling::Dynamic { factor, original } => (original * factor) as usize,
            _ => max_position_embeddings,
        }
    }

    /// Whether rows depend on the length of the sequence and not on the position alone.
    pub fn depends_on_length(&self) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { .. })
    }

    /// Angular frequencies, (rotary_dim / 2), and the factor on cos and sin, for a sequence of `length` tokens.
    pub fn frequencies(&self, length: usize) -> (Vec<f32>, f32) {
        let dim = self.rotary_dim as f64;
        let series = |base: f64| (0..self.rotary_dim / 2).map(move |i| base.powf(-2.0 * i as f64 / dim));
        let to_f32 = |f: f64| f as f32;
        match self.scaling {
            RopeScaling::None => (series(self.theta).map(to_f32).collect(), 1.0),
            RopeScaling::Linear { factor } => (series(self.theta).map(|f| to_f32(f / factor)).collect(), 1.0),
            RopeScaling::Dynamic { factor, original } => {
                let length = (length as f64).max(original);
                let base = self.theta * (factor * length / original - (factor - 1.0)).powf(dim / (dim - 2.0));
                (series(base).map(to_f32).collect(), 1.0)
            }
            RopeScaling::Llama3 { factor, low, high, original } => {
                let scale = |f: f64| {
                    let wavelength = 2.0 * PI / f;
                    if wavelength < original / high {
                        f
                    } else if wavelength > original / low {
                        f / factor
                    } else {
                        let t = (original / wavelength - low) / (high - low);
                        f * (t + (1.0 - t) / factor)
                    }
                };
                (series(self.theta).map(|f| to_f32(scale(f))).collect(), 1.0)
            }
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor, truncate } => {
                // Dimension at which a frequency makes `rotations` turns over the original context.
                let dimension =
                    |rotations: f64| dim * (original / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                let blend = |(i, f): (usize, f64)| {
                    let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    to_f32(f / factor * divided + f * (1.0 - divided))
                };
                (series(self.theta).enumerate().map(blend).collect(), attention_factor as f32)
            }
        }
    }

    /// Rows of (cos, sin) for positions `first..first + n` of a sequence of `length` tokens, (n, rotary_dim / 2, 2).
    pub fn rows(&self, first: usize, n: usize, length: usize) -> Vec<f32> {
        let (frequencies, magnitude) = self.frequencies(length);
        let mut rows = Vec::with_capacity(n * self.rotary_dim);
        for position in first..first + n {
            for &frequency in &frequencies {
                // The angle is rounded to f32 as the reference does; cos and sin of that angle are then exact.
                let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
                rows.push(cos as f32 * magnitude);
                rows.push(sin as f32 * magnitude);
            }
        }
        rows
    }
}
