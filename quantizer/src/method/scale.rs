//! Activation-aware scales: channels that carry large activations get a larger share of the grid.
//!
//! AWQ (Lin et al. 2023): for the linear modules that read one input, weights are multiplied by s per input channel
//! before rounding and the operation before divides its output by s, so the function stays the same while the rounding
//! error moves. s = x^a / w^(1-a), from the mean magnitudes of activations and of weights relative to their group, and
//! a is searched against the output of the attention or MLP that follows. Beyond AutoAWQ: everything in f32, no scaling
//! and a = 1 among the candidates, and grouped heads of v share the mean scale of the o columns they feed.
//!
//! Only attention is computed for every candidate. Elsewhere the output is linear in the rounding errors, or taken as
//! such with the mean slope of silu(gate) * up, and the errors are weighed by second moments of the input
//! ([`super::weigh`]): tokens need not be multiplied with every candidate's matrices.

use serde::{Deserialize, Serialize};

use super::Moments;
use super::weigh::{self, Detail, Weigher};
use crate::decoder::{Block, Decoder, Linear, Site, Slot, silu};
use crate::grid::Grid;
use crate::math::{Threads, vectorized};

/// Tokens of each sequence that attention is judged on, and most sequences.
const ATTENTION_TOKENS: usize = 192;
const ATTENTION_SEQUENCES: usize = 2;
/// Tokens that are taken through the MLP.
const MLP_TOKENS: usize = 512;
/// Most rows of a matrix that are rounded to judge scales of its columns.
const JUDGED_ROWS: usize = 1024;

/// What the search learns about a block from its unquantized pass.
#[derive(Debug)]
pub struct Sample {
    /// Residual streams at the start of a few sequences.
    sequences: Vec<Vec<f32>>,
    /// For each [`Site`].
    sites: Vec<SiteSample>,
    /// How much an error of an output of gate and of up counts in what enters down: for each feature the sum over tokens
    /// of the squared derivative of silu(gate) * up.
    slopes: [Vec<f64>; 2],
    /// Every how manyth token is taken through the MLP.
    every: usize,
    seen: usize,
}

/// Magnitudes of the features of a site, and their products inside groups.
#[derive(Debug)]
struct SiteSample {
    magnitudes: Vec<f64>,
    tokens: usize,
    moments: Moments,
}

/// Scales of the input of one site.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SiteScale {
    /// The site.
    pub site: String,
    /// Exponent a, `None` if not scaling was best.
    pub alpha: Option<f32>,
    /// Error of the output relative to that without scaling.
    pub relative_error: f64,
}

impl Sample {
    /// Nothing seen yet; `tokens` are expected. `grid` says how a slot will be rounded.
    pub fn new(decoder: &Decoder, tokens: usize, grid: &dyn Fn(Slot) -> Option<Grid>) -> Self {
        let sites = Site::ALL.iter().map(|&site| {
            let k = decoder.width(site);
            let group = site.slots().iter().filter_map(|&slot| grid(slot)).map(|grid| grid.group(k)).max();
            let moments = Moments::new(k, group.map_or(8, weigh::block));
            SiteSample { magnitudes: vec![0.0; k], tokens: 0, moments }
        });
        Self {
            sequences: Vec::new(),
            sites: sites.collect(),
            slopes: std::array::from_fn(|_| vec![0.0; decoder.width(Site::Activated)]),
            every: tokens.div_ceil(MLP_TOKENS).max(1),
            seen: 0,
        }
    }

