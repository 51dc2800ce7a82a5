//! Learned rounding: codes and scales of a whole block, moved by the gradient of the block's output error.
//!
//! Of the family of AutoRound (Cheng et al. 2023, arXiv 2309.05516): rounding is a step function, so its gradient is
//! taken as that of the identity, and parameters move by shrinking amounts that do not depend on the gradient's size.
//! Different from it: the start is the result of error compensation instead of rounding to nearest; amounts are Adam's
//! instead of the sign alone, because a step sees few tokens and the sign of a gradient that is mostly noise would move
//! every code; codes are drawn to the weights before rounding, which decides where the tokens say nothing; and tokens
//! count by the inverse of their size, as the norm behind the block will see them.

use awqua::quant::AffineMatrix;
use half::f16;
use serde::{Deserialize, Serialize};

use crate::decoder::{Block, Decoder, Gradients, Slot};
use crate::grid::{dequantize, half_scale};
use crate::math::{Threads, vectorized};
use crate::method::adam::Adam;
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
    /// How strongly a code is drawn to its weight before rounding: `code_rate` times this is the share of their distance
    /// that a step takes.
    pub decay: f32,
}

impl Options {
    /// For codes of `bits` bits. Rates were compared at 4 bits only; with 2 bits codes have further to go.
    pub fn for_bits(bits: u32) -> Self {
        let steps = 60;
        let rate = 1.0 / steps as f32;
        let (code, scale, decay) = if bits > 2 { (0.5, 0.03, 1.0) } else { (1.0, 0.1, 0.2) };
        Self { steps, tokens: 512, code_rate: code * rate, scale_rate: scale * rate, decay }
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

/// Shares of both of Adam's moments that a step keeps.
const KEEP: [f32; 2] = [0.8, 0.98];

/// How close to the boundary between two codes a parameter starts at most, in units of the distance between codes.
const MARGIN: f32 = 0.05;

/// The parameters of one matrix.
struct Learner {
    slot: Slot,
    matrix: AffineMatrix,
    /// Codes before rounding, (n, k).
    codes: Moving,
    /// (n, groups).
    scales: Moving,
}

/// Parameters and the moments of their gradients.
struct Moving {
    values: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
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

        for learner in &mut learners {
            let slot = learner.slot as usize;
            learner.step(decoder.threads, problem.meant[slot], &gradients.weights[slot], options, step);
            learner.weights(decoder.threads, &mut block.linear_mut(learner.slot).weight);
        }
    }
    for learner in learners {
        let slot = learner.slot;
        let matrix = learner.finish(decoder.threads);
        block.linear_mut(slot).weight = dequantize(decoder.threads, &matrix);
        packed[slot as usize] = Some(matrix);
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
        Self { slot, codes: Moving::new(codes), scales: Moving::new(scales), matrix }
    }

    fn max_code(&self) -> f32 {
        ((1u32 << self.matrix.bits) - 1) as f32
    }

    /// Step `step` against the gradient (n, k) of the weights, which were `meant` (n, k) before rounding.
    fn step(&mut self, threads: Threads, meant: &[f32], gradient: &[f32], options: &Options, step: usize) {
        let group = self.matrix.group_size;
        let left = 1.0 - step as f32 / options.steps as f32;
        let (code_rate, scale_rate, decay) = (options.code_rate * left, options.scale_rate * left, options.decay);
        let adam = Adam::at(step, KEEP);
        let max = self.max_code();
        // Scales first: their gradient is that of the codes the pass was computed with.
        let codes = &self.codes.values;
        let zeros = &self.matrix.zeros;
        let slopes: Vec<f32> = threads.map(zeros.len(), |g| {
            let zero = f32::from(zeros[g]);
            let pairs = codes[g * group..][..group].iter().zip(&gradient[g * group..][..group]);
            pairs.map(|(&code, &d)| d * (crate::grid::round(code.clamp(0.0, max)) - zero)).sum()
        });
        self.scales.note(threads, adam, &slopes, 1);
        let Moving { values: scales, first, second } = &mut self.scales;
        for ((scale, &first), &second) in scales.iter_mut().zip(&*first).zip(&*second) {
            let (mean, spread) = adam.direction(first, second);
            *scale *= 1.0 - scale_rate * mean / spread;
        }

        self.codes.note(threads, adam, gradient, group);
        let Moving { values: codes, first, second } = &mut self.codes;
        let (scales, first, second) = (&self.scales.values, &*first, &*second);
        threads.rows(codes, group, |at, codes| {
            for (i, codes) in codes.chunks_exact_mut(group).enumerate() {
                let g = at + i;
                let own = g * group..(g + 1) * group;
                let (inverse, zero) = (1.0 / scales[g], f32::from(zeros[g]));
                let moments = first[own.clone()].iter().zip(&second[own.clone()]);
                vectorized(|| {
                    for ((code, &meant), (&first, &second)) in codes.iter_mut().zip(&meant[own.clone()]).zip(moments) {
                        let (mean, spread) = adam.direction(first, second);
                        let away = *code - (meant * inverse + zero);
                        *code = (*code - code_rate * (mean / spread + decay * away)).clamp(-0.49, max + 0.49);
                    }
                });
            }
        });
    }

    /// The weights that the parameters stand for.
    fn weights(&self, threads: Threads, out: &mut [f32]) {
        let group = self.matrix.group_size;
        let max = self.max_code();
        threads.rows(out, group, |first, out| {
            for (i, out) in out.chunks_exact_mut(group).enumerate() {
                let g = first + i;
                let (scale, zero) = (half_scale(self.scales.values[g]), f32::from(self.matrix.zeros[g]));
                vectorized(|| {
                    for (w, &code) in out.iter_mut().zip(&self.codes.values[g * group..]) {
                        *w = (crate::grid::round(code.clamp(0.0, max)) - zero) * scale;
                    }
                });
            }
        });
    }

    fn finish(self, threads: Threads) -> AffineMatrix {
        let max = self.max_code();
        let mut codes = vec![0u8; self.codes.values.len()];
        let group = self.matrix.group_size;
        threads.rows(&mut codes, group, |first, codes| {
            for (code, &exact) in codes.iter_mut().zip(&self.codes.values[first * group..]) {
                *code = crate::grid::round(exact.clamp(0.0, max)) as u8;
            }
        });
        let scales = self.scales.values.iter().map(|&s| f16::from_f32(half_scale(s))).collect();
        AffineMatrix { codes, scales, ..self.matrix }
    }
}

impl Moving {
    fn new(values: Vec<f32>) -> Self {
        Self { first: vec![0.0; values.len()], second: vec![0.0; values.len()], values }
    }

