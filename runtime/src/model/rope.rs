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
    /// LongRoPE: a divisor for every frequency, one set up to the original context and another one beyond it.
    LongRope {
        /// Divisors for sequences of at most `original` tokens, (rotary_dim / 2).
        short: Vec<f64>,
        /// Divisors for longer ones.
        long: Vec<f64>,
        /// Positions of the original training.
        original: f64,
        /// Factor on cos and sin.
        attention_factor: f64,
    },
}

/// A set of rotary parameters under their keys: `rope_parameters` of newer configurations or `rope_scaling` of older ones,
/// with what the configuration itself says.
struct Parameters<'a> {
    scaling: Option<&'a Value>,
    config: &'a Value,
}

impl Parameters<'_> {
    fn value(&self, key: &str) -> Option<&Value> {
        self.scaling.and_then(|s| s.get(key)).filter(|v| !v.is_null())
    }

    fn outer(&self, key: &str) -> Result<Option<f64>> {
        positive(key, self.config.get(key).filter(|v| !v.is_null()))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        positive(&format!("{key}` of `rope_scaling"), self.value(key))
    }

    fn required(&self, key: &str) -> Result<f64> {
        self.number(key)?.ok_or_else(|| invalid(format!("`rope_scaling` has no `{key}`")))
    }

    /// `n` positive numbers.
    fn factors(&self, key: &str, n: usize) -> Result<Vec<f64>> {
        let list = self.value(key).and_then(Value::as_array);
        let list = list.ok_or_else(|| invalid(format!("`rope_scaling` has no list `{key}`")))?;
        if list.len() != n {
            return Err(invalid(format!("`{key}` of `rope_scaling` has {} entries, expected {n}", list.len())));
        }
        let name = format!("{key}` of `rope_scaling");
        list.iter().map(|v| positive(&name, Some(v)).map(|n| n.unwrap_or(1.0))).collect()
    }
}

fn positive(key: &str, value: Option<&Value>) -> Result<Option<f64>> {
    match value {
        None => Ok(None),
        Some(value) => match value.as_f64() {
            Some(n) if n.is_finite() && n > 0.0 => Ok(Some(n)),
            _ => Err(invalid(format!("`{key}` must be a number above 0, found {value}"))),
        },
    }
}

impl Rope {
    /// Reads `rope_theta`, `rope_scaling` or the newer `rope_parameters`, and `partial_rotary_factor` where it counts.
    pub(super) fn from_json(config: &Value, head_dim: usize, max_positions: usize, partial: bool) -> Result<Self> {
        let parameters = config.get("rope_parameters").filter(|v| !v.is_null());
        // Newer files of models with windows have a set for each type of layer.
        let parameters = parameters.map(|p| p.get("full_attention").unwrap_or(p));
        let scaling = parameters.or_else(|| config.get("rope_scaling").filter(|v| !v.is_null()));
        Self::read(&Parameters { scaling, config }, head_dim, max_positions, partial)
    }

    /// The rotation of layers with a window where it is another one: `rope_local_base_freq`, never scaled.
    pub(super) fn local_from_json(config: &Value, head_dim: usize, max_positions: usize) -> Result<Self> {
        if let Some(scaling) = config.get("rope_parameters").and_then(|p| p.get("sliding_attention")) {
            return Self::read(&Parameters { scaling: Some(scaling), config }, head_dim, max_positions, false);
        }
        let theta = Parameters { scaling: None, config }.outer("rope_local_base_freq")?.unwrap_or(10_000.0);
        Self::new(theta, head_dim, RopeScaling::None)
    }

    fn new(theta: f64, rotary_dim: usize, scaling: RopeScaling) -> Result<Self> {
        if theta <= 1.0 {
            return Err(invalid(format!("`rope_theta` must be above 1, found {theta}")));
        }
        Ok(Self { rotary_dim, theta, scaling })
    }

