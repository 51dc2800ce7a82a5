//! Bits for every module under a budget, from what rounding it alone costs.
//!
//! Modules differ by orders of magnitude in what the model loses when they are rounded, so the same number of bytes
//! buys more where it hurts most. The loss of a unit is measured: KL(source || source with only this unit rounded) on
//! calibration text at one width, and carried over to the other widths by the ratio of their errors, each weight
//! counting by the mean square of its input. Losses of units are taken to add up.

use std::collections::BTreeMap;
use std::path::Path;

use awqua::checkpoint::Checkpoint;
use awqua::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use crate::calibration::Calibration;
use crate::decoder::{Block, Decoder, Head, Site, Slot};
use crate::device::Compute;
use crate::grid::{Grid, dequantize};
use crate::math::Threads;
use crate::quantize::GroupSize;

/// Widths that are offered; 16 leaves a module as it is.
pub const WIDTHS: [u32; 5] = [2, 3, 4, 8, 16];

/// Width that losses are measured at: coarse enough to show, fine enough for the model to stay itself.
const MEASURED: u32 = 3;

/// Tokens that losses are measured on, from as many sequences.
const TOKENS: usize = 256;
const SEQUENCES: usize = 4;

/// Which modules get their bits together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Granularity {
    /// Modules that engines fuse: q, k and v; gate and up. vLLM loads nothing else.
    #[default]
    Fused,
    /// Every module for itself.
    Module,
}

/// What rounding some modules costs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Unit {
    /// Names without `.weight`.
    pub modules: Vec<String>,
    /// Weights of all of them.
    pub weights: u64,
    /// Loss at each of [`WIDTHS`], nats a token.
    pub losses: Vec<f64>,
}

/// What rounding each part of a model costs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sensitivity {
    /// In the order of the layers.
    pub units: Vec<Unit>,
    /// SHA-256 of the calibration it was measured with.
    pub calibration: String,
    /// Input features that shared a scale; `None`: all of a row.
    pub group_size: Option<usize>,
}

/// Bits chosen for a budget.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Allocation {
    /// Of every module.
    pub bits_of: BTreeMap<String, u32>,
    /// Mean over weights.
    pub mean_bits: f64,
    /// Sum of the units' losses, nats a token.
    pub predicted_loss: f64,
}

