//! The last stage: scales, norms and biases of the packed model, trained end to end.
//!
//! Blocks were rounded one at a time, each against its own output. What that cannot see, errors that add up or cancel
//! over layers, is left to the parameters that cost no bits: with codes and zero points frozen, the scales of all
//! groups, the norm weights and the biases follow the gradient of KL(source || packed) on the calibration tokens. This is
//! the second phase of EfficientQAT (Chen et al. 2024) with the source as the teacher, and of norm tweaking (Li et al.
//! 2023).

use awqua::checkpoint::Checkpoint;
use awqua::{Error, ErrorKind, Result};
use half::f16;
use serde::{Deserialize, Serialize};

use super::state::{State, Stored};
use crate::decoder::{Block, Decoder, Gradients, Head, Linear, Slot, Trace};
use crate::grid::{dequantize, half_scale};
use crate::method::adam::Adam;
use crate::random::Random;

/// How the packed model is tuned.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Passes over the calibration tokens.
    pub epochs: f32,
    /// Most tokens of a step, all of one sequence.
    pub tokens: usize,
    /// First step of a scale, relative to it; falls to 0.
    pub scale_rate: f32,
    /// First step of a norm weight or bias, relative to the mean magnitude of its tensor; falls to 0.
    pub vector_rate: f32,
}

impl Options {
    /// What worked best for codes of `bits` bits.
    pub fn for_bits(bits: u32) -> Self {
        match bits {
            2 => Self { epochs: 4.0, tokens: 256, scale_rate: 4e-3, vector_rate: 2e-3 },
            3 => Self { epochs: 3.0, tokens: 256, scale_rate: 2e-3, vector_rate: 1e-3 },
            _ => Self { epochs: 2.0, tokens: 256, scale_rate: 1e-3, vector_rate: 5e-4 },
        }
    }
}

/// Steps between two saves of where tuning is.
const SAVE_STEPS: usize = 16;

/// Loss of the tuning, of the first and of the last tenth of the steps.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct TuneReport {
    /// Mean KL(source || packed) at the start, nats a token.
    pub first: f64,
    /// At the end, each token before it was learned from in that pass.
    pub last: f64,
    /// Steps.
    pub steps: usize,
}

/// Shares of both of Adam's moments that a step keeps.
const KEEP: [f32; 2] = [0.9, 0.98];

/// One tensor that is trained.
struct Trained {
    values: Vec<f32>,
    /// What a relative step is relative to.
    sizes: Vec<f32>,
    /// Of the gradient by a relative step, so that it has no scale of its own.
    first: Vec<f32>,
    /// Likewise.
    second: Vec<f32>,
}

impl Trained {
    /// Steps are relative to each value itself.
    fn each(values: Vec<f32>) -> Self {
        Self::new(values.iter().map(|v| v.abs()).collect(), values)
    }

    /// Steps are relative to the mean magnitude.
    fn common(values: Vec<f32>) -> Self {
        let mean = values.iter().map(|v| v.abs()).sum::<f32>() / values.len().max(1) as f32;
        Self::new(vec![mean; values.len()], values)
    }

    fn new(sizes: Vec<f32>, values: Vec<f32>) -> Self {
        let zeros = vec![0.0; values.len()];
        Self { values, sizes, first: zeros.clone(), second: zeros }
    }

    /// One step against `gradient`.
    fn step(&mut self, gradient: &[f32], step: usize, rate: f32) {
        let adam = Adam::at(step, KEEP);
        let moments = self.first.iter_mut().zip(&mut self.second);
        let sized = self.values.iter_mut().zip(&self.sizes);
        for ((&d, (first, second)), (value, &size)) in gradient.iter().zip(moments).zip(sized) {
            adam.first(first, d * size);
            adam.second(second, d * size);
            let (mean, spread) = adam.direction(*first, *second);
            *value -= rate * size * mean / spread;
        }
    }
}

struct Layer {
    stored: Stored,
    block: Block,
    /// Of each slot; `None` where it is not packed.
    scales: Vec<Option<Trained>>,
    norms: [Trained; 2],
    biases: Vec<Option<Trained>>,
}

