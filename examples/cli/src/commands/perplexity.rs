//! `awqua perplexity`: how well a model predicts a text.

use std::path::{Path, PathBuf};
use std::time::Instant;

use awqua::{CancelToken, Error, ErrorKind};
use serde::Serialize;

use crate::options::DeviceArgs;
use crate::output::{self, Failure, Outcome, Unit};

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder or GGUF file
    dir: PathBuf,
    /// Text file; encoded as a whole, without special tokens
    #[arg(long, value_name = "FILE", required_unless_present = "ids_file", conflicts_with = "ids_file")]
    text: Option<PathBuf>,
    /// JSON file: a list of token ids, {"ids": [...]}, or a list of windows (each a list of ids, taken whole)
    #[arg(long, value_name = "FILE")]
    ids_file: Option<PathBuf>,
    /// Windows to take [default: all whole ones]
    #[arg(long, value_name = "W", value_parser = clap::value_parser!(u32).range(1..))]
    windows: Option<u32>,
    /// Tokens between the starts of windows; below --ctx, a window predicts only its last tokens, with the others
    /// as context [default: --ctx, so that windows are disjoint and predict all but their first token]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    stride: Option<u32>,
    /// Print {"nll","perplexity","tokens",...}
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

#[derive(Serialize)]
struct Report {
    /// Mean negative log-likelihood, nats a token.
    nll: f64,
    perplexity: f64,
    /// Tokens predicted.
    tokens: usize,
    windows: usize,
    /// Tokens computed a second.
    tokens_s: f64,
}

/// Tokens of one forward pass, and the first of them that is predicted.
struct Window<'a> {
    ids: &'a [u32],
    first: usize,
}

pub fn run(args: &Args) -> Outcome {
    let model = args.device.open(&args.dir)?;
    let mut ctx = args.device.ctx.unwrap_or(1024) as usize;
    let texts = match (&args.text, &args.ids_file) {
        (Some(file), _) => {
            let text = std::fs::read_to_string(file).map_err(|e| Error::io(file, &e))?;
            vec![model.tokenizer()?.encode(&text, false)?]
        }
        (None, Some(file)) => match read_ids(file)? {
            Ids::Windows(windows) => {
                // They are cut already.
                ctx = windows.iter().map(Vec::len).max().unwrap_or(0).max(2);
                windows
            }
            Ids::Flat(ids) | Ids::Named { ids } => vec![ids],
        },
        (None, None) => return Err(Failure::Usage("give --text or --ids-file".into())),
    };
    let windows = cut(&texts, ctx, args.stride.map_or(ctx, |s| s as usize), args.windows.map(|w| w as usize))?;
    let longest = windows.iter().map(|w| w.ids.len()).max().unwrap_or(0);
    let mut device = args.device.clone();
    // `--ctx` is the window here; the session only has to hold the longest one.
    device.ctx = Some(longest as u32);
    let mut session = device.session(&model, longest)?;

    let bar = output::progress("scoring", Unit::Parts);
    bar.set_length(windows.len() as u64);
    let (mut nll, mut tokens, mut computed) = (0.0, 0, 0);
    let start = Instant::now();
    for window in &windows {
        session.score(window.ids, &CancelToken::default(), &mut |position, logits| {
            if let Some(&next) = window.ids.get(position + 1)
                && position + 1 >= window.first
            {
                nll += surprise(logits, next);
                tokens += 1;
            }
        })?;
        computed += window.ids.len();
        bar.inc(1);
    }
    bar.finish_and_clear();
    let nll = nll / tokens as f64;
    let report = Report {
        nll,
        perplexity: nll.exp(),
        tokens,
        windows: windows.len(),
        tokens_s: computed as f64 / start.elapsed().as_secs_f64(),
    };
    if args.json {
        return output::json(&report);
    }
    output::line(&format!(
        "nll {:.5}, perplexity {:.4} over {} tokens in {} windows ({:.1} tokens/s)",
        report.nll, report.perplexity, report.tokens, report.windows, report.tokens_s
    ))
}

/// `-ln softmax(logits)[id]`
fn surprise(logits: &[f32], id: u32) -> f64 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, &l| m.max(l));
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    sum.ln() - f64::from(logits[id as usize] - max)
}

/// What `--ids-file` may hold.
#[derive(serde::Deserialize)]
#[serde(untagged)]
pub(super) enum Ids {
    Flat(Vec<u32>),
    Windows(Vec<Vec<u32>>),
    Named { ids: Vec<u32> },
}

pub(super) fn read_ids(file: &Path) -> Outcome<Ids> {
    let bytes = std::fs::read(file).map_err(|e| Error::io(file, &e))?;
    serde_json::from_slice(&bytes).map_err(|_| {
        Error::new(ErrorKind::InvalidFile, "expected a list of token ids, of such lists, or {\"ids\": [...]}")
            .in_file(file)
            .into()
    })
}

/// Cuts every text into windows; the end that fills no window is left out, unless a text is shorter than one.
fn cut(texts: &[Vec<u32>], ctx: usize, stride: usize, limit: Option<usize>) -> Outcome<Vec<Window<'_>>> {
    if ctx < 2 || stride > ctx {
        return Err(Failure::Usage("--ctx must be at least 2 and --stride at most --ctx".into()));
    }
    let mut windows = Vec::new();
    for ids in texts {
        if ids.len() <= ctx {
            windows.push(Window { ids, first: 1 });
            continue;
        }
        for start in (0..=ids.len() - ctx).step_by(stride) {
            // An overlapping window predicts what the one before it did not.
            let first = if start == 0 || stride == ctx { 1 } else { ctx - stride };
            windows.push(Window { ids: &ids[start..start + ctx], first });
        }
    }
    windows.truncate(limit.unwrap_or(usize::MAX));
    windows.retain(|w| w.ids.len() > w.first);
    match windows.is_empty() {
        true => Err(Error::new(ErrorKind::InvalidInput, "fewer than two tokens: nothing to predict").into()),
        false => Ok(windows),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disjoint_windows_drop_the_rest_and_overlapping_ones_predict_once() {
        let texts = vec![(0..10).collect::<Vec<u32>>()];
        let disjoint = cut(&texts, 4, 4, None).unwrap();
        assert_eq!(disjoint.iter().map(|w| (w.ids[0], w.first)).collect::<Vec<_>>(), [(0, 1), (4, 1)]);
        let overlapping = cut(&texts, 4, 2, None).unwrap();
        let predicted: Vec<u32> = overlapping.iter().flat_map(|w| w.ids[w.first..].to_vec()).collect();
        assert_eq!(predicted, (1..10).collect::<Vec<_>>());
        assert_eq!(cut(&texts, 4, 4, Some(1)).unwrap().len(), 1);
        assert_eq!(cut(&texts, 64, 64, None).unwrap()[0].ids.len(), 10);
        assert!(cut(&[vec![1]], 4, 4, None).is_err());
        assert!(cut(&texts, 4, 5, None).is_err());
    }

    #[test]
    fn surprise_is_the_negative_log_softmax() {
        let expected = (1.0f64 + (-1.0f64).exp() + 1.0f64.exp()).ln() - 1.0;
        assert!((surprise(&[0.0, 1.0, -1.0], 1) - expected).abs() < 1e-6);
    }
}