    /// Runs the unquantized `block` over the residual stream `x` (length, hidden) of a sequence and notes what it sees.
    pub fn add(&mut self, decoder: &Decoder, block: &Block, x: &[f32]) {
        let (threads, hidden) = (decoder.threads, decoder.config.hidden_size);
        if self.sequences.len() < ATTENTION_SEQUENCES {
            self.sequences.push(x[..(ATTENTION_TOKENS * hidden).min(x.len())].to_vec());
        }
        let mut x = x.to_vec();
        let normed = decoder.attention_input(block, &x);
        self.sites[Site::Attention as usize].add(threads, &normed);
        let attended = decoder.attend(block, &normed);
        self.sites[Site::Attended as usize].add(threads, &attended);
        block.linear(Slot::O).accumulate(decoder, &attended, &mut x);
        let normed = decoder.mlp_input(block, &x);
        self.sites[Site::Mlp as usize].add(threads, &normed);

        // Most of the work is in the MLP, where tokens do not depend on each other.
        let (every, seen) = (self.every, self.seen);
        let kept = normed.chunks_exact(hidden).enumerate().filter(|(i, _)| (seen + i).is_multiple_of(every));
        let kept: Vec<f32> = kept.flat_map(|(_, row)| row).copied().collect();
        self.seen += x.len() / hidden;
        let mut gate = block.linear(Slot::Gate).forward(decoder, &kept);
        let up = block.linear(Slot::Up).forward(decoder, &kept);
        let width = decoder.width(Site::Activated);
        let [of_gate, of_up] = &mut self.slopes;
        for (gate, up) in gate.chunks_exact_mut(width).zip(up.chunks_exact(width)) {
            for (((gate, &up), of_gate), of_up) in gate.iter_mut().zip(up).zip(&mut *of_gate).zip(&mut *of_up) {
                let value = silu(*gate);
                let sigmoid = 1.0 / (1.0 + (-*gate).exp());
                *of_gate += f64::from(up * (sigmoid + value * (1.0 - sigmoid))).powi(2);
                *of_up += f64::from(value).powi(2);
                *gate = value * up;
            }
        }
        self.sites[Site::Activated as usize].add(threads, &gate);
    }
}

impl SiteSample {
    fn add(&mut self, threads: Threads, x: &[f32]) {
        let width = self.magnitudes.len();
        self.tokens += x.len() / width;
        vectorized(|| {
            for row in x.chunks_exact(width) {
                self.magnitudes.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x.abs()));
            }
        });
        self.moments.add(threads, x);
    }
}

/// What was folded at each [`Site`], (width); `None` where the block stayed as it was.
pub type Folded = [Option<Vec<f32>>; Site::ALL.len()];

/// Searches the scales of every site of `block` and folds them in. `grid` says how a slot will be rounded, `None` that
/// it stays as it is. The function of the block does not change.
pub fn search(
    decoder: &Decoder,
    block: &mut Block,
    sample: &Sample,
    grid: &dyn Fn(Slot) -> Option<Grid>,
) -> (Vec<SiteScale>, Folded) {
    let (mut found, mut folded) = (Vec::new(), Folded::default());
    for site in Site::ALL {
        if site.slots().iter().all(|&slot| grid(slot).is_none()) {
            continue;
        }
        let judge = Judge { decoder, block, sample, site, grid };
        let (scales, report) = judge.best();
        found.push(report);
        if let Some(scales) = scales {
            fold(decoder, block, site, &scales);
            folded[site as usize] = Some(scales);
        }
    }
    (found, folded)
}

/// Divides what produces the input of `site` by `scales` (width) and multiplies the columns that read it.
///
/// # Panics
/// If the scales are not as many as the input has features, or differ inside a group of heads that share a v head.
pub fn fold(decoder: &Decoder, block: &mut Block, site: Site, scales: &[f32]) {
    assert_eq!(scales.len(), decoder.width(site), "a scale a feature");
    let divide_norm = |norm: &mut Vec<f32>| norm.iter_mut().zip(scales).for_each(|(w, s)| *w /= s);
    match site {
        Site::Attention => divide_norm(&mut block.input_norm),
        Site::Mlp => divide_norm(&mut block.post_norm),
        Site::Attended => {
            let shared = per_kv_feature(decoder, scales);
            divide_rows(block.linear_mut(Slot::V), &shared);
        }
        Site::Activated => divide_rows(block.linear_mut(Slot::Up), scales),
    }
    for &slot in site.slots() {
        let linear = block.linear_mut(slot);
        for row in linear.weight.chunks_exact_mut(linear.k) {
            row.iter_mut().zip(scales).for_each(|(w, s)| *w *= s);
        }
    }
}

fn divide_rows(linear: &mut Linear, scales: &[f32]) {
    for (row, s) in linear.weight.chunks_exact_mut(linear.k).zip(scales) {
        row.iter_mut().for_each(|w| *w /= s);
    }
    if let Some(bias) = &mut linear.bias {
        bias.iter_mut().zip(scales).for_each(|(b, s)| *b /= s);
    }
}

