//! What rounding costs, to second order, of all modules and widths in one backward pass.
//!
//! For a small change d of the weights, KL(source || source + d) = d' F d / 2 with the Fisher information F, the second
//! moments of the gradient of -log p(token) under tokens drawn from the source itself (Martens 2014; for pruning and
//! rounding Singh and Alistarh 2020, Kim et al. 2023). One token is drawn at every position of a sequence, and the
//! gradient g of their sum taken: what is drawn at one position says nothing of the gradient at another, so the mean of
//! (g' d)² is the sum of the positions' d' F d. The errors of different rows of a matrix are taken as independent, as are
//! those of different matrices; (g' d)² is then a sum over rows, whose many terms leave little to chance.
//!
//! Not the diagonal of F, which is all of it that much of that work keeps: errors inside a row are anything but
//! independent once scales and ranges are searched against the row's output.

use std::path::Path;

use awqua::Result;
use awqua::quant::AffineMatrix;

use super::{Granularity, Measured, Sensitivity, Unit, WIDTHS};
use crate::calibration::Calibration;
use crate::decoder::{Block, Decoder, Gradients, Head, Site, Slot};
use crate::device::Compute;
use crate::grid::Grid;
use crate::math::vectorized;
use crate::method::scale::{self, Folded};
use crate::quantize::{self, QuantizeOptions, Streams, Task};
use crate::random::Random;

/// Sequences that scales and ranges are searched on, and tokens of each.
const SEARCHED: (usize, usize) = (8, 128);

/// Sequences that losses are measured on, and tokens of each. A sequence is one draw, and texts differ: many short ones
/// tell more than a few long ones.
const PROBED: (usize, usize) = (32, 128);

/// The width that scales are searched for; others share them, as the best ones differ little.
const SCALED: u32 = 4;

/// Most bits that are measured. The losses of more follow from those at this width by the squares of the steps.
const MEASURED: u32 = 4;

