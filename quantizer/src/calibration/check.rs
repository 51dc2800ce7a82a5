//! Whether a text excites a packed model as its calibration did.
//!
//! Scales, ranges and compensation fit the activations that calibration showed. A text whose activations are spread
//! differently over the features is served worse, and averages over other texts will not show it. Packing therefore
//! leaves the root mean square of every feature at every site in [`FILE`], over two halves of the calibration; the shift of a text is
//! its distance from both together, judged by the distance of the halves from each other.

use std::path::Path;

use awqua::checkpoint::Checkpoint;
use awqua::quant::Quantization;
use awqua::{Error, ErrorKind, Result};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Serialize;

use crate::decoder::{Decoder, Site};
use crate::device::Compute;

/// Name of the file in a packed checkpoint. It is in safetensors form under another extension, because loaders take
/// every `.safetensors` of a folder for weights.
pub const FILE: &str = "awqua_calibration.stats";

/// Largest file read.
const MAX_BYTES: u64 = 1 << 30;

/// A text counts as different from the calibration when it is this many times as far from it as one half of the
/// calibration is from the other.
pub const WARN_RATIO: f64 = 2.0;

/// Features below this share of their site's mean energy say nothing: they are rounding noise.
const NEGLIGIBLE: f64 = 1e-6;

/// How far a text is from the calibration.
#[derive(Debug, Clone, Serialize)]
pub struct Shift {
    /// Mean over sites of [`SiteShift::distance`].
    pub distance: f64,
    /// Mean over sites of [`SiteShift::own`].
    pub own: f64,
    /// `distance / own`.
    pub ratio: f64,
    /// Whether the ratio is above [`WARN_RATIO`].
    pub differs: bool,
    /// Tokens of the text.
    pub tokens: usize,
    /// Sites with the largest ratio first.
    pub sites: Vec<SiteShift>,
}

/// How far a text is from the calibration at one site.
#[derive(Debug, Clone, Serialize)]
pub struct SiteShift {
    /// Index of the layer.
    pub layer: usize,
    /// Name of the [`Site`].
    pub site: &'static str,
    /// Mean over features of |log2(rms here / rms in calibration)|.
    pub distance: f64,
    /// The same between the two halves of the calibration, halved: how far a sample of the same text is from the whole.
    pub own: f64,
    /// The feature that grew most, and by which factor.
    pub most: (usize, f32),
}

/// Two halves of a site's root mean squares, with the layer and the site.
pub(crate) type Halves = (usize, Site, [Vec<f32>; 2]);

pub(crate) fn encode(spread: &[Halves]) -> Result<Vec<u8>> {
    let refuse = |error: safetensors::SafeTensorError| Error::new(ErrorKind::InvalidInput, error.to_string());
    let tensors: Vec<(String, usize, Vec<u8>)> = spread
        .iter()
        .map(|(layer, site, halves)| {
            let bytes = halves.iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
            (format!("{layer}.{}", site.name()), halves[0].len(), bytes)
        })
        .collect();
    let views: Vec<_> = tensors
        .iter()
        .map(|(name, width, bytes)| Ok((name.as_str(), TensorView::new(Dtype::F32, vec![2, *width], bytes)?)))
        .collect::<Result<_, _>>()
        .map_err(refuse)?;
    safetensors::serialize(views, None).map_err(refuse)
}

fn read(checkpoint: &Checkpoint, decoder: &Decoder) -> Result<Vec<Halves>> {
    let path = checkpoint.dir().join(FILE);
    let damaged = |message: String| Error::new(ErrorKind::InvalidFile, message).in_file(&path);
    let bytes = checkpoint.read(FILE, MAX_BYTES)?.ok_or_else(|| {
        let message =
            "the checkpoint has no record of its calibration; it was packed without one or by another program";
        Error::new(ErrorKind::Unsupported, message).in_file(&path)
    })?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| damaged(error.to_string()))?;
    let mut found = Vec::new();
    for layer in 0..decoder.config.num_hidden_layers {
        for site in Site::ALL {
            let name = format!("{layer}.{}", site.name());
            let tensor = tensors.tensor(&name).map_err(|error| damaged(error.to_string()))?;
            let width = decoder.width(site);
            if tensor.dtype() != Dtype::F32 || tensor.shape() != [2, width] {
                return Err(damaged(format!("`{name}` is not two rows of {width} f32")));
            }
            let values: Vec<f32> = tensor.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
            found.push((layer, site, [values[..width].to_vec(), values[width..].to_vec()]));
        }
    }
    Ok(found)
}

