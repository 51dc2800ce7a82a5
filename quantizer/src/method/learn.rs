//! Learned rounding: codes and scales of a whole block, moved by signed gradients of the block's output error.
//!
//! Of the family of AutoRound (Cheng et al. 2023, arXiv 2309.05516): rounding is a step function, so its gradient is
//! taken as that of the identity, and every parameter moves by a fixed, shrinking amount in the direction of the sign.
//! Different from it: the start is the result of error compensation instead of rounding to nearest, the sign is that of
//! a running mean because a step sees few tokens, and tokens count by the inverse of their size, as the norm behind the
//! block will see them.

use awqua::quant::AffineMatrix;
use half::f16;
use serde::{Deserialize, Serialize};

use crate::decoder::{Block, Decoder, Gradients, Slot};
use crate::grid::{dequantize, half_scale};
use crate::math::{Threads, vectorized};
use crate::random::Random;

/// How rounding is learned.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Steps of a block.
    pub steps: usize,
    /// Tokens of a step, from one sequence.
    pub tokens: usize,
    /// First step of a code, in units of the distance between codes; falls to 0.
    pub code_rate: f32,
    /// First step of a scale, relative to it; falls to 0.
    pub scale_rate: f32,
    /// First step of a norm weight, relative to the mean magnitude of the norm's weights; falls to 0.
    pub norm_rate: f32,
    /// Share of the running mean that a step keeps.
    pub momentum: f32,
}

impl Options {
    /// What worked best for codes of `bits` bits.
    pub fn for_bits(bits: u32) -> Self {
        let steps = if bits >= 4 { 60 } else { 100 };
        let rate = 1.0 / steps as f32;
        let scale_rate = if bits >= 4 { 0.1 } else { 0.2 } * rate;
        Self { steps, tokens: 512, code_rate: 1.5 * rate, scale_rate, norm_rate: 0.0, momentum: 0.8 }
    }
}

/// One block and what it should compute.
pub(crate) struct Problem<'a> {
    pub decoder: &'a Decoder,
    /// Weights before rounding, in the order of [`Slot::ALL`].
    pub meant: &'a [&'a [f32]],
    /// What enters it, (length, hidden) a sequence.
    pub inputs: &'a [Vec<f32>],
    /// What should leave it.
    pub targets: &'a [Vec<f32>],
}

/// How close to the boundary between two codes a parameter starts at most, in units of the distance between codes.
const MARGIN: f32 = 0.05;

/// The parameters of one matrix.
struct Learner {
    slot: Slot,
    matrix: AffineMatrix,
    /// Codes before rounding, (n, k).
    codes: Vec<f32>,
    code_means: Vec<f32>,
    /// (n, groups).
    scales: Vec<f32>,
    scale_means: Vec<f32>,
}

/// Moves the codes and scales of `packed`, and with them the weights of `block`, towards the targets.
pub(crate) fn learn(
    problem: &Problem<'_>,
    options: &Options,
    seed: u64,
    block: &mut Block,
    packed: &mut [Option<AffineMatrix>],
) {
    let decoder = problem.decoder;
    let hidden = decoder.config.hidden_size;
    let mut learners: Vec<Learner> = Slot::ALL
        .iter()
        .filter_map(|&slot| Some(Learner::new(slot, packed[slot as usize].take()?, problem.meant[slot as usize])))
        .collect();
    let mut norms = [NormLearner::new(&block.input_norm), NormLearner::new(&block.post_norm)];
    let mut random = Random::new(seed);
    let mut gradients = Gradients::zeros(block);
    let mut order: Vec<usize> = Vec::new();
    for step in 0..options.steps {
        if order.is_empty() {
            order = (0..problem.inputs.len()).collect();
            // Fisher and Yates.
            (1..order.len()).rev().for_each(|i| order.swap(i, random.below(i + 1)));
        }
        let Some(sequence) = order.pop() else { break };
        let (x, y) = (&problem.inputs[sequence], &problem.targets[sequence]);
        let length = options.tokens.min(x.len() / hidden) * hidden;
        let trace = decoder.trace(block, &x[..length]);
        let d_out = output_gradient(&trace.out, &y[..length], hidden);
        gradients.clear();
        decoder.backward(block, &trace, &d_out, &mut gradients);
        drop(trace);

        let left = 1.0 - step as f32 / options.steps as f32;
        for learner in &mut learners {
            let gradient = &gradients.weights[learner.slot as usize];
            learner.step(decoder.threads, gradient, options, left);
            learner.weights(decoder.threads, &mut block.linear_mut(learner.slot).weight);
        }
        if options.norm_rate > 0.0 {
            norms[0].step(&gradients.input_norm, &mut block.input_norm, options, left);
            norms[1].step(&gradients.post_norm, &mut block.post_norm, options, left);
        }
    }
    for learner in learners {
        let slot = learner.slot;
        let matrix = learner.finish(decoder.threads);
        block.linear_mut(slot).weight = dequantize(decoder.threads, &matrix);
        packed[slot as usize] = Some(matrix);
    }
    for norm in [&mut block.input_norm, &mut block.post_norm] {
        norm.iter_mut().for_each(|w| *w = f16::from_f32(*w).to_f32());
    }
}