    /// Takes the gradient into the moments; threads get multiples of `width`.
    fn note(&mut self, threads: Threads, adam: Adam, gradient: &[f32], width: usize) {
        threads.rows(&mut self.first, width, |at, moments| {
            let pairs = moments.iter_mut().zip(&gradient[at * width..]);
            vectorized(|| pairs.for_each(|(moment, &d)| adam.first(moment, d)));
        });
        threads.rows(&mut self.second, width, |at, moments| {
            let pairs = moments.iter_mut().zip(&gradient[at * width..]);
            vectorized(|| pairs.for_each(|(moment, &d)| adam.second(moment, d)));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::tiny;
    use crate::grid::Grid;

    /// `count` sequences of `tokens` random tokens, and what `block` makes of them.
    fn sequences(
        decoder: &Decoder,
        block: &Block,
        random: &mut Random,
        count: usize,
        tokens: usize,
    ) -> [Vec<Vec<f32>>; 2] {
        let inputs: Vec<Vec<f32>> = (0..count).map(|_| random.normals(tokens * decoder.config.hidden_size)).collect();
        let mut targets = inputs.clone();
        targets.iter_mut().for_each(|x| decoder.forward(block, x, &mut |_, _| {}));
        [inputs, targets]
    }

    /// `exact` rounded to the nearest codes.
    fn rounded(exact: &Block, bits: u32) -> (Block, Vec<Option<AffineMatrix>>) {
        let grid = Grid { bits, group_size: Some(32), symmetric: false };
        let mut block = exact.clone();
        let packed = Slot::ALL.iter().map(|&slot| {
            let linear = block.linear_mut(slot);
            let steps = grid.spans(&linear.weight, linear.k);
            let codes = grid.round_to_nearest(Threads::new(1), &linear.weight, linear.k, &steps);
            let matrix = grid.matrix(linear.n, linear.k, codes, &steps);
            linear.weight = dequantize(Threads::new(1), &matrix);
            Some(matrix)
        });
        let packed = packed.collect();
        (block, packed)
    }

    #[test]
    fn learning_lowers_the_error_of_the_output() {
        let (decoder, exact) = tiny(1, false);
        let [inputs, targets] = sequences(&decoder, &exact, &mut Random::new(4), 4, 24);
        for bits in [2, 4] {
            let (mut block, mut packed) = rounded(&exact, bits);
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

    #[test]
    fn codes_that_no_token_depends_on_return_to_their_weights() {
        let (_, exact) = tiny(3, false);
        let (_, packed) = rounded(&exact, 4);
        let threads = Threads::new(1);
        for (slot, matrix) in Slot::ALL.into_iter().zip(packed.into_iter().flatten()) {
            let meant = dequantize(threads, &matrix);
            let moved = matrix.codes.iter().map(|&code| if code < 15 { code + 1 } else { code - 1 }).collect();
            let mut learner = Learner::new(slot, AffineMatrix { codes: moved, ..matrix.clone() }, &meant);
            let options = Options::for_bits(4);
            let silence = vec![0.0; meant.len()];
            (0..options.steps).for_each(|step| learner.step(threads, &meant, &silence, &options, step));
            let found = learner.finish(threads);
            assert_eq!((found.codes, found.scales), (matrix.codes, matrix.scales), "{slot:?}");
        }
    }

    #[test]
    fn few_tokens_of_a_step_do_no_harm_to_others() {
        let (decoder, exact) = tiny(7, true);
        let mut random = Random::new(5);
        // A step sees two tokens, so that most of a gradient is chance; moving by its sign alone fails here.
        let [inputs, targets] = sequences(&decoder, &exact, &mut random, 60, 2);
        let [others, others_targets] = sequences(&decoder, &exact, &mut random, 4, 24);
        let (mut block, mut packed) = rounded(&exact, 4);
        let before = output_error(&decoder, &block, &others, &others_targets);
        let meant: Vec<&[f32]> = exact.linears.iter().map(|linear| &*linear.weight).collect();
        let problem = Problem { decoder: &decoder, meant: &meant, inputs: &inputs, targets: &targets };
        learn(&problem, &Options::for_bits(4), 0, &mut block, &mut packed);
        let after = output_error(&decoder, &block, &others, &others_targets);
        assert!(after < 0.8 * before, "{after} from {before}");
    }
}
