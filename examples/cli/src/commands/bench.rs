//! `awqua bench`: speed and memory, each repeated.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use awqua::{CancelToken, GenerateOptions, Sampling};
use serde::Serialize;

use crate::options::DeviceArgs;
use crate::output::{self, Outcome, Unit};

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder
    dir: PathBuf,
    /// Prompt tokens of the prefill measurement
    #[arg(short, long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    prompt: u32,
    /// Tokens of the decode measurement
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..))]
    tokens: u32,
    /// Repetitions; one more is done first and not counted
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Median, smallest and largest of the repetitions.
#[derive(Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Some(Self { median, min, max })
    }
}

#[derive(Serialize)]
struct Report {
    backend: &'static str,
    device: String,
    variant: String,
    prompt_tokens: u32,
    decode_tokens: u32,
    prefill_tok_s: Option<Spread>,
    decode_tok_s: Option<Spread>,
    /// Opening the folder until the weights are on the device.
    load_s: Option<Spread>,
    /// Opening the folder until the first token after a 5-token prompt.
    ttft_s: Option<Spread>,
    /// Largest resident memory of this process so far; missing where the system does not say.
    peak_rss_bytes: Option<Spread>,
    weight_bytes: u64,
    session_bytes: u64,
}

pub fn run(args: &Args) -> Outcome {
    let bar = output::progress("measuring", Unit::Parts);
    bar.set_length(u64::from(args.repeat + 1) * 2);
    let options = |max_tokens: u32| GenerateOptions {
        max_tokens: max_tokens as usize,
        sampling: Sampling::greedy(),
        ignore_eos: true,
        ..Default::default()
    };
    let quiet = &mut |_: &str| ControlFlow::Continue(());

    let (mut load, mut ttft, mut rss) = (Vec::new(), Vec::new(), Vec::new());
    let mut last = None;
    for round in 0..=args.repeat {
        drop(last.take());
        let start = Instant::now();
        let model = awqua::Model::open(&args.dir, &args.device.load_options())?;
        let loaded = start.elapsed().as_secs_f64();
        let mut session = args.device.session(&model, (args.prompt + args.tokens) as usize)?;
        let vocab = model.config().vocab_size as u32;
        let prompt: Vec<u32> = (0..5).map(|i| (i * 7 + 3) % vocab).collect();
        session.generate(&prompt, &options(1), quiet)?;
        if round > 0 {
            load.push(loaded);
            ttft.push(start.elapsed().as_secs_f64());
            rss.extend(peak_rss().map(|bytes| bytes as f64));
        }
        last = Some((model, session));
        bar.inc(1);
    }
    let Some((model, mut session)) = last else { return Ok(()) };

    let vocab = model.config().vocab_size as u32;
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for round in 0..=args.repeat {
        // Other ids every round, so that nothing is reused.
        let prompt: Vec<u32> = (0..args.prompt).map(|i| (i * 31 + round * 17 + 1) % vocab).collect();
        session.reset();
        let start = Instant::now();
        session.set_prompt(&prompt, &CancelToken::default())?;
        // Prefill may still be running on a GPU; its logits are not.
        session.logits()?;
        let seconds = start.elapsed().as_secs_f64();
        session.reset();
        let generation = session.generate(&prompt[..prompt.len().min(5)], &options(args.tokens), quiet)?;
        if round > 0 {
            prefill.push(f64::from(args.prompt) / seconds);
            decode.extend(generation.decode_tokens_per_second());
        }
        bar.inc(1);
    }
    bar.finish_and_clear();

    let info = model.backend_info();
    let report = Report {
        backend: info.backend,
        device: info.device,
        variant: info.variant,
        prompt_tokens: args.prompt,
        decode_tokens: args.tokens,
        prefill_tok_s: Spread::of(prefill),
        decode_tok_s: Spread::of(decode),
        load_s: Spread::of(load),
        ttft_s: Spread::of(ttft),
        peak_rss_bytes: Spread::of(rss),
        weight_bytes: info.weight_bytes,
        session_bytes: session.bytes(),
    };
    if args.json {
        return output::json(&report);
    }
    output::line(&format!("{} {} [{}]", report.backend, report.device, report.variant))?;
    let row = |name: &str, spread: &Option<Spread>, scale: f64| match spread {
        Some(s) => output::line(&format!(
            "{name:<24} {:>10.2}  ({:.2} to {:.2})",
            s.median / scale,
            s.min / scale,
            s.max / scale
        )),
        None => output::line(&format!("{name:<24} {:>10}", "-")),
    };
    row(&format!("prefill {} tokens/s", args.prompt), &report.prefill_tok_s, 1.0)?;
    row(&format!("decode {} tokens/s", args.tokens), &report.decode_tok_s, 1.0)?;
    row("load s", &report.load_s, 1.0)?;
    row("first token s", &report.ttft_s, 1.0)?;
    row("peak resident MB", &report.peak_rss_bytes, 1e6)?;
    output::line(&format!(
        "weights {}, session {}",
        output::bytes(report.weight_bytes),
        output::bytes(report.session_bytes)
    ))
}

/// Largest resident memory of this process, where the system says it.
fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
