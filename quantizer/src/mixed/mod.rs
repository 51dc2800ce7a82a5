//! Bits for every module under a budget, from what rounding it alone costs.
//!
//! Modules differ by orders of magnitude in what the model loses when they are rounded, so the same number of bytes
//! buys more where it hurts most. [`measure`] tells KL(source || source with only this unit rounded) for every unit and
//! width; losses of units are taken to add up, and [`Sensitivity::allocate`] chooses.

use std::collections::BTreeMap;
use std::path::Path;

use awqua::checkpoint::Checkpoint;
use awqua::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::calibration::Calibration;
use crate::math::Threads;
use crate::method::Recipe;
use crate::quantize::{Plan, QuantizeOptions, plan};

mod fisher;

pub use fisher::measure;

/// Widths that there are; 16 leaves a module as it is.
pub const WIDTHS: [u32; 7] = [2, 3, 4, 5, 6, 8, 16];

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
    pub losses: [f64; WIDTHS.len()],
}

/// What rounding each part of a model costs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sensitivity {
    /// In the order of the layers.
    pub units: Vec<Unit>,
    /// What it was measured with.
    pub measured: Measured,
}

/// What a [`Sensitivity`] is good for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// SHA-256 of names, shapes and samples of the source's tensors.
    pub source: String,
    /// SHA-256 of the calibration.
    pub calibration: String,
    /// Modules of a unit.
    pub granularity: Granularity,
    /// Input features that shared a scale; `None`: all of a row.
    pub group_size: Option<usize>,
    /// Whether zero points were the middle of the range.
    pub symmetric: bool,
    /// How codes were chosen: without compensation or learning.
    pub recipe: Recipe,
    /// Seed of the draws.
    pub seed: u64,
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

impl Measured {
    /// What a run as `plan` says would measure.
    fn by(plan: &Plan, calibration: &Calibration, granularity: Granularity) -> Result<Self> {
        Ok(Self {
            source: identity(&plan.checkpoint)?,
            calibration: calibration.sha256(),
            granularity,
            group_size: plan.group_size,
            symmetric: plan.options.symmetric,
            // What fits codes to many tokens would take as long as rounding the model, once for every width.
            recipe: Recipe { compensate: None, correct: None, learn: None, tune: None, ..plan.recipe.clone() },
            seed: plan.options.seed,
        })
    }
}

