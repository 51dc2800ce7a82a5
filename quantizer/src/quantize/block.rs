//! One decoder block: from its weights and the calibration tokens that enter it to codes.

use awqua::quant::AffineMatrix;
use serde::{Deserialize, Serialize};

use crate::decoder::{Block, Decoder, Site, Slot};
use crate::grid::{Grid, dequantize};
use crate::math::Threads;
use crate::method::correct::{self, Cross};
use crate::method::gptq::{self, Factor};
use crate::method::scale::{self, Folded, Sample, SiteScale};
use crate::method::{Moments, Recipe, clip, learn, refit, weigh};

/// Most tokens that AWQ's scales are searched on; more tell it nothing new.
const SCALE_TOKENS: usize = 1024;

/// Most tokens that the reported error of a block is measured on.
const PROBE_TOKENS: usize = 128;

/// Residual streams of the calibration sequences, (length, hidden) each.
pub(crate) type Streams = Vec<Vec<f32>>;

/// A finished block.
#[derive(Debug)]
pub(crate) struct Finished {
    /// Norms and biases as the checkpoint will hold them; the weights of packed linears are what their codes stand for.
    pub block: Block,
    /// Codes of each slot, in the order of [`Slot::ALL`]; `None` where it stays as it is.
    pub packed: Vec<Option<AffineMatrix>>,
    pub report: BlockReport,
    /// Of each [`Site`] that calibration was looked at; see [`SpreadHalves`].
    pub spread: Vec<SpreadHalves>,
}

/// Root mean square of every feature at a site, over the even and over the odd calibration sequences: what later text is
/// compared with, and how much two samples of the same text differ.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SpreadHalves {
    pub site: Site,
    pub halves: [Vec<f32>; 2],
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
pub(crate) struct Task<'a> {
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
        let (scales, _) = self.scale(&mut block, streams);
        self.round(block, scales, streams, exact)
    }

    /// Folds the scales that suit the streams that enter `block`, if the recipe has scales. This moves weights between
    /// modules and leaves the function alone.
    pub fn scale(&self, block: &mut Block, streams: &Streams) -> (Vec<SiteScale>, Folded) {
        if !self.recipe.scale {
            return Default::default();
        }
        let sample = self.sample(block, streams);
        scale::search(self.decoder, block, &sample, self.grid)
    }

    /// The rest of [`Self::run`], for a block into which `scales` are folded.
    pub fn round(
        &self,
        block: Block,
        scales: Vec<SiteScale>,
        streams: &mut Streams,
        mut exact: Option<&mut Streams>,
    ) -> Finished {
        let hidden = self.decoder.config.hidden_size;
        let probe = streams.first().map(|x| vec![x[..x.len().min(PROBE_TOKENS * hidden)].to_vec()]);
        let scaled = block.clone();
        let entered = self.recipe.learn.is_some().then(|| streams.clone());
        let mut rounding = Rounding {
            task: self,
            scaled: &scaled,
            block,
            packed: vec![None; Slot::ALL.len()],
            damp: vec![None; Slot::ALL.len()],
            meant: vec![None; Slot::ALL.len()],
            spread: Vec::new(),
        };
        let staged = self.recipe.clip || self.recipe.compensate.is_some();
        if staged {
            rounding.in_stages(streams, exact.as_deref_mut());
        } else {
            Slot::ALL.iter().for_each(|&slot| rounding.round(slot, None, None));
            let advancing = if self.propagate { &rounding.block } else { &scaled };
            self.advance(advancing, streams);
            if let Some(exact) = exact.as_deref_mut() {
                self.advance(&scaled, exact);
            }
        }
        let Rounding { mut block, mut packed, damp, meant, spread, .. } = rounding;

        if let (Some(options), Some(inputs), Some(targets)) = (&self.recipe.learn, entered, exact) {
            let meant: Vec<&[f32]> = Slot::ALL
                .iter()
                .map(|&slot| meant[slot as usize].as_deref().unwrap_or(&scaled.linear(slot).weight))
                .collect();
            let problem = learn::Problem { decoder: self.decoder, meant: &meant, inputs: &inputs, targets };
            learn::learn(&problem, options, self.seed, &mut block, &mut packed);
            *streams = inputs;
            self.advance(&block, streams);
        }
        let linears = Slot::ALL.iter().zip(&packed).filter_map(|(&slot, matrix)| {
            let matrix = matrix.as_ref()?;
            let (meant, got) = (&scaled.linear(slot).weight, &block.linear(slot).weight);
            Some(LinearReport {
                name: self.decoder.name(block.layer, slot.module()),
                shape: [matrix.n, matrix.k],
                bits: matrix.bits,
                relative_error: relative_error(self.decoder.threads, meant, got, matrix.k),
                damp: damp[slot as usize],
            })
        });
        let linears = linears.collect();
        let output_error = probe.map(|inputs| {
            // Few tokens are not worth the way of all weights to a device.
            let here = Decoder::clone(self.decoder).without_device();
            let mut exact = inputs.clone();
            exact.iter_mut().for_each(|x| here.forward(&scaled, x, &mut |_, _| {}));
            learn::output_error(&here, &block, &inputs, &exact)
        });
        Finished { report: BlockReport { layer: block.layer, output_error, scales, linears }, block, packed, spread }
    }

    fn advance(&self, block: &Block, streams: &mut Streams) {
        streams.iter_mut().for_each(|x| self.decoder.forward(block, x, &mut |_, _| {}));
    }

    /// Runs the unquantized block over some of the tokens for the scale search.
    fn sample(&self, block: &Block, streams: &Streams) -> Sample {
        let hidden = self.decoder.config.hidden_size;
        let total: usize = streams.iter().map(|x| x.len() / hidden).sum();
        let every = total.div_ceil(SCALE_TOKENS).max(1);
        let chosen: Vec<&Vec<f32>> = streams.iter().step_by(every).collect();
        let tokens = chosen.iter().map(|x| x.len() / hidden).sum();
        let mut sample = Sample::new(self.decoder, tokens, self.grid);
        chosen.iter().for_each(|x| sample.add(self.decoder, block, x));
        sample
    }
}

