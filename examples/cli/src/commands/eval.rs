//! `awqua eval`: what a quantized checkpoint lost against its source.

use std::path::{Path, PathBuf};

use awqua::checkpoint::Checkpoint;
use awqua::session::tokenizer::Tokenizer;
use awqua::{Error, ErrorKind, ModelConfig};
use awqua_quantizer::device::Compute;
use awqua_quantizer::evaluate::{self, Comparison, Evaluation, Streams, TaskReport, tasks};

use super::perplexity::{Ids, read_ids};
use crate::options::ComputeArgs;
use crate::output::{self, Failure, Outcome, Unit};

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder to judge, packed or not
    dir: PathBuf,
    /// Checkpoint folder it is judged against, usually its source
    #[arg(long, value_name = "DIR")]
    reference: PathBuf,
    /// Text file; encoded as a whole, without special tokens
    #[arg(long, value_name = "FILE", conflicts_with = "ids_file")]
    text: Option<PathBuf>,
    /// JSON file: a list of token ids, {"ids": [...]}, or a list of windows (each a list of ids, taken whole)
    #[arg(long, value_name = "FILE", required_unless_present_any = ["text", "task"])]
    ids_file: Option<PathBuf>,
    /// JSONL file, also gzipped, of requests (context, continuation, label) to score both models on; may be repeated
    #[arg(long, value_name = "FILE")]
    task: Vec<PathBuf>,
    /// Questions of each task to take [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Score tasks on the judged checkpoint only
    #[arg(long)]
    candidate_only: bool,
    /// Tokens of a window of a text or flat list
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(2..))]
    ctx: u32,
    /// Windows to take [default: all whole ones]
    #[arg(long, value_name = "W", value_parser = clap::value_parser!(u32).range(1..))]
    windows: Option<u32>,
    /// Passages with the largest divergence to list
    #[arg(long, value_name = "N", default_value_t = 5)]
    worst: usize,
    /// File that keeps the reference's results for further candidates; errors of layers are then not measured
    #[arg(long, value_name = "FILE")]
    reference_cache: Option<PathBuf>,
    /// Write a page with plots, which needs nothing but itself
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &Args) -> Outcome {
    let tokenizer = tokenizer(&args.dir)?;
    let compute = args.compute.compute()?;
    let comparison = match args.text.is_some() || args.ids_file.is_some() {
        true => Some(compare(args, tokenizer.as_ref(), &compute)?),
        false => None,
    };
    let mut scored = Vec::new();
    for file in &args.task {
        let requests = tasks::read_requests(file, args.limit.map_or(usize::MAX, |n| n as usize))?;
        let name = task_name(file);
        let models = [&args.dir, &args.reference];
        for dir in models.into_iter().take(if args.candidate_only { 1 } else { 2 }) {
            let no_tokenizer = || Failure::Usage("--task needs models with a tokenizer".into());
            let tokenizer = self::tokenizer(dir)?.ok_or_else(no_tokenizer)?;
            let bar = output::progress(&name, Unit::Parts);
            let report = tasks::score(dir, &name, &requests, &tokenizer, compute.clone(), &mut |done, total| {
                bar.set_length(total as u64);
                bar.set_position(done as u64);
                Ok(())
            })?;
            bar.finish_and_clear();
            scored.push((dir.display().to_string(), report));
        }
    }
    let evaluation = Evaluation {
        candidate_dir: args.dir.display().to_string(),
        reference_dir: args.reference.display().to_string(),
        comparison,
        tasks: scored,
    };
    if let Some(file) = &args.html {
        let page = evaluate::html(&evaluation, tokenizer.as_ref());
        std::fs::write(file, page).map_err(|e| Error::io(file, &e))?;
    }
    if args.json {
        return output::json(&evaluation);
    }
    if let Some(found) = &evaluation.comparison {
        print(found, tokenizer.as_ref())?;
    }
    evaluation.tasks.iter().try_for_each(|(model, task)| print_task(model, task))
}