/// Gradient of the sum over tokens of |out - target|² / |target|².
fn output_gradient(out: &[f32], target: &[f32], hidden: usize) -> Vec<f32> {
    let mut gradient = Vec::with_capacity(out.len());
    for (out, target) in out.chunks_exact(hidden).zip(target.chunks_exact(hidden)) {
        let size: f64 = target.iter().map(|&y| f64::from(y).powi(2)).sum();
        let weight = (2.0 / (size + 1e-6)) as f32;
        gradient.extend(out.iter().zip(target).map(|(o, y)| weight * (o - y)));
    }
    gradient
}

/// Relative squared error of the block's output over all tokens, each by its own size.
pub(crate) fn output_error(decoder: &Decoder, block: &Block, inputs: &[Vec<f32>], targets: &[Vec<f32>]) -> f64 {
    let hidden = decoder.config.hidden_size;
    let (mut sum, mut tokens) = (0.0, 0);
    for (x, y) in inputs.iter().zip(targets) {
        let mut out = x.clone();
        decoder.forward(block, &mut out, &mut |_, _| {});
        for (o, y) in out.chunks_exact(hidden).zip(y.chunks_exact(hidden)) {
            let size: f64 = y.iter().map(|&y| f64::from(y).powi(2)).sum();
            sum += o.iter().zip(y).map(|(o, y)| f64::from(o - y).powi(2)).sum::<f64>() / (size + 1e-6);
            tokens += 1;
        }
    }
    sum / f64::from(tokens.max(1))
}

impl Learner {
    fn new(slot: Slot, matrix: AffineMatrix, meant: &[f32]) -> Self {
        let scales: Vec<f32> = matrix.scales.iter().map(|s| s.to_f32()).collect();
        let codes = matrix
            .codes
            .iter()
            .zip(meant)
            .enumerate()
            .map(|(i, (&code, &w))| {
                let group = i / matrix.group_size;
                let exact = w / scales[group] + f32::from(matrix.zeros[group]);
                let code = f32::from(code);
                exact.clamp(code - 0.5 + MARGIN, code + 0.5 - MARGIN)
            })
            .collect::<Vec<f32>>();
        Self { slot, code_means: vec![0.0; codes.len()], scale_means: vec![0.0; scales.len()], codes, scales, matrix }
    }

    fn max_code(&self) -> f32 {
        ((1u32 << self.matrix.bits) - 1) as f32
    }

    /// One step against the gradient (n, k) of the weights.
    fn step(&mut self, threads: Threads, gradient: &[f32], options: &Options, left: f32) {
        let group = self.matrix.group_size;
        let (code_rate, scale_rate, keep) = (options.code_rate * left, options.scale_rate * left, options.momentum);
        let max = self.max_code();
        // Scales first: their gradient is that of the codes the pass was computed with.
        let codes = &self.codes;
        let zeros = &self.matrix.zeros;
        let slopes: Vec<f32> = threads.map(self.scales.len(), |g| {
            let zero = f32::from(zeros[g]);
            let pairs = codes[g * group..][..group].iter().zip(&gradient[g * group..][..group]);
            pairs.map(|(&code, &d)| d * (crate::grid::round(code.clamp(0.0, max)) - zero)).sum()
        });
        for ((scale, mean), slope) in self.scales.iter_mut().zip(&mut self.scale_means).zip(slopes) {
            *mean = keep * *mean + (1.0 - keep) * slope;
            *scale *= 1.0 - scale_rate * sign(*mean);
        }
        let means = &mut self.code_means;
        threads.rows(means, group, |first, means| {
            vectorized(|| {
                for (mean, d) in means.iter_mut().zip(&gradient[first * group..]) {
                    *mean = keep * *mean + (1.0 - keep) * d;
                }
            });
        });
        let means = &self.code_means;
        threads.rows(&mut self.codes, group, |first, codes| {
            vectorized(|| {
                for (code, &mean) in codes.iter_mut().zip(&means[first * group..]) {
                    *code = (*code - code_rate * sign(mean)).clamp(-0.49, max + 0.49);
                }
            });
        });
    }