struct Rounding<'a> {
    task: &'a Task<'a>,
    /// The block before rounding.
    scaled: &'a Block,
    /// What is computed with: gets each module's rounded weight as soon as it has one.
    block: Block,
    packed: Vec<Option<AffineMatrix>>,
    damp: Vec<Option<f32>>,
    /// Corrected weights before rounding, where learning needs them.
    meant: Vec<Option<Vec<f32>>>,
    spread: Vec<SpreadHalves>,
}

/// What the calibration shows of the input of a site.
struct Seen {
    moments: Moments,
    cross: Option<Cross>,
    /// Sums of squares of the features, and tokens, of even and of odd sequences.
    squares: [(Vec<f64>, usize); 2],
    sequences: usize,
}

impl Rounding<'_> {
    /// Rounds site after site, so that each sees what the ones before it really put out. `streams` and `exact` enter the
    /// block and leave as what it puts out.
    fn in_stages(&mut self, streams: &mut Streams, mut exact: Option<&mut Streams>) {
        let (decoder, scaled) = (self.task.decoder, self.scaled);
        let threads = decoder.threads;
        let propagate = self.task.propagate;
        let corrects = exact.is_some() && self.task.recipe.correct.is_some();
        let residual = self.task.recipe.correct.map_or(0.0, |options| options.residual);

        let mut seen = self.nothing_seen(Site::Attention, corrects);
        let normed: Streams = streams.iter().map(|x| decoder.attention_input(&self.block, x)).collect();
        let meant: Option<Streams> =
            exact.as_deref().map(|exact| exact.iter().map(|x| decoder.attention_input(scaled, x)).collect());
        for (i, x) in normed.iter().enumerate() {
            seen.add(threads, x, || meant.as_ref().map(|meant| difference(&meant[i], x)));
        }
        self.site(Site::Attention, seen);

        let mut seen = self.nothing_seen(Site::Attended, corrects);
        let computing = if propagate { &self.block } else { scaled };
        let attended: Streams = normed.into_iter().map(|x| decoder.attend(computing, &x)).collect();
        for (i, x) in attended.iter().enumerate() {
            let before = exact.as_deref().map(|exact| exact[i].clone());
            if let (Some(exact), Some(meant)) = (exact.as_deref_mut(), &meant) {
                let attended = decoder.attend(scaled, &meant[i]);
                scaled.linear(Slot::O).accumulate(decoder, &attended, &mut exact[i]);
            }
            seen.add(threads, x, || {
                let after = &exact.as_deref()?[i];
                Some(self.output_error(Slot::O, x, &streams[i], before.as_deref()?, after, residual))
            });
        }
        drop(meant);
        self.site(Site::Attended, seen);
        let computing = if propagate { &self.block } else { scaled };
        for (x, attended) in streams.iter_mut().zip(attended) {
            computing.linear(Slot::O).accumulate(decoder, &attended, x);
        }

        let mut seen = self.nothing_seen(Site::Mlp, corrects);
        let normed: Streams = streams.iter().map(|x| decoder.mlp_input(&self.block, x)).collect();
        for (i, x) in normed.iter().enumerate() {
            seen.add(threads, x, || Some(difference(&decoder.mlp_input(scaled, &exact.as_deref()?[i]), x)));
        }
        self.site(Site::Mlp, seen);

        let mut seen = self.nothing_seen(Site::Activated, corrects);
        let computing = if propagate { &self.block } else { scaled };
        let activated: Streams = normed.into_iter().map(|x| decoder.activate(computing, &x)).collect();
        for (i, x) in activated.iter().enumerate() {
            let before = exact.as_deref().map(|exact| exact[i].clone());
            if let Some(exact) = exact.as_deref_mut() {
                let activated = decoder.activate(scaled, &decoder.mlp_input(scaled, &exact[i]));
                scaled.linear(Slot::Down).accumulate(decoder, &activated, &mut exact[i]);
            }
            seen.add(threads, x, || {
                let after = &exact.as_deref()?[i];
                Some(self.output_error(Slot::Down, x, &streams[i], before.as_deref()?, after, residual))
            });
        }
        self.site(Site::Activated, seen);
        let computing = if propagate { &self.block } else { scaled };
        for (x, activated) in streams.iter_mut().zip(activated) {
            computing.linear(Slot::Down).accumulate(decoder, &activated, x);
        }
    }

    /// What a module that writes to the residual stream should add beyond what its source weights make of `x`, if it
    /// takes `ours` to where the exact model goes `before` to `after`; of the streams' distance before it only a share.
    fn output_error(
        &self,
        slot: Slot,
        x: &[f32],
        ours: &[f32],
        before: &[f32],
        after: &[f32],
        residual: f32,
    ) -> Vec<f32> {
        let mut reached: Vec<f32> =
            before.iter().zip(ours).map(|(before, ours)| before + residual * (ours - before)).collect();
        self.scaled.linear(slot).accumulate(self.task.decoder, x, &mut reached);
        difference(after, &reached)
    }

    fn nothing_seen(&self, site: Site, corrects: bool) -> Seen {
        let k = self.task.decoder.width(site);
        // Only compensation and corrections need products across groups.
        let block = match self.task.recipe.compensate.is_some() || corrects {
            true => k,
            false => {
                let widest = site.slots().iter().filter_map(|&slot| (self.task.grid)(slot)).map(|g| g.group(k)).max();
                widest.map_or(8, weigh::block)
            }
        };
        let cross = corrects.then(|| match site {
            Site::Attention | Site::Mlp => Cross::Input(vec![0.0; k * k]),
            Site::Attended | Site::Activated => Cross::Output(vec![0.0; self.task.decoder.config.hidden_size * k]),
        });
        Seen {
            moments: Moments::new(k, if k.is_multiple_of(block) { block } else { k }),
            cross,
            squares: std::array::from_fn(|_| (vec![0.0; k], 0)),
            sequences: 0,
        }
    }

    fn site(&mut self, site: Site, seen: Seen) {
        let threads = self.task.decoder.threads;
        let rms = |(squares, tokens): &(Vec<f64>, usize)| {
            squares.iter().map(|sum| (sum / (*tokens).max(1) as f64).sqrt() as f32).collect()
        };
        self.spread.push(SpreadHalves { site, halves: std::array::from_fn(|half| rms(&seen.squares[half])) });
        let slots: Vec<Slot> = site.slots().iter().copied().filter(|&slot| (self.task.grid)(slot).is_some()).collect();
        if slots.is_empty() {
            return;
        }
        if let (Some(options), Some(cross)) = (self.task.recipe.correct, seen.cross)
            && let Some(factor) = correct::factor(threads, &seen.moments, options)
        {
            for &slot in &slots {
                let weight = correct::corrected(threads, self.scaled.linear(slot), &cross, &factor, options);
                if self.task.recipe.learn.is_some() {
                    self.meant[slot as usize] = Some(weight.clone());
                }
                self.block.linear_mut(slot).weight = weight;
            }
        }
        let factor = self.task.recipe.compensate.and_then(|options| Factor::new(threads, &seen.moments, options));
        for slot in slots {
            self.round(slot, Some(&seen.moments), factor.as_ref());
        }
    }

    fn round(&mut self, slot: Slot, moments: Option<&Moments>, factor: Option<&Factor>) {
        let Some(grid) = (self.task.grid)(slot) else { return };
        let threads = self.task.decoder.threads;
        let linear = self.block.linear(slot);
        let (n, k) = (linear.n, linear.k);
        let steps = match moments.filter(|_| self.task.recipe.clip) {
            Some(moments) => clip::search(threads, &linear.weight, k, grid, moments, factor.is_none()),
            None => grid.spans(&linear.weight, k),
        };
        let (codes, steps) = match factor {
            Some(factor) => gptq::round(threads, &linear.weight, grid, Some(steps), factor),
            None => (grid.round_to_nearest(threads, &linear.weight, k, &steps), steps),
        };
        let steps = match (factor, moments, self.task.recipe.compensate) {
            (Some(factor), Some(moments), Some(options)) if options.refit => {
                refit::refit(threads, &linear.weight, grid, &codes, steps, moments, factor.damp)
            }
            _ => steps,
        };
        self.damp[slot as usize] = factor.map(|factor| factor.damp);
        let matrix = grid.matrix(n, k, codes, &steps);
        self.block.linear_mut(slot).weight = dequantize(threads, &matrix);
        self.packed[slot as usize] = Some(matrix);
    }
}