/// The scale of each feature of v from those of the o columns, which are equal for all query heads of a v head.
pub(crate) fn per_kv_feature(decoder: &Decoder, scales: &[f32]) -> Vec<f32> {
    let c = &decoder.config;
    let group = c.num_attention_heads / c.num_key_value_heads;
    (0..decoder.kv_width())
        .map(|i| {
            let (head, at) = (i / c.head_dim, i % c.head_dim);
            let of = |query: usize| scales[(head * group + query) * c.head_dim + at];
            assert!((1..group).all(|query| of(query) == of(0)), "query heads of a v head share its scales");
            of(0)
        })
        .collect()
}

/// Replaces the magnitudes of o's inputs by their mean over the query heads that read the same v feature.
fn share_heads(decoder: &Decoder, values: &mut [f64]) {
    let c = &decoder.config;
    let group = c.num_attention_heads / c.num_key_value_heads;
    for head in 0..c.num_key_value_heads {
        for at in 0..c.head_dim {
            let index = |query: usize| (head * group + query) * c.head_dim + at;
            let mean = (0..group).map(|query| values[index(query)]).sum::<f64>() / group as f64;
            (0..group).for_each(|query| values[index(query)] = mean);
        }
    }
}

/// Finds the scales of one site.
struct Judge<'a> {
    decoder: &'a Decoder,
    block: &'a Block,
    sample: &'a Sample,
    site: Site,
    grid: &'a dyn Fn(Slot) -> Option<Grid>,
}

