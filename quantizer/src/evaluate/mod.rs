//! What a quantized checkpoint lost against its source: likelihood, divergence and flips on the same tokens.
//!
//! Both models are computed block by block in f32, so neither has to fit memory; a packed model has the weights that
//! its codes stand for, as in every engine that runs it.

use std::path::Path;

use awqua::checkpoint::Checkpoint;
use awqua::quant::Quantization;
use awqua::{Error, ErrorKind, Result};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::decoder::{Decoder, Head};
use crate::device::Compute;

mod report;
pub mod tasks;

pub use report::html;
pub use tasks::TaskReport;

/// Rows of logits held at a time, of each model.
const ROWS: usize = 128;

/// Tokens of context a passage is shown with.
const CONTEXT: usize = 24;

/// The residual streams behind the last block of a model, for some windows.
#[derive(Debug)]
pub struct Streams {
    decoder: Decoder,
    head: Head,
    /// (length, hidden) of each window.
    windows: Vec<Vec<f32>>,
}

/// Everything that was measured about a checkpoint.
#[derive(Debug, Clone, Serialize)]
pub struct Evaluation {
    /// What was judged.
    pub candidate_dir: String,
    /// What it was judged against.
    pub reference_dir: String,
    /// On a text.
    #[serde(flatten)]
    pub comparison: Option<Comparison>,
    /// Model and result of each task.
    pub tasks: Vec<(String, TaskReport)>,
}

/// Likelihood of a text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Likelihood {
    /// Mean negative log-likelihood, nats a token.
    pub nll: f64,
    /// Its exponential.
    pub perplexity: f64,
}

/// Comparison of a model with its reference.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// Tokens predicted.
    pub tokens: usize,
    /// Of the reference.
    pub reference: Likelihood,
    /// Of the candidate.
    pub candidate: Likelihood,
    /// Mean of KL(reference || candidate) over tokens, nats.
    pub kl_mean: f64,
    /// 99th percentile.
    pub kl_p99: f64,
    /// Largest.
    pub kl_max: f64,
    /// Share of tokens whose most likely continuation is the same.
    pub agreement: f64,
    /// Tokens that the reference predicts and the candidate does not.
    pub flips_to_wrong: usize,
    /// Tokens that the candidate predicts and the reference does not.
    pub flips_to_right: usize,
    /// The same for each window.
    pub windows: Vec<WindowComparison>,
    /// Tokens by the size of their divergence.
    pub histogram: Vec<Bin>,
    /// Mean divergence by position in the window.
    pub by_position: Vec<PositionBin>,
    /// Error behind each layer, where both models were computed side by side.
    pub layers: Option<Vec<LayerError>>,
    /// The tokens with the largest divergence, largest first.
    pub worst: Vec<Passage>,
}

/// Tokens whose divergence is near a power of ten.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bin {
    /// Middle of the bin.
    pub log10_kl: f64,
    /// Tokens in it.
    pub tokens: usize,
}

/// Mean divergence of some positions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PositionBin {
    /// First position.
    pub position: usize,
    /// Mean divergence, nats.
    pub kl_mean: f64,
}

/// How far the residual streams of two models are apart.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LayerError {
    /// Index of the layer.
    pub layer: usize,
    /// Root of the mean over tokens of |difference|² / |reference|² behind the layer.
    pub relative_error: f64,
}

/// Comparison on one window.
#[derive(Debug, Clone, Serialize)]
pub struct WindowComparison {
    /// Mean negative log-likelihood of the reference.
    pub reference_nll: f64,
    /// Of the candidate.
    pub candidate_nll: f64,
    /// Mean divergence.
    pub kl_mean: f64,
    /// Share of tokens whose most likely continuation is the same.
    pub agreement: f64,
}

/// A token that the two models see very differently.
#[derive(Debug, Clone, Serialize)]
pub struct Passage {
    /// Window it is in.
    pub window: usize,
    /// Position of the predicted token.
    pub position: usize,
    /// KL(reference || candidate), nats.
    pub kl: f64,
    /// The tokens before it, the predicted token last.
    pub ids: Vec<u32>,
    /// What the reference expects most.
    pub reference_top: u32,
    /// What the candidate expects most.
    pub candidate_top: u32,
}