/// Measures what rounding each unit of the checkpoint in folder `source` costs, with the scales and ranges that `options`
/// search but without compensation or learning. `progress` gets blocks done and blocks in all, each block counted in the
/// forward and in the backward pass.
///
/// # Errors
/// Those of [`crate::quantize::plan`] and of reading; [`awqua::ErrorKind::InvalidInput`] for a calibration that cannot be
/// used; those of `progress`.
pub fn measure(
    source: &Path,
    calibration: &Calibration,
    options: &QuantizeOptions,
    granularity: Granularity,
    compute: impl Into<Compute>,
    progress: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Sensitivity> {
    let plan = quantize::plan(source, calibration, options, compute)?;
    let measured = Measured::by(&plan, calibration, granularity)?;
    let (checkpoint, decoder) = (&plan.checkpoint, &plan.decoder);
    calibration.check(decoder.config.vocab_size)?;
    let [searched, probed] = samples(calibration);
    let layers = decoder.config.num_hidden_layers;

    // Blocks need the streams that enter them again on the way back. Those of all layers may take more memory than the
    // model, so some layers keep theirs, and the ones between compute them once more.
    let stride = layers.isqrt().max(1);
    let embed = |ids: &Vec<u32>| decoder.embed(checkpoint, ids);
    let advance = |layer: usize, streams: &mut Streams| -> Result<()> {
        let block = decoder.load(checkpoint, None, layer)?;
        streams.iter_mut().for_each(|x| decoder.forward(&block, x, &mut |_, _| {}));
        Ok(())
    };
    let mut kept: Vec<Streams> = Vec::new();
    // First those that are searched on.
    let mut streams: Streams = searched.iter().chain(&probed).map(embed).collect::<Result<_>>()?;
    for layer in 0..layers {
        progress(layer, 2 * layers)?;
        if layer.is_multiple_of(stride) {
            kept.push(streams.clone());
        }
        advance(layer, &mut streams)?;
    }
    let head = Head::load(decoder, checkpoint, None)?;
    let mut random = Random::new(options.seed);
    let mut slopes = Streams::new();
    for x in streams.drain(..).skip(searched.len()) {
        let draws: Vec<f64> = x.chunks(decoder.config.hidden_size).map(|_| random.unit()).collect();
        slopes.push(head.surprise(decoder, &x, &draws));
    }
    drop(head);

    let tokens = probed.iter().map(Vec::len).sum::<usize>().max(1) as f64;
    let mut units = Vec::new();
    while let Some(mut streams) = kept.pop() {
        let first = kept.len() * stride;
        let mut entering = Vec::new();
        for layer in first..layers.min(first + stride) - 1 {
            let mut next = streams.clone();
            advance(layer, &mut next)?;
            entering.push(std::mem::replace(&mut streams, next));
        }
        entering.push(streams);
        while let Some(streams) = entering.pop() {
            let layer = first + entering.len();
            progress(2 * layers - 1 - layer, 2 * layers)?;
            let block = decoder.load(checkpoint, None, layer)?;
            let (searching, probing) = streams.split_at(searched.len());
            let rounded = round(decoder, &block, searching, &measured);
            let mut losses = vec![[0.0; WIDTHS.len()]; Slot::ALL.len()];
            let mut gradients = Gradients::zeros(&block);
            for (x, slope) in probing.iter().zip(&mut slopes) {
                gradients.clear();
                let trace = decoder.trace(&block, x);
                *slope = decoder.backward(&block, &trace, slope, &mut gradients);
                for (slot, losses) in Slot::ALL.into_iter().zip(&mut losses) {
                    for (rounded, loss) in rounded.iter().zip(losses) {
                        *loss += 0.5 * rounded.squares(decoder, &block, slot, &gradients) / tokens;
                    }
                }
            }
            // From the last layer to the first, and so from the last unit of a layer to its first.
            for slots in parts(granularity).into_iter().rev() {
                let mut sums = [0.0; WIDTHS.len()];
                for &slot in slots {
                    sums.iter_mut().zip(losses[slot as usize]).for_each(|(sum, loss)| *sum += loss);
                }
                for (i, bits) in WIDTHS.into_iter().enumerate().skip(1) {
                    if bits > MEASURED {
                        sums[i] = sums[i - 1] * finer(WIDTHS[i - 1], bits);
                    }
                    // Widths are measured apart; none is worse than a smaller one.
                    sums[i] = sums[i].min(sums[i - 1]);
                }
                units.push(Unit {
                    modules: slots.iter().map(|slot| decoder.name(layer, slot.module())).collect(),
                    weights: slots.iter().map(|&slot| decoder.shape(slot)).map(|(n, k)| (n * k) as u64).sum(),
                    losses: sums,
                });
            }
        }
    }
    units.reverse();
    progress(2 * layers, 2 * layers)?;
    Ok(Sensitivity { units, measured })
}

/// Loss at `more` bits relative to that at `bits`.
fn finer(bits: u32, more: u32) -> f64 {
    let codes = |bits: u32| f64::from((1u32 << bits) - 1);
    if more < 16 { (codes(bits) / codes(more)).powi(2) } else { 0.0 }
}

/// The slots of every unit of a block.
fn parts(granularity: Granularity) -> Vec<&'static [Slot]> {
    let of = |site: &Site| match granularity {
        Granularity::Fused => vec![site.slots()],
        Granularity::Module => site.slots().chunks(1).collect(),
    };
    Site::ALL.iter().flat_map(of).collect()
}

/// Sequences to search on and sequences to measure on, spread over the calibration: the starts of its sequences, and
/// parts of what comes after them where there is as much.
fn samples(calibration: &Calibration) -> [Vec<Vec<u32>>; 2] {
    let spread = |parts: &[&[u32]], count: usize| -> Vec<Vec<u32>> {
        let count = count.min(parts.len());
        (0..count).map(|i| parts[i * parts.len() / count].to_vec()).collect()
    };
    let all = calibration.sequences.iter();
    let starts: Vec<&[u32]> = all.clone().map(|ids| &ids[..ids.len().min(SEARCHED.1)]).collect();
    let rest = all.flat_map(|ids| ids[ids.len().min(SEARCHED.1)..].chunks_exact(PROBED.1));
    let mut rest: Vec<&[u32]> = rest.collect();
    if rest.is_empty() {
        rest.clone_from(&starts);
    }
    [spread(&starts, SEARCHED.0), spread(&rest, PROBED.0)]
}