impl Judge<'_> {
    /// The best scales, or `None` if not scaling is best.
    fn best(&self) -> (Option<Vec<f32>>, SiteScale) {
        let site = &self.sample.sites[self.site as usize];
        let mut x_mean: Vec<f64> = site.magnitudes.iter().map(|sum| sum / site.tokens.max(1) as f64).collect();
        let mut w_mean = self.weight_means();
        if self.site == Site::Attended {
            share_heads(self.decoder, &mut x_mean);
            share_heads(self.decoder, &mut w_mean);
        }
        // What attention makes of errors of q and k depends on all tokens at once.
        let expected = (self.site == Site::Attention).then(|| self.attention(self.block));
        let judged = if expected.is_some() { Vec::new() } else { self.judged_rows() };
        let error = |scales: Option<&[f32]>| match &expected {
            Some(expected) => self.attention_error(scales, expected),
            None => judged.iter().map(|rows| rows.error(self.decoder.threads, scales)).sum(),
        };
        let plain = error(None);
        let mut best: (f64, Option<(f32, Vec<f32>)>) = (plain, None);
        let consider = |alpha: f32, best: &mut (f64, Option<(f32, Vec<f32>)>)| {
            let scales = scales(&x_mean, &w_mean, alpha);
            let error = error(Some(&scales));
            // Also refuses an error that is not a number.
            if error < best.0 {
                *best = (error, Some((alpha, scales)));
            }
        };
        (0..=10).for_each(|i| consider(i as f32 / 10.0, &mut best));
        if let Some(near) = best.1.as_ref().map(|found| found.0) {
            let around = [near - 0.05, near + 0.05].into_iter().filter(|alpha| (0.0..=1.0).contains(alpha));
            around.for_each(|alpha| consider(alpha, &mut best));
        }
        let (alpha, scales) = best.1.unzip();
        let relative_error = if plain > 0.0 { best.0 / plain } else { 1.0 };
        (scales, SiteScale { site: self.site.name().to_owned(), alpha, relative_error })
    }

    /// For every input channel, the mean over rows of |w| relative to the largest of its group.
    fn weight_means(&self) -> Vec<f64> {
        let width = self.decoder.width(self.site);
        let mut sums = vec![0.0; width];
        let mut rows = 0;
        for &slot in self.site.slots() {
            let linear = self.block.linear(slot);
            let group = (self.grid)(slot).map_or(width, |grid| grid.group(width));
            for row in linear.weight.chunks_exact(width) {
                for (row, sums) in row.chunks_exact(group).zip(sums.chunks_exact_mut(group)) {
                    let largest = row.iter().fold(0f32, |m, w| m.max(w.abs())) + 1e-6;
                    row.iter().zip(sums).for_each(|(w, sum)| *sum += f64::from(w.abs() / largest));
                }
            }
            rows += linear.n;
        }
        sums.iter().map(|sum| sum / rows.max(1) as f64).collect()
    }

    /// What is rounded of the modules that read the site, whose outputs count by a number each.
    fn judged_rows(&self) -> Vec<JudgedRows<'_>> {
        let k = self.decoder.width(self.site);
        let site = &self.sample.sites[self.site as usize];
        let of = |&slot: &Slot| {
            let linear = self.block.linear(slot);
            let grid = (self.grid)(slot)?;
            let group = grid.group(k);
            let weigher = |g: usize| Weigher::new(&site.moments, g * group, group, Detail::Leading);
            let weighers = (0..k / group).map(weigher).collect();
            let counts = match slot {
                Slot::Gate => self.slopes(0),
                Slot::Up => self.slopes(1),
                _ => vec![1.0; linear.n],
            };
            Some(JudgedRows { linear, grid, weighers, counts, every: linear.n.div_ceil(JUDGED_ROWS) })
        };
        self.site.slots().iter().filter_map(of).collect()
    }

    /// How much the square of an error of each output of gate or of up counts in the output of the block.
    fn slopes(&self, of: usize) -> Vec<f64> {
        let down = self.block.linear(Slot::Down);
        let mut squares = vec![0.0; down.k];
        for row in down.weight.chunks_exact(down.k) {
            squares.iter_mut().zip(row).for_each(|(sum, &w)| *sum += f64::from(w * w));
        }
        self.sample.slopes[of].iter().zip(squares).map(|(slope, square)| slope * square).collect()
    }

    /// Squared error of the output of attention when q, k and v are rounded with these scales.
    fn attention_error(&self, scales: Option<&[f32]>, expected: &[f32]) -> f64 {
        let mut changed = Block { linears: Vec::new(), ..self.block.without_linears() };
        for slot in Slot::ALL {
            let linear = self.block.linear(slot);
            changed.linears.push(match ((self.grid)(slot), slot) {
                (Some(grid), Slot::Q | Slot::K | Slot::V) => self.rounded(linear, grid, scales),
                (_, Slot::Q | Slot::K | Slot::V | Slot::O) => linear.clone(),
                _ => Linear::new(linear.n, linear.k, Vec::new(), None),
            });
        }
        let output = self.attention(&changed);
        output.iter().zip(expected).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    /// The module with Q(W s) / s as its weight, on the device if that will compute with it.
    fn rounded(&self, linear: &Linear, grid: Grid, scales: Option<&[f32]>) -> Linear {
        let tokens = self.sample.sequences.first().map_or(0, |x| x.len() / self.decoder.config.hidden_size);
        let device = self.decoder.device.as_ref().filter(|device| device.takes(tokens, linear.n, linear.k));
        let ones;
        let scales = match scales {
            Some(scales) => scales,
            None => {
                ones = vec![1.0; linear.k];
                &ones
            }
        };
        let there = device.and_then(|device| device.rounded(linear.resident(device)?, scales, grid));
        match there {
            Some(resident) => Linear::on_device(resident, linear.bias.clone()),
            None => rounded(self.decoder.threads, linear, grid, scales),
        }
    }

    /// Output of attention for the sampled sequences.
    fn attention(&self, block: &Block) -> Vec<f32> {
        let of = |x: &Vec<f32>| {
            let attended = self.decoder.attend(block, &self.decoder.attention_input(block, x));
            block.linear(Slot::O).forward(self.decoder, &attended)
        };
        self.sample.sequences.iter().flat_map(of).collect()
    }
}

/// Rows of one matrix that stand for all of it.
struct JudgedRows<'a> {
    linear: &'a Linear,
    grid: Grid,
    /// Of each group.
    weighers: Vec<Weigher>,
    /// How much the squared error of each output counts, (n).
    counts: Vec<f64>,
    /// Every how manyth row is judged.
    every: usize,
}

