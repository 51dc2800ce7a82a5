//! Activation-aware scales: channels that carry large activations get a larger share of the grid.
//!
//! AWQ (Lin et al. 2023): for the linear modules that read one input, weights are multiplied by s per input channel
//! before rounding and the operation before divides its output by s, so the function stays the same while the rounding
//! error moves. s = x^a / w^(1-a), from the mean magnitudes of activations and of weights relative to their group, and
//! a is searched against the output of the attention or MLP that follows. Beyond AutoAWQ: everything in f32, no scaling
//! and a = 1 among the candidates, and grouped heads of v share the mean scale of the o columns they feed.

use serde::{Deserialize, Serialize};

use crate::decoder::{Block, Decoder, Linear, Site, Slot};
use crate::grid::Grid;
use crate::math::{Threads, vectorized};

/// Tokens of each sequence that attention is judged on, and most sequences.
const ATTENTION_TOKENS: usize = 192;
const ATTENTION_SEQUENCES: usize = 2;
/// Tokens that the other modules are judged on.
const SAMPLE_TOKENS: usize = 256;

/// What the search learns about a block from its unquantized pass.
#[derive(Debug)]
pub struct Sample {
    /// Residual streams at the start of a few sequences.
    sequences: Vec<Vec<f32>>,
    /// For each [`Site`]: sums of magnitudes, and rows spread over all tokens.
    sites: Vec<SiteSample>,
    /// Every how manyth token is kept.
    stride: usize,
}

#[derive(Debug)]
struct SiteSample {
    width: usize,
    tokens: usize,
    magnitudes: Vec<f64>,
    rows: Vec<f32>,
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
    /// Nothing seen yet; `tokens` are expected.
    pub fn new(decoder: &Decoder, tokens: usize) -> Self {
        let sites = Site::ALL.iter().map(|&site| {
            let width = decoder.width(site);
            SiteSample { width, tokens: 0, magnitudes: vec![0.0; width], rows: Vec::new() }
        });
        Self { sequences: Vec::new(), sites: sites.collect(), stride: tokens.div_ceil(SAMPLE_TOKENS).max(1) }
    }

    /// Runs the unquantized `block` over the residual stream `x` (length, hidden) of a sequence and notes what it sees.
    pub fn add(&mut self, decoder: &Decoder, block: &Block, x: &[f32]) {
        if self.sequences.len() < ATTENTION_SEQUENCES {
            let kept = (ATTENTION_TOKENS * decoder.config.hidden_size).min(x.len());
            self.sequences.push(x[..kept].to_vec());
        }
        let (stride, sites) = (self.stride, &mut self.sites);
        decoder.forward(block, &mut x.to_vec(), &mut |site, x| sites[site as usize].add(stride, x));
    }
}

impl SiteSample {
    fn add(&mut self, stride: usize, x: &[f32]) {
        for row in x.chunks_exact(self.width) {
            if self.tokens.is_multiple_of(stride) {
                self.rows.extend_from_slice(row);
            }
            self.tokens += 1;
            for (sum, &x) in self.magnitudes.iter_mut().zip(row) {
                *sum += f64::from(x.abs());
            }
        }
    }
}