fn compare(args: &Args, tokenizer: Option<&Tokenizer>, compute: &Compute) -> Outcome<Comparison> {
    let windows = windows(args, tokenizer)?;
    let bar = output::progress("both models", Unit::Blocks);
    let mut progress = |done: usize, total: usize| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        Ok(())
    };
    let (reference, candidate, layers) = match &args.reference_cache {
        Some(cache) => {
            bar.set_message("reference");
            let reference = Streams::cached(&args.reference, &windows, compute.clone(), cache, &mut progress)?;
            bar.set_message("candidate");
            (reference, Streams::compute(&args.dir, &windows, compute.clone(), &mut progress)?, None)
        }
        None => {
            let (a, b, layers) =
                Streams::compute_pair(&args.reference, &args.dir, &windows, compute.clone(), &mut progress)?;
            (a, b, Some(layers))
        }
    };
    bar.set_message("comparing");
    let mut found = evaluate::compare(&reference, &candidate, &windows, args.worst, &mut progress)?;
    found.layers = layers;
    bar.finish_and_clear();
    Ok(found)
}

fn tokenizer(dir: &Path) -> Outcome<Option<Tokenizer>> {
    let checkpoint = Checkpoint::open(dir)?;
    let config = ModelConfig::from_json(checkpoint.config()).map_err(|e| e.in_file(dir.join("config.json")))?;
    Ok(Tokenizer::from_checkpoint(&checkpoint, config.vocab_size)?)
}

/// `codex_humaneval/gold_bpb_0shot` of `.../codex_humaneval/gold_bpb_0shot/requests.jsonl.gz`, else the file's name.
fn task_name(file: &Path) -> String {
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let own = name(file);
    match (own.starts_with("requests."), file.parent(), file.parent().and_then(Path::parent)) {
        (true, Some(variant), Some(task)) => format!("{}/{}", name(task), name(variant)),
        _ => own,
    }
}

fn windows(args: &Args, tokenizer: Option<&Tokenizer>) -> Outcome<Vec<Vec<u32>>> {
    let limit = args.windows.map_or(usize::MAX, |n| n as usize);
    let flat = match (&args.text, &args.ids_file) {
        (Some(file), _) => {
            let text = std::fs::read_to_string(file).map_err(|e| Error::io(file, &e))?;
            let tokenizer = tokenizer.ok_or_else(|| Failure::Usage("--text needs a model with a tokenizer".into()))?;
            tokenizer.encode(&text, false)?
        }
        (None, Some(file)) => match read_ids(file)? {
            Ids::Windows(mut windows) => {
                windows.truncate(limit);
                return Ok(windows);
            }
            Ids::Flat(ids) | Ids::Named { ids } => ids,
        },
        (None, None) => return Err(Failure::Usage("give --text, --ids-file or --task".into())),
    };
    if flat.len() < 2 {
        return Err(Error::new(ErrorKind::InvalidInput, "fewer than two tokens: nothing to predict").into());
    }
    let length = (args.ctx as usize).min(flat.len());
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
    if let Some(layers) = &found.layers {
        let errors: Vec<String> = layers.iter().map(|layer| format!("{:.3}", layer.relative_error)).collect();
        output::line(&format!("relative error behind each layer: {}", errors.join(" ")))?;
    }
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

fn print_task(model: &str, task: &TaskReport) -> Outcome {
    let mut line = format!(
        "{} of {model}: {} questions, {:.4} bits a byte, every token first choice {:.2} %",
        task.name,
        task.questions,
        task.bits_per_byte,
        100.0 * task.greedy
    );
    for (name, share) in [
        ("accuracy", task.accuracy),
        ("by byte", task.accuracy_per_byte),
        ("unconditional", task.accuracy_unconditional),
    ] {
        if let Some(share) = share {
            line += &format!(", {name} {:.2} %", 100.0 * share);
        }
    }
    output::line(&line)
}