impl Seen {
    /// Notes the input of one sequence; `error` is what the cross moments are of.
    fn add(&mut self, threads: Threads, x: &[f32], error: impl FnOnce() -> Option<Vec<f32>>) {
        self.moments.add(threads, x);
        let (squares, tokens) = &mut self.squares[self.sequences % 2];
        for row in x.chunks_exact(self.moments.k) {
            squares.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x * x));
            *tokens += 1;
        }
        self.sequences += 1;
        if let Some(cross) = &mut self.cross
            && let Some(error) = error()
        {
            cross.add(threads, &error, x, self.moments.k);
        }
    }
}

fn difference(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// Root of sum((meant - got)²) / sum(meant²) over rows of `k`; 0 if nothing is meant.
fn relative_error(threads: Threads, meant: &[f32], got: &[f32], k: usize) -> f64 {
    let sums = threads.map(meant.len() / k, |row| {
        let mut sums = [0.0f32; 2];
        for (&a, &b) in meant[row * k..][..k].iter().zip(&got[row * k..]) {
            sums[0] += (a - b) * (a - b);
            sums[1] += a * a;
        }
        sums.map(f64::from)
    });
    let [error, norm] = sums.iter().fold([0.0, 0.0], |a, b| [a[0] + b[0], a[1] + b[1]]);
    if norm == 0.0 { 0.0 } else { (error / norm).sqrt() }
}