/// What one predicted token shows.
struct Point {
    reference: f64,
    candidate: f64,
    kl: f64,
    reference_top: u32,
    candidate_top: u32,
}

impl Streams {
    /// Runs the checkpoint in folder `dir` over windows of ids, each from an empty context. `progress` gets blocks done
    /// and blocks in all, and its error stops the work.
    ///
    /// # Errors
    /// Those of reading; [`ErrorKind::InvalidInput`] for windows of less than two ids or ids outside the vocabulary.
    pub fn compute(
        dir: &Path,
        windows: &[Vec<u32>],
        compute: impl Into<Compute>,
        progress: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<Self> {
        let mut run = Run::start(dir, windows, compute)?;
        while run.layer < run.layers() {
            progress(run.layer, run.layers())?;
            run.advance()?;
        }
        progress(run.layers(), run.layers())?;
        Ok(run.finish())
    }

    /// Runs two checkpoints over the same windows side by side, and tells how far apart they are behind each layer.
    ///
    /// # Errors
    /// As [`Streams::compute`], and [`ErrorKind::InvalidInput`] if they differ in layers or hidden size.
    pub fn compute_pair(
        reference: &Path,
        candidate: &Path,
        windows: &[Vec<u32>],
        compute: impl Into<Compute>,
        progress: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<(Self, Self, Vec<LayerError>)> {
        let compute = compute.into();
        let mut a = Run::start(reference, windows, compute.clone())?;
        let mut b = Run::start(candidate, windows, compute)?;
        let hidden = a.decoder.config.hidden_size;
        if (a.layers(), hidden) != (b.layers(), b.decoder.config.hidden_size) {
            let message = "the two models differ in layers or hidden size";
            return Err(Error::new(ErrorKind::InvalidInput, message).in_file(candidate));
        }
        let mut errors = Vec::new();
        while a.layer < a.layers() {
            progress(a.layer, a.layers())?;
            a.advance()?;
            b.advance()?;
            let rows = a.streams.iter().zip(&b.streams).flat_map(|(a, b)| a.chunks(hidden).zip(b.chunks(hidden)));
            let (mut sum, mut tokens) = (0.0, 0);
            for (a, b) in rows {
                let square = |of: &mut dyn Iterator<Item = f32>| of.map(|v| f64::from(v).powi(2)).sum::<f64>();
                let error = square(&mut a.iter().zip(b).map(|(a, b)| a - b));
                sum += error / square(&mut a.iter().copied()).max(1e-30);
                tokens += 1;
            }
            let relative_error = (sum / f64::from(tokens.max(1))).sqrt();
            errors.push(LayerError { layer: a.layer - 1, relative_error });
        }
        progress(a.layers(), a.layers())?;
        Ok((a.finish(), b.finish(), errors))
    }

    /// As [`Streams::compute`], but takes the result from `cache` if that file was written for the same checkpoint and
    /// windows, and writes it otherwise. Comparing many candidates with one source saves half of the work.
    ///
    /// # Errors
    /// As [`Streams::compute`], and [`ErrorKind::Io`].
    pub fn cached(
        dir: &Path,
        windows: &[Vec<u32>],
        compute: impl Into<Compute>,
        cache: &Path,
        progress: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<Self> {
        let compute = compute.into();
        let Run { checkpoint, decoder, head, .. } = Run::start(dir, windows, compute.clone())?;
        let key = key(&checkpoint, windows)?;
        let hidden = decoder.config.hidden_size;
        let expected = 32 + windows.iter().map(|ids| 4 * ids.len() * hidden).sum::<usize>();
        match std::fs::read(cache) {
            Ok(bytes) if bytes.len() == expected && bytes[..32] == key => {
                let mut values = bytes[32..].as_chunks().0.iter().map(|&b| f32::from_le_bytes(b));
                let windows = windows.iter().map(|ids| values.by_ref().take(ids.len() * hidden).collect()).collect();
                return Ok(Self { decoder, head, windows });
            }
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(cache, &error)),
        }
        let streams = Self::compute(dir, windows, compute, progress)?;
        let mut bytes = key.to_vec();
        bytes.extend(streams.windows.iter().flatten().flat_map(|v| v.to_le_bytes()));
        std::fs::write(cache, bytes).map_err(|error| Error::io(cache, &error))?;
        Ok(streams)
    }
}

/// A model part of the way through its layers.
struct Run {
    checkpoint: Checkpoint,
    quantization: Option<Quantization>,
    decoder: Decoder,
    head: Head,
    streams: Vec<Vec<f32>>,
    layer: usize,
}

impl Run {
    fn start(dir: &Path, windows: &[Vec<u32>], compute: impl Into<Compute>) -> Result<Self> {
        if windows.is_empty() || windows.iter().any(|ids| ids.len() < 2) {
            return Err(Error::new(ErrorKind::InvalidInput, "every window needs at least two tokens"));
        }
        let checkpoint = Checkpoint::open(dir)?;
        let quantization = Quantization::of(&checkpoint)?;
        let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
        let decoder = Decoder::new(&checkpoint, longest, compute)?;
        let head = Head::load(&decoder, &checkpoint, quantization.as_ref())?;
        let streams = windows.iter().map(|ids| decoder.embed(&checkpoint, ids)).collect::<Result<_>>()?;
        Ok(Self { checkpoint, quantization, decoder, head, streams, layer: 0 })
    }

    fn layers(&self) -> usize {
        self.decoder.config.num_hidden_layers
    }

    fn advance(&mut self) -> Result<()> {
        let block = self.decoder.load(&self.checkpoint, self.quantization.as_ref(), self.layer)?;
        self.streams.iter_mut().for_each(|x| self.decoder.forward(&block, x, &mut |_, _| {}));
        self.layer += 1;
        Ok(())
    }

    fn finish(self) -> Streams {
        Streams { decoder: self.decoder, head: self.head, windows: self.streams }
    }
}

fn key(checkpoint: &Checkpoint, windows: &[Vec<u32>]) -> Result<[u8; 32]> {
    let mut digest = Sha256::new();
    digest.update(checkpoint.config().to_string());
    for tensor in checkpoint.tensors() {
        digest.update(format!("{} {:?} {}", tensor.name, tensor.shape, tensor.file.display()));
    }
    for file in checkpoint.tensors().map(|tensor| &tensor.file).collect::<std::collections::BTreeSet<_>>() {
        let metadata = std::fs::metadata(file).map_err(|error| Error::io(file, &error))?;
        digest.update(format!("{} {:?}", metadata.len(), metadata.modified().ok()));
    }
    for window in windows {
        digest.update((window.len() as u64).to_le_bytes());
        window.iter().for_each(|id| digest.update(id.to_le_bytes()));
    }
    Ok(digest.finalize().into())
}

/// Compares two models on the windows both were computed for; `worst` passages are listed. `progress` gets windows done
/// and windows in all.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] if the models have different vocabularies or windows, and those of `progress`.
pub fn compare(
    reference: &Streams,
    candidate: &Streams,
    windows: &[Vec<u32>],
    worst: usize,
    progress: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Comparison> {
    let fits = |streams: &Streams| {
        let hidden = streams.decoder.config.hidden_size;
        streams.windows.iter().map(|x| x.len() / hidden).eq(windows.iter().map(Vec::len))
    };
    if reference.decoder.config.vocab_size != candidate.decoder.config.vocab_size
        || !fits(reference)
        || !fits(candidate)
    {
        let message = "the two models have different vocabularies, or were computed for other windows";
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    let mut points = Vec::new();
    for (i, ids) in windows.iter().enumerate() {
        progress(i, windows.len())?;
        points.push(compare_window(reference, candidate, i, ids));
    }
    progress(windows.len(), windows.len())?;
    Ok(summarize(&points, windows, worst))
}

fn compare_window(reference: &Streams, candidate: &Streams, i: usize, ids: &[u32]) -> Vec<Point> {
    let vocab = reference.decoder.config.vocab_size;
    let mut points = Vec::with_capacity(ids.len() - 1);
    for first in (0..ids.len() - 1).step_by(ROWS) {
        let rows = ROWS.min(ids.len() - 1 - first);
        let logits = |streams: &Streams| {
            let hidden = streams.decoder.config.hidden_size;
            streams.head.logits(&streams.decoder, &streams.windows[i][first * hidden..(first + rows) * hidden])
        };
        let (a, b) = (logits(reference), logits(candidate));
        points.extend(reference.decoder.threads.map(rows, |row| {
            let target = ids[first + row + 1] as usize;
            point(&a[row * vocab..][..vocab], &b[row * vocab..][..vocab], target)
        }));
    }
    points
}

/// Both models' view of one token.
fn point(a: &[f32], b: &[f32], target: usize) -> Point {
    let top = |logits: &[f32]| {
        let best = logits.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, &l)| match l > best.1 {
            true => (i, l),
            false => best,
        });
        (best.0 as u32, best.1)
    };
    let ((reference_top, a_max), (candidate_top, b_max)) = (top(a), top(b));
    let (mut a_sum, mut b_sum, mut cross) = (0.0f64, 0.0f64, 0.0f64);
    for (&a, &b) in a.iter().zip(b) {
        let p = (a - a_max).exp();
        a_sum += f64::from(p);
        b_sum += f64::from((b - b_max).exp());
        cross += f64::from(p) * f64::from((a - a_max) - (b - b_max));
    }
    let (a_log, b_log) = (a_sum.ln(), b_sum.ln());
    Point {
        reference: a_log - f64::from(a[target] - a_max),
        candidate: b_log - f64::from(b[target] - b_max),
        // Rounding can leave a tiny negative number where both agree.
        kl: (cross / a_sum - a_log + b_log).max(0.0),
        reference_top,
        candidate_top,
    }
}

fn summarize(points: &[Vec<Point>], windows: &[Vec<u32>], worst: usize) -> Comparison {
    let mean =
        |points: &[Point], of: &dyn Fn(&Point) -> f64| points.iter().map(of).sum::<f64>() / points.len().max(1) as f64;
    let agrees = |p: &Point| f64::from(p.reference_top == p.candidate_top);
    let per_window = points.iter().map(|points| WindowComparison {
        reference_nll: mean(points, &|p| p.reference),
        candidate_nll: mean(points, &|p| p.candidate),
        kl_mean: mean(points, &|p| p.kl),
        agreement: mean(points, &agrees),
    });
    let windows_report = per_window.collect();

    let all: Vec<(usize, usize, &Point)> = points
        .iter()
        .enumerate()
        .flat_map(|(w, points)| points.iter().enumerate().map(move |(t, point)| (w, t + 1, point)))
        .collect();
    let tokens = all.len();
    let total = |of: &dyn Fn(&Point) -> f64| all.iter().map(|(_, _, p)| of(p)).sum::<f64>() / tokens.max(1) as f64;
    let likelihood = |nll: f64| Likelihood { nll, perplexity: nll.exp() };
    let mut order: Vec<usize> = (0..tokens).collect();
    order.sort_by(|&i, &j| all[j].2.kl.total_cmp(&all[i].2.kl));
    let kl_at = |rank: usize| order.get(rank).map_or(0.0, |&i| all[i].2.kl);
    let target = |w: usize, t: usize| windows[w][t];
    let flips = |right: &dyn Fn(&Point) -> u32, wrong: &dyn Fn(&Point) -> u32| {
        all.iter().filter(|&&(w, t, p)| right(p) == target(w, t) && wrong(p) != target(w, t)).count()
    };
    Comparison {
        tokens,
        reference: likelihood(total(&|p| p.reference)),
        candidate: likelihood(total(&|p| p.candidate)),
        kl_mean: total(&|p| p.kl),
        kl_p99: kl_at(tokens / 100),
        kl_max: kl_at(0),
        agreement: total(&agrees),
        flips_to_wrong: flips(&|p| p.reference_top, &|p| p.candidate_top),
        flips_to_right: flips(&|p| p.candidate_top, &|p| p.reference_top),
        windows: windows_report,
        histogram: histogram(all.iter().map(|(_, _, p)| p.kl)),
        by_position: by_position(&all),
        layers: None,
        worst: order
            .iter()
            .take(worst)
            .map(|&i| {
                let (window, position, p) = all[i];
                Passage {
                    window,
                    position,
                    kl: p.kl,
                    ids: windows[window][position.saturating_sub(CONTEXT)..=position].to_vec(),
                    reference_top: p.reference_top,
                    candidate_top: p.candidate_top,
                }
            })
            .collect(),
    }
}

/// Four bins a decade, from 1e-6 nats; smaller divergences are in the first.
fn histogram(values: impl Iterator<Item = f64>) -> Vec<Bin> {
    const LOWEST: f64 = -6.0;
    let mut bins: Vec<Bin> = Vec::new();
    for kl in values {
        let at = ((kl.max(1e-30).log10() - LOWEST) * 4.0).floor().max(0.0) as usize;
        while bins.len() <= at {
            bins.push(Bin { log10_kl: LOWEST + (bins.len() as f64 + 0.5) / 4.0, tokens: 0 });
        }
        bins[at].tokens += 1;
    }
    bins
}

/// Sixteen bins of the positions that there are.
fn by_position(all: &[(usize, usize, &Point)]) -> Vec<PositionBin> {
    let longest = all.iter().map(|&(_, position, _)| position).max().unwrap_or(0);
    let width = longest.div_ceil(16).max(1);
    let mut sums = vec![(0.0, 0usize); longest / width + 1];
    for &(_, position, point) in all {
        let (sum, count) = &mut sums[position / width];
        *sum += point.kl;
        *count += 1;
    }
    let bins = sums.iter().enumerate().filter(|(_, (_, count))| *count > 0);
    bins.map(|(i, (sum, count))| PositionBin { position: i * width, kl_mean: sum / *count as f64 }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_hold_every_token_once() {
        let bins = histogram([0.0, 1e-9, 2e-6, 0.5, 3.0].into_iter());
        assert_eq!(bins.iter().map(|b| b.tokens).sum::<usize>(), 5);
        assert_eq!(bins[0].tokens, 2);
        let last = bins.last().unwrap();
        assert!(last.tokens == 1 && (last.log10_kl - 3f64.log10()).abs() < 0.25);
        let point = |kl: f64| Point { reference: 0.0, candidate: 0.0, kl, reference_top: 0, candidate_top: 0 };
        let points: Vec<Point> = (0..40).map(|i| point(f64::from(i))).collect();
        let all: Vec<_> = points.iter().enumerate().map(|(i, p)| (0, i + 1, p)).collect();
        let found = by_position(&all);
        assert_eq!((found[0].position, found[0].kl_mean), (0, 0.5));
        assert_eq!(found.last().unwrap().position, 39);
    }

    #[test]
    fn a_point_is_what_the_definitions_say() {
        let (a, b) = ([1.0f32, 3.0, 0.5], [2.0f32, 1.0, 1.5]);
        let softmax = |l: &[f32]| {
            let sum: f64 = l.iter().map(|&l| f64::from(l).exp()).sum();
            l.iter().map(|&l| f64::from(l).exp() / sum).collect::<Vec<_>>()
        };
        let (p, q) = (softmax(&a), softmax(&b));
        let kl: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
        let found = point(&a, &b, 2);
        assert!((found.kl - kl).abs() < 1e-6 && (found.reference + p[2].ln()).abs() < 1e-6);
        assert!((found.candidate + q[2].ln()).abs() < 1e-6);
        assert_eq!((found.reference_top, found.candidate_top), (1, 0));
        assert_eq!(point(&a, &a, 0).kl, 0.0);
    }
}
