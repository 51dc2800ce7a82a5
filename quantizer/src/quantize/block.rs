//! One decoder block: from its weights and the calibration tokens that enter it to codes.

use awqua::quant::AffineMatrix;
use serde::{Deserialize, Serialize};

use crate::decoder::{Block, Decoder, Site, Slot};
use crate::grid::{Grid, dequantize};
use crate::method::gptq::{self, Factor};
use crate::method::scale::{self, Sample, SiteScale};
use crate::method::{Moments, Recipe, clip, learn};

/// Most tokens that AWQ's scales are searched on; more tell it nothing new.
const SCALE_TOKENS: usize = 4096;

/// Most tokens that the reported error of a block is measured on.
const PROBE_TOKENS: usize = 128;

/// Residual streams of the calibration sequences, (length, hidden) each.
pub(super) type Streams = Vec<Vec<f32>>;

/// A finished block.
#[derive(Debug)]
pub(super) struct Finished {
    /// Norms and biases as the checkpoint will hold them; the weights of packed linears are what their codes stand for.
    pub block: Block,
    /// Codes of each slot, in the order of [`Slot::ALL`]; `None` where it stays as it is.
    pub packed: Vec<Option<AffineMatrix>>,
    pub report: BlockReport,
}

/// What happened to a block.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BlockReport {
    /// Index of the layer.
    pub layer: usize,
    /// Mean over calibration tokens of the squared error of the block's output relative to its squared size, against
    /// what the exact block makes of the same input; `None` without calibration.
    pub output_error: Option<f64>,
    /// Scales that were folded.
    pub scales: Vec<SiteScale>,
    /// Packed linears.
    pub linears: Vec<LinearReport>,
}

/// What happened to a linear module.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LinearReport {
    /// Name without `.weight`.
    pub name: String,
    /// Output and input features.
    pub shape: [usize; 2],
    /// Bits of a code.
    pub bits: u32,
    /// Root of sum((w - w')²) / sum(w²) over the matrix after scaling; 0 for an all-zero matrix.
    pub relative_error: f64,
    /// Share of the mean of the diagonal that GPTQ had to add.
    pub damp: Option<f32>,
}

/// How a block is worked on.
pub(super) struct Task<'a> {
    pub decoder: &'a Decoder,
    pub recipe: &'a Recipe,
    pub grid: &'a dyn Fn(Slot) -> Option<Grid>,
    /// Whether later modules see the rounding of the ones before.
    pub propagate: bool,
    pub seed: u64,
}

impl Task<'_> {
    /// Quantizes `block`. `streams` enter it and leave as what it puts out; `exact`, where kept, likewise for the
    /// unquantized model.
    pub fn run(&self, mut block: Block, streams: &mut Streams, exact: Option<&mut Streams>) -> Finished {
        let original = block.clone();
        let hidden = self.decoder.config.hidden_size;
        let probe = streams.first().map(|x| vec![x[..x.len().min(PROBE_TOKENS * hidden)].to_vec()]);
        let scales = match self.recipe.scale {
            true => scale::search(self.decoder, &mut block, &self.sample(&original, streams), self.grid),
            false => Vec::new(),
        };
        let needs_tokens = self.recipe.clip || self.recipe.compensate.is_some() || self.recipe.learn.is_some();
        let inputs = (self.recipe.learn.is_some()).then(|| streams.clone());
        let scaled = block.clone();
        let mut rounding = Rounding { task: self, block, packed: vec![None; Slot::ALL.len()], damp: vec![None; 7] };
        if needs_tokens {
            rounding.in_stages(streams);
        } else {
            rounding.without_tokens();
        }
        let Rounding { mut block, mut packed, damp, .. } = rounding;

        if let (Some(options), Some(inputs)) = (&self.recipe.learn, inputs) {
            // The target is what the unquantized model computes, from its own tokens.
            let mut target = exact.as_deref().cloned().unwrap_or_else(|| inputs.clone());
            target.iter_mut().for_each(|x| self.decoder.forward(&original, x, &mut |_, _| {}));
            let problem = learn::Problem { decoder: self.decoder, scaled: &scaled, inputs: &inputs, targets: &target };
            learn::learn(&problem, options, self.seed, &mut block, &mut packed);
            *streams = inputs;
            self.advance(&block, streams);
            if let Some(exact) = exact {
                *exact = target;
            }
        } else {
            if !needs_tokens || !self.propagate {
                let advancing = if self.propagate { &block } else { &original };
                self.advance(advancing, streams);
            }
            if let Some(exact) = exact {
                self.advance(&original, exact);
            }
        }
        let linears = Slot::ALL.iter().zip(&packed).filter_map(|(&slot, matrix)| {
            let matrix = matrix.as_ref()?;
            let (meant, got) = (&scaled.linear(slot).weight, &block.linear(slot).weight);
            Some(LinearReport {
                name: self.decoder.name(block.layer, slot.module()),
                shape: [matrix.n, matrix.k],
                bits: matrix.bits,
                relative_error: relative_error(meant, got),
                damp: damp[slot as usize],
            })
        });
        let linears = linears.collect();
        let output_error = probe.map(|inputs| {
            let mut exact = inputs.clone();
            exact.iter_mut().for_each(|x| self.decoder.forward(&original, x, &mut |_, _| {}));
            learn::output_error(self.decoder, &block, &inputs, &exact)
        });
        Finished { report: BlockReport { layer: block.layer, output_error, scales, linears }, block, packed }
    }

    fn advance(&self, block: &Block, streams: &mut Streams) {
        if !streams.is_empty() {
            streams.iter_mut().for_each(|x| self.decoder.forward(block, x, &mut |_, _| {}));
        }
    }

    /// Runs the unquantized block over some of the tokens for the scale search.
    fn sample(&self, block: &Block, streams: &Streams) -> Sample {
        let hidden = self.decoder.config.hidden_size;
        let total: usize = streams.iter().map(|x| x.len() / hidden).sum();
        let every = total.div_ceil(SCALE_TOKENS).max(1);
        let chosen: Vec<&Vec<f32>> = streams.iter().step_by(every).collect();
        let tokens = chosen.iter().map(|x| x.len() / hidden).sum();
        let mut sample = Sample::new(self.decoder, tokens);
        for x in chosen {
            sample.add_sequence(self.decoder, x);
            self.decoder.forward(block, &mut x.clone(), &mut |site, x| sample.add(site, x));
        }
        sample
    }
}

