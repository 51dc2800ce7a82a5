//! Weights that make up for what earlier rounding did to their inputs.
//!
//! A module of a packed model sees inputs x' that differ from the exact model's x. Its best weights are then not those
//! of the source but the ones that map x' to what the source makes of x: W + E x'ᵀ H⁻¹ with E the error of the module's
//! output and H the second moments of x' (QEP, Arai and Ichikawa 2025; GPTAQ, Li et al. 2025). Where the output is added
//! to the residual stream, E can include what the stream itself lost before.

use serde::{Deserialize, Serialize};

use super::Moments;
use super::gptq::{self, Factor};
use crate::decoder::Linear;
use crate::math::{Threads, View, gemm};

/// How far weights follow their inputs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Share of the correction that is applied.
    pub share: f32,
    /// Share of the error of the residual stream that modules writing to it make up for.
    pub residual: f32,
    /// Share of the mean of the diagonal of H that is added to its diagonal.
    pub damp: f32,
}

impl Default for Options {
    fn default() -> Self {
        Self { share: 1.0, residual: 1.0, damp: 0.03 }
    }
}

/// Sums of products of errors and inputs.
#[derive(Debug)]
pub(crate) enum Cross {
    /// Of the error of the input itself, (k, k): modules that read it multiply by their weights.
    Input(Vec<f32>),
    /// Of the error of the output, (n, k).
    Output(Vec<f32>),
}

impl Cross {
    /// Adds rows: errors (tokens, k or n) and inputs (tokens, k).
    pub fn add(&mut self, threads: Threads, errors: &[f32], x: &[f32], k: usize) {
        let (Self::Input(sums) | Self::Output(sums)) = self;
        let n = sums.len() / k;
        gemm(threads, 1.0, View::new(errors, n).t(), View::new(x, k), 1.0, sums, k);
    }
}

/// The corrected weight (n, k) of `linear`; `None` where the moments cannot be factorised.
pub(crate) fn corrected(
    threads: Threads,
    linear: &Linear,
    cross: &Cross,
    factor: &Factor,
    options: Options,
) -> Vec<f32> {
    let k = linear.k;
    let mut change = match cross {
        Cross::Output(sums) => sums.clone(),
        Cross::Input(sums) => {
            let mut out = vec![0.0; linear.weight.len()];
            gemm(threads, 1.0, View::new(&linear.weight, k), View::new(sums, k), 0.0, &mut out, k);
            out
        }
    };
    factor.solve(threads, &mut change);
    let share = options.share;
    linear.weight.iter().zip(change).map(|(w, c)| w + share * c).collect()
}

/// The factor that corrections are solved with.
pub(crate) fn factor(threads: Threads, moments: &Moments, options: Options) -> Option<Factor> {
    Factor::new(threads, moments, gptq::Options { damp: options.damp, act_order: false, refit: false })
}