/// SHA-256 of names, shapes and the first bytes of all tensors: tells models apart without reading all of them.
fn identity(checkpoint: &Checkpoint) -> Result<String> {
    const READ: usize = 256;
    let mut digest = Sha256::new();
    for tensor in checkpoint.tensors() {
        digest.update(format!("{} {:?} ", tensor.name, tensor.shape));
        let bytes = tensor.bytes()?;
        digest.update(&bytes[..bytes.len().min(READ)]);
    }
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

impl Sensitivity {
    /// Reads what an earlier [`measure`] with the same arguments found, as JSON.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidFile`] for what [`measure`] never finds; [`ErrorKind::InvalidInput`] if something else was asked
    /// then; those of [`plan`].
    pub fn from_json(
        json: &[u8],
        source: &Path,
        calibration: &Calibration,
        options: &QuantizeOptions,
        granularity: Granularity,
    ) -> Result<Self> {
        let broken = |what: String| Error::new(ErrorKind::InvalidFile, format!("not what rounding costs: {what}"));
        let known: Self = serde_json::from_slice(json).map_err(|e| broken(e.to_string()))?;
        let plan = plan(source, calibration, options, Threads::new(1))?;
        if known.measured != Measured::by(&plan, calibration, granularity)? {
            let message =
                "measured with another source, calibration, group size or method; give another file, or remove it";
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        if known.units.iter().try_fold(0u64, |sum, unit| sum.checked_add(unit.weights)).is_none() {
            return Err(broken("more weights than there can be".to_owned()));
        }
        for unit in &known.units {
            let Some(name) = unit.modules.first() else { return Err(broken("a unit without modules".to_owned())) };
            if unit.losses.iter().any(|&loss| loss < 0.0) || !unit.losses.is_sorted_by(|a, b| a >= b) {
                return Err(broken(format!("losses of `{name}` that are negative or grow with the bits")));
            }
        }
        Ok(known)
    }

    /// The bits among `widths` with the smallest loss whose cost fits `budget`; `cost(unit, bits)` is in any unit and
    /// grows with the bits. Never worse than one width for all units.
    ///
    /// The loss that counts is half-way, in logarithms, between what was measured and what an average module of as many
    /// weights loses. On other text and in other company units differ less than they were measured to, and those that
    /// look best or worst do so by chance, too.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if no width is given, or even the fewest bits cost more.
    pub fn allocate(&self, budget: f64, widths: &[u32], cost: &dyn Fn(&Unit, u32) -> f64) -> Result<Allocation> {
        let widths: Vec<usize> = (0..WIDTHS.len()).filter(|&i| widths.contains(&WIDTHS[i])).collect();
        let Some(&least) = widths.first() else {
            return Err(Error::new(ErrorKind::InvalidInput, "no width to choose from"));
        };
        let price =
            |i: usize, from: usize, to: usize| cost(&self.units[i], WIDTHS[to]) - cost(&self.units[i], WIDTHS[from]);
        let hedged = self.hedged();
        let saved = |i: usize, from: usize, to: usize| hedged[i][from] - hedged[i][to];
        let slope = |i: usize, from: usize, to: usize| saved(i, from, to) / price(i, from, to).max(f64::MIN_POSITIVE);
        let spent = |width: usize| self.units.iter().map(|unit| cost(unit, WIDTHS[width])).sum::<f64>();
        let uniform = widths.iter().copied().rfind(|&width| spent(width) <= budget);
        let Some(uniform) = uniform else {
            let message = format!(
                "{} bits for every module cost {:.0}, more than the budget {budget:.0}",
                WIDTHS[least],
                spent(least)
            );
            return Err(Error::new(ErrorKind::InvalidInput, message));
        };
        // Steps along the lower hull of each unit's losses, the one that saves most for its cost first.
        let mut steps: Vec<(f64, usize, usize)> = Vec::new();
        for i in 0..self.units.len() {
            let mut at = least;
            while let Some(next) = widths
                .iter()
                .copied()
                .filter(|&to| to > at && saved(i, at, to) > 0.0)
                .max_by(|&a, &b| slope(i, at, a).total_cmp(&slope(i, at, b)))
            {
                steps.push((slope(i, at, next), i, next));
                at = next;
            }
        }
        steps.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut chosen = vec![least; self.units.len()];
        let mut left = budget - spent(least);
        let mut stopped = vec![false; self.units.len()];
        for (_, i, to) in steps {
            let price = price(i, chosen[i], to);
            // A unit whose step does not fit leaves the rest to cheaper ones.
            if stopped[i] || price > left {
                stopped[i] = true;
                continue;
            }
            left -= price;
            chosen[i] = to;
        }
        // What is left goes to steps off the hull.
        let fits = |left: f64, chosen: &[usize]| {
            let steps = (0..chosen.len()).flat_map(|i| widths.iter().map(move |&to| (i, to)));
            let steps = steps.filter(|&(i, to)| to > chosen[i] && price(i, chosen[i], to) <= left);
            let steps = steps.filter(|&(i, to)| saved(i, chosen[i], to) > 0.0);
            steps.max_by(|a, b| slope(a.0, chosen[a.0], a.1).total_cmp(&slope(b.0, chosen[b.0], b.1)))
        };
        while let Some((i, to)) = fits(left, &chosen) {
            left -= price(i, chosen[i], to);
            chosen[i] = to;
        }
        let loss = |chosen: &[usize]| -> f64 { hedged.iter().zip(chosen).map(|(losses, &c)| losses[c]).sum() };
        let same = vec![uniform; self.units.len()];
        let chosen = if loss(&same) < loss(&chosen) { same } else { chosen };
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

    /// The geometric means of every unit's losses and of what as many weights lose on average.
    fn hedged(&self) -> Vec<[f64; WIDTHS.len()]> {
        let weights = self.units.iter().map(|unit| unit.weights).sum::<u64>().max(1) as f64;
        let average: [f64; WIDTHS.len()] =
            std::array::from_fn(|i| self.units.iter().map(|unit| unit.losses[i]).sum::<f64>() / weights);
        let of = |unit: &Unit| std::array::from_fn(|i| (unit.losses[i] * average[i] * unit.weights as f64).sqrt());
        self.units.iter().map(of).collect()
    }

    /// The bits among `widths` for a mean of `bits` a weight; scales and zero points come on top, as they do for uniform
    /// widths.
    ///
    /// # Errors
    /// As [`Self::allocate`].
    pub fn for_mean_bits(&self, bits: f64, widths: &[u32]) -> Result<Allocation> {
        let weights: u64 = self.units.iter().map(|unit| unit.weights).sum();
        let cost = |unit: &Unit, bits: u32| unit.weights as f64 * f64::from(bits);
        // A millionth of a bit, so that a budget that is met exactly is met.
        self.allocate((bits + 1e-6) * weights as f64, widths, &cost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::Method;
    use crate::random::Random;

    /// Units of 100 weights with losses at 2, 3, 4 and 8 bits, and none at 16.
    fn units(losses: &[[f64; 4]]) -> Sensitivity {
        let unit = |(i, &[two, three, four, eight]): (usize, &[f64; 4])| Unit {
            modules: vec![format!("m{i}")],
            weights: 100,
            losses: [two, three, four, four, four, eight, 0.0],
        };
        let measured = Measured {
            source: String::new(),
            calibration: String::new(),
            granularity: Granularity::Module,
            group_size: Some(32),
            symmetric: false,
            recipe: Method::Awq.recipe(4),
            seed: 0,
        };
        Sensitivity { units: losses.iter().enumerate().map(unit).collect(), measured }
    }

    #[test]
    fn bits_go_where_they_save_most_and_never_over_the_budget() {
        let s = units(&[[9.0, 3.0, 1.0, 0.1], [0.9, 0.3, 0.1, 0.01], [0.0; 4]]);
        let at = |bits: f64| s.for_mean_bits(bits, &WIDTHS).unwrap();
        assert!(at(2.0).bits_of.values().all(|&b| b == 2));
        let middle = at(3.0);
        assert!(middle.mean_bits <= 3.0 && middle.bits_of["m0"] > middle.bits_of["m1"], "{middle:?}");
        assert_eq!(middle.bits_of["m2"], 2);
        assert!(at(16.0).predicted_loss == 0.0);
        let losses: Vec<f64> = (4..=32).map(|b| at(f64::from(b) / 2.0).predicted_loss).collect();
        assert!(losses.is_sorted_by(|a, b| a >= b), "{losses:?}");
        let kind = |bits: f64, widths: &[u32]| s.for_mean_bits(bits, widths).unwrap_err().kind();
        assert_eq!(kind(1.9, &WIDTHS), ErrorKind::InvalidInput);
        assert_eq!(kind(4.0, &[]), ErrorKind::InvalidInput);
    }

    #[test]
    fn no_other_choice_within_the_budget_is_better() {
        let widths = [2, 3, 4, 8, 16];
        let s = units(&[[8.0, 2.0, 0.5, 0.0], [4.0, 1.5, 0.2, 0.0], [1.0, 0.6, 0.3, 0.1]]);
        let hedged = s.hedged();
        let loss = |unit: usize, bits: u32| hedged[unit][WIDTHS.iter().position(|&w| w == bits).unwrap()];
        for budget in [7, 9, 10, 12] {
            let found = s.for_mean_bits(f64::from(budget) / 3.0, &widths).unwrap();
            let mut best = f64::INFINITY;
            for (a, b, c) in widths.iter().flat_map(|&a| widths.iter().flat_map(move |&b| widths.map(|c| (a, b, c)))) {
                if a + b + c <= budget {
                    best = best.min(loss(0, a) + loss(1, b) + loss(2, c));
                }
            }
            let chosen: f64 = (0..3).map(|i| loss(i, found.bits_of[&format!("m{i}")])).sum();
            assert!((chosen - best).abs() < 1e-9, "{budget}: {found:?} against {best}");
        }
    }

    #[test]
    fn a_choice_is_never_worse_than_one_width_and_has_only_the_widths_that_are_offered() {
        let mut random = Random::new(17);
        for round in 0..200 {
            let mut s = units(&vec![[0.0; 4]; 1 + round % 9]);
            for unit in &mut s.units {
                unit.weights = 1 + random.below(1000) as u64;
                // Any losses that do not grow with the bits.
                let mut losses: Vec<f64> = (0..WIDTHS.len()).map(|_| (random.below(1000) as f64).powi(2)).collect();
                losses.sort_by(|a, b| b.total_cmp(a));
                unit.losses.copy_from_slice(&losses);
            }
            for widths in [&WIDTHS[..], &[2, 3, 4, 8], &[4, 16]] {
                for (i, bits) in WIDTHS.into_iter().enumerate().filter(|(_, bits)| widths.contains(bits)) {
                    let found = s.for_mean_bits(f64::from(bits), widths).unwrap();
                    let hedged = s.hedged();
                    let uniform: f64 = hedged.iter().map(|losses| losses[i]).sum();
                    let at = |name: &str| WIDTHS.iter().position(|&bits| bits == found.bits_of[name]).unwrap();
                    let chosen = s.units.iter().zip(&hedged).map(|(unit, losses)| losses[at(&unit.modules[0])]);
                    let chosen: f64 = chosen.sum();
                    assert!(chosen <= uniform + 1e-9, "{bits} of {widths:?}: {found:?} against {uniform}");
                    assert!(found.mean_bits <= f64::from(bits) + 1e-5);
                    assert!(found.bits_of.values().all(|bits| widths.contains(bits)));
                }
            }
        }
    }
}