/// Searches the scales of every site of `block` and folds them in. `grid` says how a slot will be rounded, `None` that
/// it stays as it is. The function of the block does not change.
pub fn search(
    decoder: &Decoder,
    block: &mut Block,
    sample: &Sample,
    grid: &dyn Fn(Slot) -> Option<Grid>,
) -> Vec<SiteScale> {
    let mut found = Vec::new();
    for site in Site::ALL {
        if site.slots().iter().all(|&slot| grid(slot).is_none()) {
            continue;
        }
        let judge = Judge { decoder, block, sample, site, grid };
        let (scales, report) = judge.best();
        found.push(report);
        if let Some(scales) = scales {
            fold(decoder, block, site, &scales);
        }
    }
    found
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
fn per_kv_feature(decoder: &Decoder, scales: &[f32]) -> Vec<f32> {
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
        let expected = self.output(self.block);
        let site = &self.sample.sites[self.site as usize];
        let mut x_mean: Vec<f64> = site.magnitudes.iter().map(|sum| sum / site.tokens.max(1) as f64).collect();
        let mut w_mean = self.weight_means();
        if self.site == Site::Attended {
            share_heads(self.decoder, &mut x_mean);
            share_heads(self.decoder, &mut w_mean);
        }
        let plain = self.error(None, &expected);
        let mut best: (f64, Option<(f32, Vec<f32>)>) = (plain, None);
        let mut consider = |alpha: f32| {
            let scales = scales(&x_mean, &w_mean, alpha);
            let error = self.error(Some(&scales), &expected);
            // Also refuses an error that is not a number.
            if error < best.0 {
                best = (error, Some((alpha, scales)));
            }
        };
        (0..=10).for_each(|i| consider(i as f32 / 10.0));
        let near = best.1.as_ref().map(|found| found.0);
        if let Some(alpha) = near {
            for offset in [-0.05, 0.05] {
                if (0.0..=1.0).contains(&(alpha + offset)) {
                    let scales = scales(&x_mean, &w_mean, alpha + offset);
                    let error = self.error(Some(&scales), &expected);
                    if error < best.0 {
                        best = (error, Some((alpha + offset, scales)));
                    }
                }
            }
        }
        let (alpha, scales) = best.1.unzip();
        let relative_error = if plain > 0.0 { best.0 / plain } else { 1.0 };
        (scales, SiteScale { site: self.site.name().to_owned(), alpha, relative_error })
    }

    /// For every input channel, the mean over rows of |w| relative to the largest of its group.
    fn weight_means(&self) -> Vec<f64> {
        let width = self.sample.sites[self.site as usize].width;
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

    /// Squared error of the output when the site's modules are rounded with these scales.
    fn error(&self, scales: Option<&[f32]>, expected: &[f32]) -> f64 {
        let mut changed = Block { linears: Vec::new(), ..self.block.without_linears() };
        for slot in Slot::ALL {
            let linear = self.block.linear(slot);
            let grid = (self.grid)(slot).filter(|_| self.site.slots().contains(&slot));
            changed.linears.push(match (grid, self.reads(slot)) {
                (Some(grid), _) => self.rounded(linear, grid, scales),
                (None, true) => linear.clone(),
                (None, false) => Linear::new(linear.n, linear.k, Vec::new(), None),
            });
        }
        let output = self.output(&changed);
        output.iter().zip(expected).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    /// The module with Q(W s) / s as its weight, on the device if that will compute with it.
    fn rounded(&self, linear: &Linear, grid: Grid, scales: Option<&[f32]>) -> Linear {
        let rows = self.sample.sites[self.site as usize].rows.len() / linear.k;
        let device = self.decoder.device.as_ref().filter(|device| device.takes(rows, linear.n, linear.k));
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

    /// Whether the judged output depends on the module.
    fn reads(&self, slot: Slot) -> bool {
        match self.site {
            Site::Attention => matches!(slot, Slot::Q | Slot::K | Slot::V | Slot::O),
            Site::Mlp => matches!(slot, Slot::Gate | Slot::Up | Slot::Down),
            Site::Attended | Site::Activated => self.site.slots().contains(&slot),
        }
    }

    /// The output that is judged: of attention, of the MLP, or of the module itself.
    fn output(&self, block: &Block) -> Vec<f32> {
        let rows = &self.sample.sites[self.site as usize].rows;
        match self.site {
            Site::Attention => {
                let of = |x: &Vec<f32>| {
                    let attended = self.decoder.attend(block, &self.decoder.attention_input(block, x));
                    block.linear(Slot::O).forward(self.decoder, &attended)
                };
                self.sample.sequences.iter().flat_map(of).collect()
            }
            Site::Mlp => block.linear(Slot::Down).forward(self.decoder, &self.decoder.activate(block, rows)),
            Site::Attended => block.linear(Slot::O).forward(self.decoder, rows),
            Site::Activated => block.linear(Slot::Down).forward(self.decoder, rows),
        }
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
    let group = grid.group(k);
    let inverses: Vec<f32> = scales.iter().map(|s| 1.0 / s).collect();
    let mut weight = vec![0.0; n * k];
    threads.rows(&mut weight, k, |first, rows| {
        vectorized(|| {
            for (row, w) in rows.chunks_exact_mut(k).zip(linear.weight[first * k..].chunks_exact(k)) {
                row.iter_mut().zip(w).zip(scales).for_each(|((out, w), s)| *out = w * s);
                for (row, inverses) in row.chunks_exact_mut(group).zip(inverses.chunks_exact(group)) {
                    let (low, high) = row.iter().fold((0f32, 0f32), |(l, h), &w| (l.min(w), h.max(w)));
                    let step = grid.span(low, high);
                    let (inverse, max) = (1.0 / step.scale, grid.max_code());
                    for (w, s) in row.iter_mut().zip(inverses) {
                        let code = (crate::grid::round(*w * inverse) + step.zero).clamp(0.0, max);
                        *w = (code - step.zero) * step.scale * s;
                    }
                }
            }
        })
    });
    Linear::new(n, k, weight, linear.bias.clone())
}
