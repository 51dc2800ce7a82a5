//! Staged inputs, twin of `prelude/stage.wgsl`: what the `gemv_w4` kernels multiply with, prepared once.

use crate::trial::{self, Expected, Values};
use crate::{Elem, Rng};

/// Where things lie in a row of staged inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Inputs.
    pub k: usize,
    /// Type they are multiplied in.
    pub elem: Elem,
}

/// Inputs of a quad of chunks.
const QUAD_K: usize = 128;

impl Layout {
    /// Quads of a row; the last one is padded.
    pub fn quads(&self) -> usize {
        self.k.div_ceil(QUAD_K)
    }

    /// Words of the inputs of a row, the padding included.
    fn input_words(&self) -> usize {
        self.quads() * QUAD_K / if self.elem == Elem::F16 { 2 } else { 1 }
    }

    /// Words of a row.
    pub fn words(&self) -> usize {
        self.input_words() + 2 * 4 * self.quads()
    }

    /// Stages a row; `factors` are the weights of the norm, or `None`. Padding is zero.
    pub fn stage(&self, x: &[f32], factors: Option<&[f32]>) -> Vec<u32> {
        let parts = self.parts(x, factors);
        let mut words = match self.elem {
            Elem::F16 => trial::pack_halves(&parts.inputs),
            Elem::F32 => trial::words(&parts.inputs),
        };
        words.extend(trial::words(&parts.magnitudes));
        words.extend(trial::words(&parts.squares));
        words
    }

    fn parts(&self, x: &[f32], factors: Option<&[f32]>) -> Parts {
        let quads = self.quads();
        let mut parts = Parts {
            inputs: vec![0.0; quads * QUAD_K],
            magnitudes: vec![0.0; 4 * quads],
            squares: vec![0.0; 4 * quads],
        };
        for (chunk, x) in x.chunks(32).enumerate() {
            let weighted: Vec<f32> =
                x.iter().enumerate().map(|(i, v)| v * factors.map_or(1.0, |f| f[chunk * 32 + i])).collect();
            let magnitude = weighted.iter().fold(1.2e-38_f32, |m, v| m.max(v.abs()));
            parts.magnitudes[chunk] = magnitude;
            parts.squares[chunk] = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() as f32;
            for (i, value) in weighted.iter().enumerate() {
                // Pairs (i, i + 4) of each eight; odd ones are a sixteenth in half precision.
                let (eight, place) = (i / 8, i % 8);
                let odd = if self.elem == Elem::F16 && place % 2 == 1 { 0.0625 } else { 1.0 };
                parts.inputs[chunk * 32 + eight * 8 + place % 4 * 2 + place / 4] = value / magnitude * odd;
            }
        }
        parts
    }

    /// What binding `binding` holds in row `row` after `x` was staged with an absolute error of at most `error` in any
    /// element before `factors`.
    pub(crate) fn expected(
        &self,
        binding: u32,
        row: usize,
        x: &[f32],
        factors: Option<&[f32]>,
        error: f32,
    ) -> [Expected; 3] {
        let parts = self.parts(x, factors);
        let weight = factors.map_or(1.0, |f| f.iter().fold(0.0_f32, |m, v| m.max(v.abs())));
        let start = row * self.words();
        let at = |start: usize, values: Values, tolerance: Vec<f32>| Expected {
            start: Some(start),
            ..Expected { binding, values, tolerance, ..Expected::exact(binding, Vec::new()) }
        };
        // A magnitude that is off moves the inputs of its chunk; a largest input moves by nothing.
        let inputs_error: Vec<f32> = parts
            .inputs
            .iter()
            .enumerate()
            .map(|(i, v)| {
                let magnitude = parts.magnitudes[i / 32];
                if magnitude == 0.0 { 0.0 } else { 2.0 * error * weight / magnitude + 1e-3 * v.abs() + 1e-7 }
            })
            .collect();
        let inputs = match self.elem {
            Elem::F16 => Values::F16(parts.inputs),
            Elem::F32 => Values::F32(parts.inputs),
        };
        let magnitudes_error = parts.magnitudes.iter().map(|m| error * weight + 1e-6 * m).collect();
        let squares_error =
            parts.squares.iter().map(|s| 2.0 * error * (32.0 * s).sqrt() + 32.0 * error * error + 1e-5 * s).collect();
        let quads = self.quads();
        [
            at(start, inputs, inputs_error),
            at(start + self.input_words(), Values::F32(parts.magnitudes), magnitudes_error),
            at(start + self.input_words() + 4 * quads, Values::F32(parts.squares), squares_error),
        ]
    }

    /// An empty buffer for `rows` rows: zeros, because nobody writes the padding.
    pub(crate) fn empty(&self, rows: usize) -> Vec<u32> {
        vec![0; rows * self.words()]
    }
}

struct Parts {
    inputs: Vec<f32>,
    magnitudes: Vec<f32>,
    squares: Vec<f32>,
}

/// A norm weight for staging: mostly around 1, some tiny, some large.
pub(crate) fn random_norm(k: usize, rng: &mut Rng) -> Vec<f32> {
    rng.values(k, 2.0)
}