impl Layer {
    fn new(decoder: &Decoder, checkpoint: &Checkpoint, layer: usize, stored: Stored) -> Result<Self> {
        let mut block = decoder.load(checkpoint, None, layer)?;
        stored.apply(&mut block);
        let scales = stored
            .packed
            .iter()
            .map(|matrix| matrix.as_ref().map(|m| Trained::each(m.scales.iter().map(|s| s.to_f32()).collect())));
        let scales = scales.collect();
        // Packed weights are written out when the block is computed.
        for (slot, matrix) in Slot::ALL.iter().zip(&stored.packed) {
            if matrix.is_some() {
                block.linear_mut(*slot).weight = Vec::new();
            }
        }
        let norms = [Trained::common(block.input_norm.clone()), Trained::common(block.post_norm.clone())];
        let biases = block.linears.iter().map(|l| l.bias.clone().map(Trained::common)).collect();
        Ok(Self { stored, block, scales, norms, biases })
    }

    /// The block with the parameters as they are now, rounded as the file will hold them.
    fn block(&self, decoder: &Decoder) -> Block {
        let linears = Slot::ALL.iter().map(|&slot| {
            let linear = self.block.linear(slot);
            let weight = match &self.stored.packed[slot as usize] {
                Some(matrix) => dequantize(decoder.threads, matrix),
                None => linear.weight.clone(),
            };
            Linear::new(linear.n, linear.k, weight, linear.bias.clone())
        });
        Block { linears: linears.collect(), ..self.block.without_linears() }
    }

    fn step(&mut self, decoder: &Decoder, gradients: &Gradients, step: usize, options: &Options, left: f32) {
        for slot in 0..Slot::ALL.len() {
            if let (Some(scales), Some(matrix)) = (&mut self.scales[slot], &self.stored.packed[slot]) {
                let group = matrix.group_size;
                let weights = &gradients.weights[slot];
                let slopes = decoder.threads.map(matrix.scales.len(), |g| {
                    let zero = f32::from(matrix.zeros[g]);
                    let pairs = matrix.codes[g * group..][..group].iter().zip(&weights[g * group..][..group]);
                    pairs.map(|(&code, &d)| d * (f32::from(code) - zero)).sum::<f32>()
                });
                scales.step(&slopes, step, options.scale_rate * left);
            }
            if let Some(bias) = &mut self.biases[slot] {
                bias.step(&gradients.biases[slot], step, options.vector_rate * left);
            }
        }
        for (norm, gradient) in self.norms.iter_mut().zip([&gradients.input_norm, &gradients.post_norm]) {
            norm.step(gradient, step, options.vector_rate * left);
        }
        self.refresh();
    }

    /// All that changes, in one order.
    fn parameters(&mut self) -> impl Iterator<Item = &mut Trained> {
        self.scales.iter_mut().flatten().chain(&mut self.norms).chain(self.biases.iter_mut().flatten())
    }

    /// Brings what is computed with in line with the parameters.
    fn refresh(&mut self) {
        for slot in 0..Slot::ALL.len() {
            if let (Some(scales), Some(matrix)) = (&self.scales[slot], &mut self.stored.packed[slot]) {
                for (half, scale) in matrix.scales.iter_mut().zip(&scales.values) {
                    *half = f16::from_f32(half_scale(*scale));
                }
            }
            if let Some(bias) = &self.biases[slot] {
                self.block.linears[slot].bias = Some(halves(&bias.values));
            }
        }
        self.block.input_norm = halves(&self.norms[0].values);
        self.block.post_norm = halves(&self.norms[1].values);
    }
}

/// Values and both moments of every parameter, one after the other.
fn flatten(model: &mut [Layer]) -> Vec<f32> {
    let parameters = model.iter_mut().flat_map(Layer::parameters);
    parameters.flat_map(|p| p.values.iter().chain(&p.first).chain(&p.second).copied()).collect()
}