/// Measures what rounding each unit of the checkpoint in folder `source` costs. `progress` gets blocks done and blocks in
/// all.
///
/// # Errors
/// Those of reading; [`ErrorKind::InvalidInput`] for a calibration that cannot be used; those of `progress`.
pub fn measure(
    source: &Path,
    calibration: &Calibration,
    group_size: GroupSize,
    granularity: Granularity,
    compute: impl Into<Compute>,
    progress: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Sensitivity> {
    let checkpoint = Checkpoint::open(source)?;
    let sequences = probe(calibration);
    let length = sequences.iter().map(Vec::len).max().unwrap_or(0);
    let decoder = Decoder::new(&checkpoint, length, compute)?;
    let threads = decoder.threads;
    Calibration::of_ids(&calibration.name, sequences.clone()).check(decoder.config.vocab_size)?;
    let group_size = group_size.resolve(&decoder).map_err(|error| error.in_file(source))?;
    let head = Head::load(&decoder, &checkpoint, None)?;
    let layers = decoder.config.num_hidden_layers;

    // The exact model's stream, and one for every unit so far.
    let mut exact: Vec<Vec<f32>> =
        sequences.iter().map(|ids| decoder.embed(&checkpoint, ids)).collect::<Result<_>>()?;
    let mut rounded: Vec<Vec<Vec<f32>>> = Vec::new();
    let mut units = Vec::new();
    // Ratios of the losses at all widths to that at the measured one.
    let mut ratios: Vec<Vec<f64>> = Vec::new();
    for layer in 0..layers {
        progress(layer, layers + 1)?;
        let block = decoder.load(&checkpoint, None, layer)?;
        let advance = |block: &Block, streams: &mut Vec<Vec<f32>>| {
            streams.iter_mut().for_each(|x| decoder.forward(block, x, &mut |_, _| {}));
        };
        rounded.iter_mut().for_each(|streams| advance(&block, streams));
        let entering = exact.clone();
        let mut squares: Vec<Vec<f64>> = Site::ALL.iter().map(|&site| vec![0.0; decoder.width(site)]).collect();
        for x in &mut exact {
            decoder.forward(&block, x, &mut |site, x| {
                let sums = &mut squares[site as usize];
                for row in x.chunks_exact(sums.len()) {
                    sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x * x));
                }
            });
        }
        for site in Site::ALL {
            let parts: Vec<&[Slot]> = match granularity {
                Granularity::Fused => vec![site.slots()],
                Granularity::Module => site.slots().chunks(1).collect(),
            };
            for slots in parts {
                let mut changed = block.clone();
                let mut errors = vec![0.0; WIDTHS.len()];
                for &slot in slots {
                    let linear = block.linear(slot);
                    for (error, bits) in errors.iter_mut().zip(WIDTHS).filter(|(_, bits)| *bits < 16) {
                        let grid = Grid { bits, group_size, symmetric: false };
                        let weights = nearest(threads, grid, &linear.weight, linear.k);
                        *error += weighted_error(&linear.weight, &weights, &squares[site as usize]);
                        if bits == MEASURED {
                            changed.linear_mut(slot).weight = weights;
                        }
                    }
                }
                let mut streams = entering.clone();
                advance(&changed, &mut streams);
                rounded.push(streams);
                let measured = WIDTHS.iter().position(|&bits| bits == MEASURED).map_or(0.0, |i| errors[i]);
                ratios.push(errors.iter().map(|e| if measured > 0.0 { e / measured } else { 0.0 }).collect());
                units.push(Unit {
                    modules: slots.iter().map(|slot| decoder.name(layer, slot.module())).collect(),
                    weights: slots.iter().map(|&slot| decoder.shape(slot)).map(|(n, k)| (n * k) as u64).sum(),
                    losses: Vec::new(),
                });
            }
        }
    }
    progress(layers, layers + 1)?;
    let tokens = sequences.iter().map(Vec::len).sum::<usize>().max(1) as f64;
    let teacher: Vec<f32> = exact.concat();
    let candidates: Vec<Vec<f32>> = rounded.into_iter().map(|streams| streams.concat()).collect();
    let losses = head.divergences(&decoder, &teacher, &candidates);
    for ((unit, ratios), loss) in units.iter_mut().zip(ratios).zip(losses) {
        unit.losses = ratios.iter().map(|ratio| ratio * loss / tokens).collect();
    }
    progress(layers + 1, layers + 1)?;
    Ok(Sensitivity { units, calibration: calibration.sha256(), group_size })
}

/// A few tokens of sequences spread over the calibration.
fn probe(calibration: &Calibration) -> Vec<Vec<u32>> {
    let all = &calibration.sequences;
    let count = SEQUENCES.min(all.len());
    let each = TOKENS / count.max(1);
    (0..count).map(|i| &all[i * all.len() / count]).map(|ids| ids[..each.min(ids.len())].to_vec()).collect()
}

fn nearest(threads: Threads, grid: Grid, w: &[f32], k: usize) -> Vec<f32> {
    let steps = grid.spans(w, k);
    let codes = grid.round_to_nearest(threads, w, k, &steps);
    dequantize(threads, &grid.matrix(w.len() / k, k, codes, &steps))
}

fn weighted_error(w: &[f32], rounded: &[f32], squares: &[f64]) -> f64 {
    let rows = w.chunks_exact(squares.len()).zip(rounded.chunks_exact(squares.len()));
    rows.map(|(w, r)| {
        let errors = w.iter().zip(r).zip(squares);
        errors.map(|((w, r), s)| f64::from(w - r).powi(2) * s).sum::<f64>()
    })
    .sum()
}