impl JudgedRows<'_> {
    /// Squared error of the outputs when the rows are rounded with these scales.
    fn error(&self, threads: Threads, scales: Option<&[f32]>) -> f64 {
        const TOGETHER: usize = 32;
        let k = self.linear.k;
        let group = self.grid.group(k);
        let ones;
        let scales = match scales {
            Some(scales) => scales,
            None => {
                ones = vec![1.0; k];
                &ones
            }
        };
        let inverses: Vec<f32> = scales.iter().map(|s| 1.0 / s).collect();
        let mut costs = vec![0.0; self.linear.n.div_ceil(self.every)];
        threads.rows(&mut costs, 1, |first, costs| {
            let mut errors = vec![0.0; TOGETHER * k];
            let mut scratch = Vec::new();
            for (i, costs) in costs.chunks_mut(TOGETHER).enumerate() {
                let row = |j: usize| (first + i * TOGETHER + j) * self.every;
                for (j, errors) in errors.chunks_exact_mut(k).enumerate().take(costs.len()) {
                    let w = &self.linear.weight[row(j) * k..][..k];
                    errors.copy_from_slice(w);
                    round_row(errors, self.grid, scales, &inverses);
                    errors.iter_mut().zip(w).for_each(|(error, w)| *error -= w);
                }
                for (g, weigher) in self.weighers.iter().enumerate() {
                    weigher.add(&errors[g * group..], k, costs, &mut scratch);
                }
                costs.iter_mut().enumerate().for_each(|(j, cost)| *cost *= self.counts[row(j)]);
            }
        });
        costs.iter().sum::<f64>() * self.every as f64
    }
}

/// s = x^a / w^(1-a), centred around 1.
fn scales(x_mean: &[f64], w_mean: &[f64], alpha: f32) -> Vec<f32> {
    let alpha = f64::from(alpha);
    let mut scales: Vec<f64> = x_mean
        .iter()
        .zip(w_mean)
        .map(|(x, w)| (x.max(1e-8).powf(alpha) / (w.powf(1.0 - alpha) + 1e-4)).max(1e-4))
        .collect();
    let (low, high) = scales.iter().fold((f64::INFINITY, 0f64), |(l, h), &s| (l.min(s), h.max(s)));
    let centre = (low * high).sqrt();
    // A channel whose activations are all zero says nothing; bounds keep it from saying it loudly.
    scales.iter_mut().for_each(|s| *s = (*s / centre).clamp(1e-3, 1e3));
    scales.iter().map(|&s| if s.is_finite() { s as f32 } else { 1.0 }).collect()
}

/// The module with Q(W s) / s as its weight.
fn rounded(threads: Threads, linear: &Linear, grid: Grid, scales: &[f32]) -> Linear {
    let (n, k) = (linear.n, linear.k);
    let inverses: Vec<f32> = scales.iter().map(|s| 1.0 / s).collect();
    let mut weight = vec![0.0; n * k];
    threads.rows(&mut weight, k, |first, rows| {
        for (row, w) in rows.chunks_exact_mut(k).zip(linear.weight[first * k..].chunks_exact(k)) {
            row.copy_from_slice(w);
            round_row(row, grid, scales, &inverses);
        }
    });
    Linear::new(n, k, weight, linear.bias.clone())
}

/// w = Q(w s) / s for one row.
fn round_row(row: &mut [f32], grid: Grid, scales: &[f32], inverses: &[f32]) {
    let group = grid.group(row.len());
    vectorized(|| {
        row.iter_mut().zip(scales).for_each(|(w, s)| *w *= s);
        for (row, inverses) in row.chunks_exact_mut(group).zip(inverses.chunks_exact(group)) {
            let (low, high) = zero_and_extremes(row);
            let step = grid.span(low, high);
            let (inverse, max) = (1.0 / step.scale, grid.max_code());
            for (w, s) in row.iter_mut().zip(inverses) {
                let code = (crate::grid::round(*w * inverse) + step.zero).clamp(0.0, max);
                *w = (code - step.zero) * step.scale * s;
            }
        }
    });
}

/// The smallest and the largest of 0 and the elements, which are a multiple of 8; in eight interleaved parts.
#[inline]
fn zero_and_extremes(row: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = ([0f32; 8], [0f32; 8]);
    for part in row.as_chunks::<8>().0 {
        for i in 0..8 {
            low[i] = if part[i] < low[i] { part[i] } else { low[i] };
            high[i] = if part[i] > high[i] { part[i] } else { high[i] };
        }
    }
    (low.iter().fold(0.0, |a, &b| a.min(b)), high.iter().fold(0.0, |a, &b| a.max(b)))
}