    /// The weights that the parameters stand for.
    fn weights(&self, threads: Threads, out: &mut [f32]) {
        let group = self.matrix.group_size;
        let max = self.max_code();
        threads.rows(out, group, |first, out| {
            for (i, out) in out.chunks_exact_mut(group).enumerate() {
                let g = first + i;
                let (scale, zero) = (half_scale(self.scales[g]), f32::from(self.matrix.zeros[g]));
                vectorized(|| {
                    for (w, &code) in out.iter_mut().zip(&self.codes[g * group..]) {
                        *w = (crate::grid::round(code.clamp(0.0, max)) - zero) * scale;
                    }
                });
            }
        });
    }

    fn finish(self, threads: Threads) -> AffineMatrix {
        let max = self.max_code();
        let mut codes = vec![0u8; self.codes.len()];
        let group = self.matrix.group_size;
        threads.rows(&mut codes, group, |first, codes| {
            for (code, &exact) in codes.iter_mut().zip(&self.codes[first * group..]) {
                *code = crate::grid::round(exact.clamp(0.0, max)) as u8;
            }
        });
        let scales = self.scales.iter().map(|&s| f16::from_f32(half_scale(s))).collect();
        AffineMatrix { codes, scales, ..self.matrix }
    }
}

/// The weight of a norm, moved in the same way.
struct NormLearner {
    mean: Vec<f32>,
    size: f32,
}

impl NormLearner {
    fn new(weight: &[f32]) -> Self {
        let size = weight.iter().map(|w| w.abs()).sum::<f32>() / weight.len().max(1) as f32;
        Self { mean: vec![0.0; weight.len()], size }
    }

    fn step(&mut self, gradient: &[f32], weight: &mut [f32], options: &Options, left: f32) {
        let rate = options.norm_rate * left * self.size;
        for ((w, mean), d) in weight.iter_mut().zip(&mut self.mean).zip(gradient) {
            *mean = options.momentum * *mean + (1.0 - options.momentum) * d;
            *w -= rate * sign(*mean);
        }
    }
}

/// -1, 0 or 1; `f32::signum` has no 0.
#[inline]
fn sign(x: f32) -> f32 {
    f32::from(x > 0.0) - f32::from(x < 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::tiny;
    use crate::grid::Grid;

    #[test]
    fn learning_lowers_the_error_of_the_output() {
        let (decoder, exact) = tiny(1, false);
        let hidden = decoder.config.hidden_size;
        let mut random = Random::new(4);
        let inputs: Vec<Vec<f32>> = (0..4).map(|_| random.normals(24 * hidden)).collect();
        let mut targets = inputs.clone();
        targets.iter_mut().for_each(|x| decoder.forward(&exact, x, &mut |_, _| {}));
        for bits in [2, 4] {
            let grid = Grid { bits, group_size: Some(32), symmetric: false };
            let mut block = exact.clone();
            let mut packed: Vec<Option<AffineMatrix>> = Slot::ALL
                .iter()
                .map(|&slot| {
                    let linear = block.linear_mut(slot);
                    let steps = grid.spans(&linear.weight, linear.k);
                    let codes = grid.round_to_nearest(Threads::new(1), &linear.weight, linear.k, &steps);
                    let matrix = grid.matrix(linear.n, linear.k, codes, &steps);
                    linear.weight = dequantize(Threads::new(1), &matrix);
                    Some(matrix)
                })
                .collect();
            let before = output_error(&decoder, &block, &inputs, &targets);
            let meant: Vec<&[f32]> = exact.linears.iter().map(|linear| &*linear.weight).collect();
            let problem = Problem { decoder: &decoder, meant: &meant, inputs: &inputs, targets: &targets };
            learn(&problem, &Options::for_bits(bits), 0, &mut block, &mut packed);
            let after = output_error(&decoder, &block, &inputs, &targets);
            assert!(after < 0.7 * before, "{bits} bits: {after} from {before}");
            for (slot, matrix) in Slot::ALL.iter().zip(&packed) {
                let matrix = matrix.as_ref().unwrap();
                matrix.check().unwrap();
                assert_eq!(dequantize(Threads::new(1), matrix), block.linear(*slot).weight);
            }
        }
    }
}