fn restore(model: &mut [Layer], values: &[f32]) -> Result<()> {
    let mut rest = values;
    for parameter in model.iter_mut().flat_map(Layer::parameters) {
        for part in [&mut parameter.values, &mut parameter.first, &mut parameter.second] {
            let (own, after) = rest.split_at_checked(part.len()).ok_or_else(too_short)?;
            part.copy_from_slice(own);
            rest = after;
        }
    }
    model.iter_mut().for_each(Layer::refresh);
    Ok(())
}

fn too_short() -> Error {
    Error::new(ErrorKind::InvalidFile, "the saved state of tuning is too short")
}

fn halves(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&v| f16::from_f32(v).to_f32()).collect()
}

/// Tunes the blocks of `state` and stores them tuned. `progress` gets steps done and steps in all.
pub(super) fn tune(
    decoder: &Decoder,
    checkpoint: &Checkpoint,
    state: &State,
    sequences: &[Vec<u32>],
    options: &Options,
    seed: u64,
    progress: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<TuneReport> {
    let hidden = decoder.config.hidden_size;
    let head = Head::load(decoder, checkpoint, None)?;
    let pieces: Vec<&[u32]> = sequences.iter().flat_map(|ids| ids.chunks(options.tokens.max(2))).collect();
    let steps = ((options.epochs * pieces.len() as f32).round() as usize).max(1);

    // What the source makes of every piece; it does not change.
    let mut targets: Vec<Vec<f32>> = pieces.iter().map(|ids| decoder.embed(checkpoint, ids)).collect::<Result<_>>()?;
    let layers = decoder.config.num_hidden_layers;
    for layer in 0..layers {
        progress(0, steps)?;
        let block = decoder.load(checkpoint, None, layer)?;
        targets.iter_mut().for_each(|x| decoder.forward(&block, x, &mut |_, _| {}));
    }
    let mut model: Vec<Layer> =
        (0..layers).map(|layer| Layer::new(decoder, checkpoint, layer, state.load(layer)?)).collect::<Result<_>>()?;
    let mut random = Random::new(seed);
    let order: Vec<usize> = std::iter::repeat_with(|| {
        let mut order: Vec<usize> = (0..pieces.len()).collect();
        // Fisher and Yates.
        (1..order.len()).rev().for_each(|i| order.swap(i, random.below(i + 1)));
        order
    })
    .flatten()
    .take(steps)
    .collect();

    let mut losses: Vec<f64> = Vec::with_capacity(steps);
    if let Some((saved, values)) = state.load_tuning()? {
        restore(&mut model, &values)?;
        losses = saved;
    }
    let mut gradients: Option<Gradients> = None;
    for (step, &piece) in order.iter().enumerate().skip(losses.len()) {
        progress(step, steps)?;
        if step > 0 && step % SAVE_STEPS == 0 {
            state.save_tuning(&losses, &flatten(&mut model))?;
        }
        let mut x = decoder.embed(checkpoint, pieces[piece])?;
        let mut traces: Vec<Trace> = Vec::with_capacity(layers);
        for layer in &model {
            let mut trace = decoder.trace(&layer.block(decoder), &x);
            x = std::mem::take(&mut trace.out);
            traces.push(trace);
        }
        let (loss, mut d_x) = head.divergence(decoder, &targets[piece], &x);
        let tokens = (x.len() / hidden) as f32;
        d_x.iter_mut().for_each(|d| *d /= tokens);
        losses.push(loss / f64::from(tokens));
        let left = 1.0 - step as f32 / steps as f32;
        for layer in model.iter_mut().rev() {
            let Some(trace) = traces.pop() else { break };
            let block = layer.block(decoder);
            let gradients = gradients.get_or_insert_with(|| Gradients::zeros(&block));
            gradients.clear();
            d_x = decoder.backward(&block, &trace, &d_x, gradients);
            layer.step(decoder, gradients, step, options, left);
        }
    }
    for layer in model {
        state.store_tuned(&layer.block, &layer.stored)?;
    }
    let tenth = losses.len().div_ceil(10);
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len().max(1) as f64;
    Ok(TuneReport { first: mean(&losses[..tenth]), last: mean(&losses[losses.len() - tenth..]), steps })
}
