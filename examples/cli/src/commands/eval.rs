//! `awqua eval`: what a quantized checkpoint lost against its source.

use std::path::PathBuf;

use awqua::checkpoint::Checkpoint;
use awqua::session::tokenizer::Tokenizer;
use awqua::{Error, ModelConfig};
use awqua_quantizer::evaluate::{self, Comparison, Streams};
use awqua_quantizer::math::Threads;

use super::perplexity::{Ids, read_ids};
use crate::output::{self, Failure, Outcome, Unit};

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder to judge, packed or not
    dir: PathBuf,
    /// Checkpoint folder it is judged against, usually its source
    #[arg(long, value_name = "DIR")]
    reference: PathBuf,
    /// Text file; encoded as a whole, without special tokens
    #[arg(long, value_name = "FILE", required_unless_present = "ids_file", conflicts_with = "ids_file")]
    text: Option<PathBuf>,
    /// JSON file: a list of token ids, {"ids": [...]}, or a list of windows (each a list of ids, taken whole)
    #[arg(long, value_name = "FILE")]
    ids_file: Option<PathBuf>,
    /// Tokens of a window of a text or flat list
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(2..))]
    ctx: u32,
    /// Windows to take [default: all whole ones]
    #[arg(long, value_name = "W")]
    windows: Option<usize>,
    /// Passages with the largest divergence to list
    #[arg(long, value_name = "N", default_value_t = 5)]
    worst: usize,
    /// File that keeps the reference's results for further candidates
    #[arg(long, value_name = "FILE")]
    reference_cache: Option<PathBuf>,
    /// Threads [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &Args) -> Outcome {
    let tokenizer = tokenizer(args)?;
    let windows = windows(args, tokenizer.as_ref())?;
    let threads = args.threads.map_or_else(Threads::available, |n| Threads::new(n.into()));
    let bar = output::progress("reference", Unit::Blocks);
    let mut progress = |done: usize, total: usize| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        Ok(())
    };
    let reference = match &args.reference_cache {
        Some(cache) => Streams::cached(&args.reference, &windows, threads, cache, &mut progress)?,
        None => Streams::compute(&args.reference, &windows, threads, &mut progress)?,
    };
    bar.set_message("candidate");
    let candidate = Streams::compute(&args.dir, &windows, threads, &mut progress)?;
    bar.set_message("comparing");
    let found = evaluate::compare(&reference, &candidate, &windows, args.worst, &mut progress)?;
    bar.finish_and_clear();
    if args.json { output::json(&found) } else { print(&found, tokenizer.as_ref()) }
}

fn tokenizer(args: &Args) -> Outcome<Option<Tokenizer>> {
    let checkpoint = Checkpoint::open(&args.dir)?;
    let config = ModelConfig::from_json(checkpoint.config()).map_err(|e| e.in_file(args.dir.join("config.json")))?;
    Ok(Tokenizer::from_checkpoint(&checkpoint, config.vocab_size)?)
}

fn windows(args: &Args, tokenizer: Option<&Tokenizer>) -> Outcome<Vec<Vec<u32>>> {
    let flat = match (&args.text, &args.ids_file) {
        (Some(file), _) => {
            let text = std::fs::read_to_string(file).map_err(|e| Error::io(file, &e))?;
            let tokenizer = tokenizer.ok_or_else(|| Failure::Usage("--text needs a model with a tokenizer".into()))?;
            tokenizer.encode(&text, false)?
        }
        (None, Some(file)) => match read_ids(file)? {
            Ids::Windows(mut windows) => {
                windows.truncate(args.windows.unwrap_or(usize::MAX));
                return Ok(windows);
            }
            Ids::Flat(ids) | Ids::Named { ids } => ids,
        },
        (None, None) => return Err(Failure::Usage("give --text or --ids-file".into())),
    };
    let length = (args.ctx as usize).min(flat.len().max(2));
    let limit = args.windows.unwrap_or(usize::MAX);
    Ok(flat.chunks_exact(length).take(limit).map(<[u32]>::to_vec).collect())
}

fn print(found: &Comparison, tokenizer: Option<&Tokenizer>) -> Outcome {
    output::line(&format!(
        "{} tokens: nll {:.4} against {:.4} of the reference (perplexity {:.3} / {:.3})",
        found.tokens, found.candidate.nll, found.reference.nll, found.candidate.perplexity, found.reference.perplexity
    ))?;
    output::line(&format!(
        "KL mean {:.5}, p99 {:.4}, max {:.3}; same first choice {:.2} %, {} right to wrong, {} wrong to right",
        found.kl_mean,
        found.kl_p99,
        found.kl_max,
        100.0 * found.agreement,
        found.flips_to_wrong,
        found.flips_to_right
    ))?;
    let decode = |ids: &[u32]| tokenizer.and_then(|t| t.decode(ids, false).ok()).unwrap_or_else(|| format!("{ids:?}"));
    for passage in &found.worst {
        let (before, next) = passage.ids.split_at(passage.ids.len() - 1);
        output::line(&format!(
            "  KL {:.3} in window {} at {}: {:?} then {:?}; reference expects {:?}, candidate {:?}",
            passage.kl,
            passage.window,
            passage.position,
            decode(before),
            decode(next),
            decode(&[passage.reference_top]),
            decode(&[passage.candidate_top])
        ))?;
    }
    Ok(())
}