/// The block at each of [`WIDTHS`] up to [`MEASURED`]; scales and ranges suit the streams `searching` that enter it.
fn round(decoder: &Decoder, block: &Block, searching: &[Vec<f32>], measured: &Measured) -> Vec<Rounded> {
    let grid = |bits| Grid { bits, group_size: measured.group_size, symmetric: measured.symmetric };
    let (propagate, seed) = (false, measured.seed);
    let (mut scaled, streams) = (block.clone(), searching.to_vec());
    let task = Task { decoder, recipe: &measured.recipe, grid: &|_| Some(grid(SCALED)), propagate, seed };
    let (_, folded) = task.scale(&mut scaled, &streams);
    let round = |bits: u32| {
        let task = Task { decoder, recipe: &measured.recipe, grid: &|_| Some(grid(bits)), propagate, seed };
        let packed = task.round(scaled.clone(), Vec::new(), &mut streams.clone(), None).packed;
        Rounded::new(decoder, packed.into_iter().flatten().collect(), &folded)
    };
    WIDTHS.into_iter().filter(|&bits| bits <= MEASURED).map(round).collect()
}

/// A block rounded to one width.
struct Rounded {
    /// In the order of [`Slot::ALL`].
    packed: Vec<AffineMatrix>,
    /// 1 / the scale that each column was multiplied with, (k) at each [`Site`].
    columns: Vec<Vec<f32>>,
    /// What each row was divided by, (n) of each slot; empty where it was not.
    rows: Vec<Vec<f32>>,
}

impl Rounded {
    fn new(decoder: &Decoder, packed: Vec<AffineMatrix>, folded: &Folded) -> Self {
        let columns = Site::ALL.map(|site| match &folded[site as usize] {
            Some(scales) => scales.iter().map(|s| 1.0 / s).collect(),
            None => vec![1.0; decoder.width(site)],
        });
        let mut rows = vec![Vec::new(); Slot::ALL.len()];
        if let Some(scales) = &folded[Site::Attended as usize] {
            rows[Slot::V as usize] = scale::per_kv_feature(decoder, scales);
        }
        if let Some(scales) = &folded[Site::Activated as usize] {
            rows[Slot::Up as usize].clone_from(scales);
        }
        Self { packed, columns: columns.into(), rows }
    }

    /// The sum over rows of the squared product of a module's gradient and what rounding changed in its weights.
    fn squares(&self, decoder: &Decoder, block: &Block, slot: Slot, gradients: &Gradients) -> f64 {
        let (linear, gradient) = (block.linear(slot), &gradients.weights[slot as usize]);
        let (packed, divided) = (&self.packed[slot as usize], &self.rows[slot as usize]);
        let k = linear.k;
        let site = Site::ALL.into_iter().find(|site| site.slots().contains(&slot));
        let columns = &self.columns[site.map_or(0, |site| site as usize)];
        // Rows are independent; a run of them shares its buffer.
        const TOGETHER: usize = 16;
        let sums = decoder.threads.map(linear.n.div_ceil(TOGETHER), |run| {
            let mut weights = vec![0.0; k];
            let mut sum = 0.0;
            for row in run * TOGETHER..linear.n.min((run + 1) * TOGETHER) {
                packed.dequantize_row(row, &mut weights);
                let factor = divided.get(row).copied().unwrap_or(1.0);
                let source = &linear.weight[row * k..][..k];
                let gradient = &gradient[row * k..][..k];
                let product = vectorized(|| product(gradient, &weights, columns, factor, source));
                sum += product.powi(2);
            }
            sum
        });
        sums.iter().sum()
    }
}

/// The product of a gradient and rounded * columns * factor - source, each (k).
#[inline]
fn product(gradient: &[f32], rounded: &[f32], columns: &[f32], factor: f32, source: &[f32]) -> f64 {
    const PART: usize = 8;
    let mut sums = [0f32; PART];
    let parts = gradient.as_chunks::<PART>().0.iter().zip(rounded.as_chunks::<PART>().0);
    let parts = parts.zip(columns.as_chunks::<PART>().0).zip(source.as_chunks::<PART>().0);
    for (((gradient, rounded), columns), source) in parts {
        for i in 0..PART {
            sums[i] += gradient[i] * (rounded[i] * columns[i] * factor - source[i]);
        }
    }
    sums.iter().map(|&sum| f64::from(sum)).sum()
}