impl Sensitivity {
    /// The bits with the smallest predicted loss whose cost fits `budget`; `cost(unit, bits)` is in any unit.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if even the fewest bits cost more.
    pub fn allocate(&self, budget: f64, cost: &dyn Fn(&Unit, u32) -> f64) -> Result<Allocation> {
        let mut chosen = vec![0; self.units.len()];
        let mut spent: f64 = self.units.iter().map(|unit| cost(unit, WIDTHS[0])).sum();
        if spent > budget {
            let message =
                format!("{} bits for every module cost {spent:.0}, more than the budget {budget:.0}", WIDTHS[0]);
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        // Steps along the lower hull of each unit's losses, the one that saves most for its cost first.
        let mut steps: Vec<(f64, usize, usize)> = Vec::new();
        for (i, unit) in self.units.iter().enumerate() {
            let mut at = 0;
            while at + 1 < WIDTHS.len() {
                let slope = |to: usize| {
                    let price = cost(unit, WIDTHS[to]) - cost(unit, WIDTHS[at]);
                    (unit.losses[at] - unit.losses[to]) / price.max(f64::MIN_POSITIVE)
                };
                let Some(next) = (at + 1..WIDTHS.len()).max_by(|&a, &b| slope(a).total_cmp(&slope(b))) else { break };
                steps.push((slope(next), i, next));
                at = next;
            }
        }
        steps.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut stopped = vec![false; self.units.len()];
        for (_, i, to) in steps {
            let price = cost(&self.units[i], WIDTHS[to]) - cost(&self.units[i], WIDTHS[chosen[i]]);
            // A unit whose step does not fit leaves the rest to cheaper ones.
            if stopped[i] || spent + price > budget {
                stopped[i] = true;
                continue;
            }
            spent += price;
            chosen[i] = to;
        }
        let weights: u64 = self.units.iter().map(|unit| unit.weights).sum();
        let bits: f64 = self.units.iter().zip(&chosen).map(|(u, &c)| u.weights as f64 * f64::from(WIDTHS[c])).sum();
        Ok(Allocation {
            bits_of: self
                .units
                .iter()
                .zip(&chosen)
                .flat_map(|(unit, &c)| unit.modules.iter().map(move |name| (name.clone(), WIDTHS[c])))
                .collect(),
            mean_bits: bits / (weights as f64).max(1.0),
            predicted_loss: self.units.iter().zip(&chosen).map(|(unit, &c)| unit.losses[c]).sum(),
        })
    }

    /// The bits for a mean of `bits` a weight; scales and zero points come on top, as they do for uniform widths.
    ///
    /// # Errors
    /// As [`Self::allocate`].
    pub fn for_mean_bits(&self, bits: f64) -> Result<Allocation> {
        let weights: u64 = self.units.iter().map(|unit| unit.weights).sum();
        let cost = |unit: &Unit, bits: u32| unit.weights as f64 * f64::from(bits);
        // A millionth of a bit, so that a budget that is met exactly is met.
        self.allocate((bits + 1e-6) * weights as f64, &cost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn units(losses: &[[f64; 5]]) -> Sensitivity {
        let unit = |(i, losses): (usize, &[f64; 5])| Unit {
            modules: vec![format!("m{i}")],
            weights: 100,
            losses: losses.to_vec(),
        };
        let units = losses.iter().enumerate().map(unit).collect();
        Sensitivity { units, calibration: String::new(), group_size: Some(32) }
    }

    #[test]
    fn bits_go_where_they_save_most_and_never_over_the_budget() {
        let s = units(&[[9.0, 3.0, 1.0, 0.1, 0.0], [0.9, 0.3, 0.1, 0.01, 0.0], [0.0; 5]]);
        let at = |bits: f64| s.for_mean_bits(bits).unwrap();
        assert!(at(2.0).bits_of.values().all(|&b| b == 2));
        let middle = at(3.0);
        assert!(middle.mean_bits <= 3.0 && middle.bits_of["m0"] > middle.bits_of["m1"], "{middle:?}");
        assert_eq!(middle.bits_of["m2"], 2);
        assert!(at(16.0).predicted_loss == 0.0);
        let losses: Vec<f64> = (4..=32).map(|b| at(f64::from(b) / 2.0).predicted_loss).collect();
        assert!(losses.is_sorted_by(|a, b| a >= b), "{losses:?}");
        assert_eq!(s.for_mean_bits(1.9).unwrap_err().kind(), ErrorKind::InvalidInput);
    }

    #[test]
    fn no_other_choice_within_the_budget_is_better() {
        let s = units(&[[8.0, 2.0, 0.5, 0.0, 0.0], [4.0, 1.5, 0.2, 0.0, 0.0], [1.0, 0.6, 0.3, 0.1, 0.0]]);
        for budget in [7, 9, 10, 12] {
            let found = s.for_mean_bits(f64::from(budget) / 3.0).unwrap();
            let mut best = f64::INFINITY;
            for a in 0..5 {
                for b in 0..5 {
                    for c in 0..5 {
                        if WIDTHS[a] + WIDTHS[b] + WIDTHS[c] <= budget {
                            best = best.min(s.units[0].losses[a] + s.units[1].losses[b] + s.units[2].losses[c]);
                        }
                    }
                }
            }
            assert!((found.predicted_loss - best).abs() < 1e-9, "{budget}: {found:?} against {best}");
        }
    }
}