    fn read(parameters: &Parameters<'_>, head_dim: usize, max_positions: usize, partial: bool) -> Result<Self> {
        let scaling = parameters.scaling;
        if scaling.is_some_and(|s| !s.is_object()) {
            return Err(invalid("`rope_scaling` must be an object"));
        }
        let (number, required) = (|key: &str| parameters.number(key), |key: &str| parameters.required(key));
        let theta = match number("rope_theta")? {
            Some(theta) => theta,
            None => parameters.outer("rope_theta")?.unwrap_or(10_000.0),
        };
        let factor = match number("partial_rotary_factor")? {
            Some(factor) => factor,
            None => parameters.outer("partial_rotary_factor")?.unwrap_or(1.0),
        };
        let rotary_dim = (head_dim as f64 * factor) as usize;
        if factor != 1.0 && !partial {
            return Err(unsupported(format!("`partial_rotary_factor` {factor} of this architecture")));
        }
        if factor > 1.0 || rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            let message =
                format!("`partial_rotary_factor` {factor} of heads of {head_dim} (an even number of elements)");
            return Err(unsupported(message));
        }
        let kind = scaling.and_then(|s| s.get("rope_type").or_else(|| s.get("type")));
        let kind = match kind {
            None if scaling.is_none_or(|s| s.get("factor").is_none()) => "default",
            None => return Err(invalid("`rope_scaling` has a `factor` but no `rope_type`")),
            Some(kind) => kind.as_str().ok_or_else(|| invalid("`rope_type` must be a string"))?,
        };
        let max = max_positions as f64;
        // Early files of Phi-3 have other names for LongRoPE.
        let long = kind == "su" || kind == "yarn" && scaling.is_some_and(|s| s.get("long_factor").is_some());
        let scaling = match kind {
            _ if long || kind == "longrope" => {
                let original = match number("original_max_position_embeddings")? {
                    Some(original) => Some(original),
                    None => parameters.outer("original_max_position_embeddings")?,
                };
                let factor = match original {
                    Some(original) => max / original,
                    None => required("factor")?,
                };
                let original = original.unwrap_or(max);
                for key in ["short_mscale", "long_mscale"] {
                    if number(key)?.is_some_and(|m| m != 1.0) {
                        return Err(unsupported(format!("`{key}` of `rope_scaling`")));
                    }
                }
                let attention_factor = match number("attention_factor")? {
                    Some(given) => given,
                    None if factor <= 1.0 => 1.0,
                    None => (1.0 + factor.ln() / original.ln()).sqrt(),
                };
                RopeScaling::LongRope {
                    short: parameters.factors("short_factor", rotary_dim / 2)?,
                    long: parameters.factors("long_factor", rotary_dim / 2)?,
                    original,
                    attention_factor,
                }
            }
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
                    truncate: parameters.value("truncate").and_then(Value::as_bool).unwrap_or(true),
                }
            }
            other => return Err(unsupported(format!("rope scaling `{other}`"))),
        };
        Self::new(theta, rotary_dim, scaling)
    }

    /// Positions the rotation is meant for, given the `max_position_embeddings` of the configuration.
    pub fn positions(&self, max_position_embeddings: usize) -> usize {
        match self.scaling {
            RopeScaling::Dynamic { factor, original } => (original * factor) as usize,
            _ => max_position_embeddings,
        }
    }

    /// Whether the rows of a position are the same in sequences of `a` and of `b` tokens.
    pub fn same_rows(&self, a: usize, b: usize) -> bool {
        match self.scaling {
            // Beyond the original length every token has frequencies of its own.
            RopeScaling::Dynamic { original, .. } => a as f64 <= original && b as f64 <= original,
            RopeScaling::LongRope { original, .. } => (a as f64 > original) == (b as f64 > original),
            _ => true,
        }
    }

    /// Whether keys must be computed again once their rows have changed: a model with LongRoPE expects all keys of a
    /// sequence to be rotated alike, whereas with dynamic scaling cached keys keep their rotation, as in Transformers.
    pub fn must_agree(&self) -> bool {
        matches!(self.scaling, RopeScaling::LongRope { .. })
    }

    /// Angular frequencies, (rotary_dim / 2), and the factor on cos and sin, for a sequence of `length` tokens.
    pub fn frequencies(&self, length: usize) -> (Vec<f32>, f32) {
        let dim = self.rotary_dim as f64;
        let series = |base: f64| (0..self.rotary_dim / 2).map(move |i| base.powf(-2.0 * i as f64 / dim));
        let to_f32 = |f: f64| f as f32;
        match &self.scaling {
            RopeScaling::None => (series(self.theta).map(to_f32).collect(), 1.0),
            &RopeScaling::Linear { factor } => (series(self.theta).map(|f| to_f32(f / factor)).collect(), 1.0),
            &RopeScaling::Dynamic { factor, original } => {
                let length = (length as f64).max(original);
                let base = self.theta * (factor * length / original - (factor - 1.0)).powf(dim / (dim - 2.0));
                (series(base).map(to_f32).collect(), 1.0)
            }
            &RopeScaling::Llama3 { factor, low, high, original } => {
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
            &RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor, truncate } => {
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
            RopeScaling::LongRope { short, long, original, attention_factor } => {
                let divisors = if length as f64 > *original { long } else { short };
                let frequencies = series(self.theta).zip(divisors).map(|(f, divisor)| to_f32(f / divisor));
                (frequencies.collect(), *attention_factor as f32)
            }
        }
    }

    /// Rows of (cos, sin) for positions `first..first + n` of a sequence of `length` tokens, (n, rotary_dim / 2, 2).
    pub fn rows(&self, first: usize, n: usize, length: usize) -> Vec<f32> {
        let mut rows = Vec::with_capacity(n * self.rotary_dim);
        let (frequencies, magnitude) = self.frequencies(length);
        append_rows(&frequencies, magnitude, first..first + n, &mut rows);
        rows
    }
}

/// Appends rows of (cos, sin) for `positions` to `rows`.
pub(crate) fn append_rows(frequencies: &[f32], magnitude: f32, positions: std::ops::Range<usize>, rows: &mut Vec<f32>) {
    for position in positions {
        for &frequency in frequencies {
            // The angle is rounded to f32 as the reference does; cos and sin of that angle are then exact.
            let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
            rows.push(cos as f32 * magnitude);
            rows.push(sin as f32 * magnitude);
        }
    }
}