/// Runs the packed checkpoint in folder `dir` over `sequences` and compares what its linear modules see with what they
/// saw in calibration. `progress` gets blocks done and blocks in all.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for a checkpoint without a record of its calibration, [`ErrorKind::InvalidFile`] for a
/// damaged one, [`ErrorKind::InvalidInput`] for sequences that the model cannot read; those of reading and `progress`.
pub fn check(
    dir: &Path,
    sequences: &[Vec<u32>],
    compute: impl Into<Compute>,
    progress: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Shift> {
    if sequences.iter().all(Vec::is_empty) {
        return Err(Error::new(ErrorKind::InvalidInput, "no tokens to compare with the calibration"));
    }
    let checkpoint = Checkpoint::open(dir)?;
    let quantization = Quantization::of(&checkpoint)?;
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
    let decoder = Decoder::new(&checkpoint, longest, compute)?;
    let calibration = read(&checkpoint, &decoder)?;
    let mut streams: Vec<Vec<f32>> =
        sequences.iter().map(|ids| decoder.embed(&checkpoint, ids)).collect::<Result<_>>()?;
    let layers = decoder.config.num_hidden_layers;
    let tokens = sequences.iter().map(Vec::len).sum::<usize>();
    let mut sites = Vec::new();
    for layer in 0..layers {
        progress(layer, layers)?;
        let block = decoder.load(&checkpoint, quantization.as_ref(), layer)?;
        let mut squares: Vec<Vec<f64>> = Site::ALL.iter().map(|&site| vec![0.0; decoder.width(site)]).collect();
        for x in &mut streams {
            decoder.forward(&block, x, &mut |site, x| {
                let sums = &mut squares[site as usize];
                for row in x.chunks_exact(sums.len()) {
                    sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x * x));
                }
            });
        }
        for (site, squares) in Site::ALL.iter().zip(&squares) {
            let rms: Vec<f32> = squares.iter().map(|sum| (sum / tokens as f64).sqrt() as f32).collect();
            if let Some((_, _, halves)) = calibration.iter().find(|(l, s, _)| *l == layer && s == site) {
                sites.push(shift(layer, *site, &rms, halves));
            }
        }
    }
    progress(layers, layers)?;
    let mean = |of: &dyn Fn(&SiteShift) -> f64| sites.iter().map(of).sum::<f64>() / sites.len().max(1) as f64;
    let (distance, own) = (mean(&|s| s.distance), mean(&|s| s.own));
    // Two equal halves leave nothing to judge by; then any distance is one.
    let ratio = distance / own.max(1e-6);
    sites.sort_by(|a, b| (b.distance / b.own.max(1e-6)).total_cmp(&(a.distance / a.own.max(1e-6))));
    Ok(Shift { distance, own, ratio, differs: ratio > WARN_RATIO, tokens, sites })
}

fn shift(layer: usize, site: Site, rms: &[f32], halves: &[Vec<f32>; 2]) -> SiteShift {
    let whole: Vec<f64> = halves[0]
        .iter()
        .zip(&halves[1])
        .map(|(&a, &b)| ((f64::from(a).powi(2) + f64::from(b).powi(2)) / 2.0).sqrt())
        .collect();
    let energy = whole.iter().map(|v| v * v).sum::<f64>() / whole.len().max(1) as f64;
    let floor = (energy * NEGLIGIBLE).sqrt().max(1e-12);
    let octaves = |a: f64, b: f64| (a.max(floor) / b.max(floor)).log2();
    let n = whole.len().max(1) as f64;
    let distance = rms.iter().zip(&whole).map(|(&a, &b)| octaves(f64::from(a), b).abs()).sum::<f64>() / n;
    let pairs = halves[0].iter().zip(&halves[1]);
    let own = pairs.map(|(&a, &b)| octaves(f64::from(a), f64::from(b)).abs()).sum::<f64>() / (2.0 * n);
    let growth = rms.iter().zip(&whole).map(|(&a, &b)| octaves(f64::from(a), b)).enumerate();
    let most = growth.fold((0, f64::NEG_INFINITY), |most, (i, g)| if g > most.1 { (i, g) } else { most });
    SiteShift { layer, site: site.name(), distance, own, most: (most.0, most.1.exp2() as f32) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shift_is_measured_in_octaves_and_judged_by_the_halves() {
        let halves = [vec![1.0, 2.0, 0.0], vec![1.0, 2.0, 0.0]];
        let same = shift(3, Site::Mlp, &[1.0, 2.0, 0.0], &halves);
        assert_eq!((same.distance, same.own), (0.0, 0.0));
        let louder = shift(3, Site::Mlp, &[4.0, 2.0, 0.0], &halves);
        assert!((louder.distance - 2.0 / 3.0).abs() < 1e-9);
        assert_eq!(louder.most, (0, 4.0));
        let apart = shift(0, Site::Mlp, &[1.0, 2.0, 1.0], &[vec![1.0, 1.0, 1.0], vec![1.0, 4.0, 1.0]]);
        assert!((apart.own - 1.0 / 3.0).abs() < 1e-9);
    }
}