struct Rounding<'a> {
    task: &'a Task<'a>,
    /// What is computed with: gets each module's rounded weight as soon as it has one.
    block: Block,
    packed: Vec<Option<AffineMatrix>>,
    damp: Vec<Option<f32>>,
}

impl Rounding<'_> {
    fn without_tokens(&mut self) {
        for slot in Slot::ALL {
            self.round(slot, None, None);
        }
    }

    /// Rounds site after site, so that each sees what the ones before it really put out.
    fn in_stages(&mut self, streams: &mut Streams) {
        let decoder = self.task.decoder;
        // Without propagation the exact modules compute, and the rounded ones are only put in at the end.
        let exact = (!self.task.propagate).then(|| self.block.clone());

        let mut moments = self.moments(Site::Attention);
        let normed: Streams = streams.iter().map(|x| decoder.attention_input(&self.block, x)).collect();
        normed.iter().for_each(|x| moments.add(decoder.threads, x));
        self.site(Site::Attention, &moments);

        let mut moments = self.moments(Site::Attended);
        let computing = exact.as_ref().unwrap_or(&self.block);
        let attended: Streams = normed.into_iter().map(|x| decoder.attend(computing, &x)).collect();
        attended.iter().for_each(|x| moments.add(decoder.threads, x));
        self.site(Site::Attended, &moments);

        let mut moments = self.moments(Site::Mlp);
        let computing = exact.as_ref().unwrap_or(&self.block);
        let mut middle: Streams = streams.clone();
        for (x, attended) in middle.iter_mut().zip(attended) {
            computing.linear(Slot::O).accumulate(decoder.threads, &attended, x);
        }
        let normed: Streams = middle.iter().map(|x| decoder.mlp_input(&self.block, x)).collect();
        normed.iter().for_each(|x| moments.add(decoder.threads, x));
        self.site(Site::Mlp, &moments);

        let mut moments = self.moments(Site::Activated);
        let computing = exact.as_ref().unwrap_or(&self.block);
        let activated: Streams = normed.into_iter().map(|x| decoder.activate(computing, &x)).collect();
        activated.iter().for_each(|x| moments.add(decoder.threads, x));
        self.site(Site::Activated, &moments);
        if self.task.propagate && self.task.recipe.learn.is_none() {
            for (x, activated) in middle.iter_mut().zip(activated) {
                self.block.linear(Slot::Down).accumulate(decoder.threads, &activated, x);
            }
            *streams = middle;
        }
    }

    fn moments(&self, site: Site) -> Moments {
        let k = self.task.decoder.width(site);
        // Only compensation needs products across groups.
        let block = match self.task.recipe.compensate {
            Some(_) => k,
            None => {
                site.slots().iter().filter_map(|&slot| (self.task.grid)(slot)).map(|g| g.group(k)).max().unwrap_or(8)
            }
        };
        Moments::new(k, if k.is_multiple_of(block) { block } else { k })
    }

    fn site(&mut self, site: Site, moments: &Moments) {
        let slots: Vec<Slot> = site.slots().iter().copied().filter(|&slot| (self.task.grid)(slot).is_some()).collect();
        let wanted = self.task.recipe.compensate.filter(|_| !slots.is_empty());
        let factor = wanted.and_then(|options| Factor::new(self.task.decoder.threads, moments, options));
        for slot in slots {
            self.round(slot, Some(moments), factor.as_ref());
        }
    }

    fn round(&mut self, slot: Slot, moments: Option<&Moments>, factor: Option<&Factor>) {
        let Some(grid) = (self.task.grid)(slot) else { return };
        let threads = self.task.decoder.threads;
        let linear = self.block.linear(slot);
        let (n, k) = (linear.n, linear.k);
        let steps = match moments.filter(|_| self.task.recipe.clip) {
            Some(moments) => clip::search(threads, &linear.weight, k, grid, moments),
            None => grid.spans(&linear.weight, k),
        };
        let (codes, steps) = match factor {
            Some(factor) => gptq::round(threads, &linear.weight, grid, Some(steps), factor),
            None => (grid.round_to_nearest(threads, &linear.weight, k, &steps), steps),
        };
        self.damp[slot as usize] = factor.map(|factor| factor.damp);
        let matrix = grid.matrix(n, k, codes, &steps);
        self.block.linear_mut(slot).weight = dequantize(threads, &matrix);
        self.packed[slot as usize] = Some(matrix);
    }
}

fn relative_error(meant: &[f32], got: &[f32]) -> f64 {
    let (mut error, mut norm) = (0.0, 0.0);
    for (&a, &b) in meant.iter().zip(got) {
        error += f64::from(a - b).powi(2);
        norm += f64::from(a).powi(2);
    }
    if norm == 0.0 { 0.0 } else { (error / norm).sqrt() }
}
