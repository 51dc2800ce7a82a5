//! `awqua bench`: speed and memory, each repeated.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use awqua::session::TickBudget;
use awqua::{Batch, CancelToken, GenerateOptions, Model, Sampling, Session};
use serde::Serialize;

use crate::options::DeviceArgs;
use crate::output::{self, Outcome, Unit};

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder or GGUF file
    dir: PathBuf,
    /// Prompt tokens of the prefill measurement
    #[arg(short, long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    prompt: u32,
    /// Tokens of the decode measurement
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..))]
    tokens: u32,
    /// Tokens in the cache before those of the decode measurement
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    depth: u32,
    /// Time every operation of a decode step at that depth and of a prefill step instead, and with `--sessions` of a
    /// pass of so many (GPU only)
    #[arg(long)]
    per_op: bool,
    /// Also decode with this many sessions at once, in one batch
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    sessions: Option<u32>,
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
    /// With `--sessions`.
    #[serde(skip_serializing_if = "Option::is_none")]
    batch: Option<BatchReport>,
    /// Opening the folder until the weights are on the device.
    load_s: Option<Spread>,
    /// Opening the folder until the first token after a 5-token prompt.
    ttft_s: Option<Spread>,
    /// Largest resident memory of this process so far; missing where the system does not say.
    peak_rss_bytes: Option<Spread>,
    weight_bytes: u64,
    session_bytes: u64,
}

/// Several sessions at once.
#[derive(Serialize)]
struct BatchReport {
    sessions: u32,
    /// Whether they share passes over the weights.
    shared: bool,
    /// Tokens of all of them.
    decode_tok_s: Option<Spread>,
    /// Median over that of one session.
    speedup: Option<f64>,
    passes: u64,
    /// Held besides the sessions.
    bytes: u64,
}

pub fn run(args: &Args) -> Outcome {
    if args.per_op {
        return per_op(args);
    }
    let bar = output::progress("measuring", Unit::Parts);
    bar.set_length(u64::from(args.repeat + 1) * if args.sessions.is_some() { 3 } else { 2 });
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
        let mut session = args.device.session(&model, args.context())?;
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
        let start: Vec<u32> = (0..args.depth).map(|i| (i * 31 + round * 17 + 1) % vocab).collect();
        let generation = session.generate(&start, &options(args.tokens), quiet)?;
        if round > 0 {
            prefill.push(f64::from(args.prompt) / seconds);
            decode.extend(generation.decode_tokens_per_second());
        }
        bar.inc(1);
    }
    let decode = Spread::of(decode);
    let batch = match args.sessions {
        Some(n) => {
            let one = decode.as_ref().map(|spread| spread.median);
            Some(together(args, &model, n, one, &options(args.tokens), &mut || bar.inc(1))?)
        }
        None => None,
    };
    bar.finish_and_clear();

    let info = model.backend_info();
    let report = Report {
        backend: info.backend,
        device: info.device,
        variant: info.variant,
        prompt_tokens: args.prompt,
        decode_tokens: args.tokens,
        prefill_tok_s: Spread::of(prefill),
        decode_tok_s: decode,
        batch,
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
    if let Some(batch) = &report.batch {
        row(&format!("{} sessions tokens/s", batch.sessions), &batch.decode_tok_s, 1.0)?;
        output::line(&format!(
            "{:<24} {:>10.2}  ({} passes{}, {} besides the sessions)",
            "over one session",
            batch.speedup.unwrap_or_default(),
            batch.passes,
            if batch.shared { "" } else { ", not shared" },
            output::bytes(batch.bytes)
        ))?;
    }
    row("load s", &report.load_s, 1.0)?;
    row("first token s", &report.ttft_s, 1.0)?;
    row("peak resident MB", &report.peak_rss_bytes, 1e6)?;
    output::line(&format!(
        "weights {}, session {}",
        output::bytes(report.weight_bytes),
        output::bytes(report.session_bytes)
    ))
}

/// Decodes with `n` sessions in one batch, against `one` token/s of one session.
fn together(
    args: &Args,
    model: &Arc<Model>,
    n: u32,
    one: Option<f64>,
    options: &GenerateOptions,
    done: &mut dyn FnMut(),
) -> Outcome<BatchReport> {
    let made_with = args.device.session_options(model, args.depth as usize + args.tokens as usize);
    let mut sessions = (0..n).map(|_| Session::new(model, &made_with)).collect::<Result<Vec<_>, _>>()?;
    let mut batch = Batch::new(model, n as usize, &made_with)?;
    let vocab = model.config().vocab_size as u32;
    let (mut rates, mut ticks) = (Vec::new(), Vec::new());
    for round in 0..=args.repeat {
        for (s, session) in (0..).zip(&mut sessions) {
            let prompt: Vec<u32> = (0..args.depth).map(|i| (i * 31 + round * 17 + s * 101 + 1) % vocab).collect();
            session.reset();
            session.set_prompt(&prompt, &CancelToken::default())?;
            session.logits()?;
            session.begin(&prompt, options.clone())?;
        }
        let start = Instant::now();
        loop {
            batch.tick(&mut sessions, &TickBudget::UNLIMITED, &mut ticks)?;
            for tick in ticks.drain(..) {
                tick?;
            }
            if !sessions.iter().any(Session::is_busy) {
                break;
            }
            batch.wait(&mut sessions)?;
        }
        if round > 0 {
            rates.push(f64::from(n * args.tokens) / start.elapsed().as_secs_f64());
        }
        done();
    }
    let decode_tok_s = Spread::of(rates);
    let speedup = decode_tok_s.as_ref().zip(one).map(|(all, one)| all.median / one);
    let (shared, passes, bytes) = (batch.shares_passes(), batch.passes(), batch.bytes());
    Ok(BatchReport { sessions: n, shared, decode_tok_s, speedup, passes, bytes })
}

impl Args {
    /// Positions that the measurements need.
    fn context(&self) -> usize {
        (self.prompt as usize).max(self.depth as usize + self.tokens as usize)
    }
}

/// An operation of a step, all its launches together.
#[derive(Serialize)]
struct OpRow {
    name: String,
    launches: usize,
    /// Device time of all launches, gaps included.
    seconds: f64,
    bytes: u64,
    flops: u64,
    /// Share of the step's time.
    share: f64,
}

#[derive(Serialize)]
struct OpReport {
    device: String,
    variant: String,
    decode: Vec<OpRow>,
    prefill: Vec<OpRow>,
    /// With `--sessions`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pass: Option<Vec<OpRow>>,
}

fn per_op(args: &Args) -> Outcome {
    let model = args.device.open(&args.dir)?;
    let mut session = args.device.session(&model, args.context())?;
    let vocab = model.config().vocab_size as u32;
    let ids = |n: u32| (0..n).map(|i| (i * 31 + 1) % vocab).collect::<Vec<_>>();
    let step = args.prompt.min(session.chunk());
    let mut measure = |before: u32, step: u32| -> Outcome<Vec<OpRow>> {
        session.reset();
        if before > 0 {
            session.set_prompt(&ids(before), &CancelToken::default())?;
        }
        let rounds = (0..=args.repeat).map(|_| session.profile(&ids(step))).collect::<Result<Vec<_>, _>>()?;
        Ok(rows(&rounds[1..]))
    };
    let decode = measure(args.depth, 1)?;
    let prefill = measure(0, step)?;
    let pass = args.sessions.map(|n| per_op_of_pass(args, &model, n)).transpose()?;
    let info = model.backend_info();
    let report = OpReport { device: info.device, variant: info.variant, decode, prefill, pass };
    if args.json {
        return output::json(&report);
    }
    output::line(&format!("{} [{}]", report.device, report.variant))?;
    let pass = report.pass.as_ref().map(|rows| ("pass", rows));
    for (title, rows) in [("decode", &report.decode), ("prefill", &report.prefill)].into_iter().chain(pass) {
        let total: f64 = rows.iter().map(|row| row.seconds).sum();
        output::line(&format!("\n{title}: {:.1} us", total * 1e6))?;
        let head = ["us", "share", "launches", "us each", "GB/s", "TFLOP/s"];
        let [us, share, launches, each, gbs, tflops] = head;
        output::line(&format!(
            "{:<44} {us:>9} {share:>6} {launches:>8} {each:>8} {gbs:>7} {tflops:>8}",
            "operation and workgroups"
        ))?;
        for row in rows {
            output::line(&format!(
                "{:<44} {:>9.1} {:>5.1}% {:>8} {:>8.2} {:>7.0} {:>8.2}",
                row.name,
                row.seconds * 1e6,
                row.share * 100.0,
                row.launches,
                row.seconds * 1e6 / row.launches as f64,
                row.bytes as f64 / row.seconds / 1e9,
                row.flops as f64 / row.seconds / 1e12,
            ))?;
        }
    }
    Ok(())
}

/// The same for a pass of `n` sessions.
fn per_op_of_pass(args: &Args, model: &Arc<Model>, n: u32) -> Outcome<Vec<OpRow>> {
    let made_with = args.device.session_options(model, args.depth as usize + 1);
    let mut sessions = (0..n).map(|_| Session::new(model, &made_with)).collect::<Result<Vec<_>, _>>()?;
    let vocab = model.config().vocab_size as u32;
    for (s, session) in (0..).zip(&mut sessions) {
        let prompt: Vec<u32> = (0..args.depth).map(|i| (i * 31 + s * 101 + 1) % vocab).collect();
        session.set_prompt(&prompt, &CancelToken::default())?;
        session.logits()?;
    }
    let mut batch = Batch::new(model, n as usize, &made_with)?;
    let rounds = (0..=args.repeat).map(|_| batch.profile(&mut sessions, 1)).collect::<Result<Vec<_>, _>>()?;
    Ok(rows(&rounds[1..]))
}

/// Operations of the same name added up, medians over the rounds, the longest first.
fn rows(rounds: &[Vec<awqua::backend::OpTime>]) -> Vec<OpRow> {
    let mut rows: Vec<OpRow> = Vec::new();
    let Some(first) = rounds.first() else { return rows };
    for (i, op) in first.iter().enumerate() {
        let seconds = Spread::of(rounds.iter().map(|round| round[i].seconds).collect()).map_or(0.0, |s| s.median);
        let at = rows.iter().position(|row| row.name == op.name).unwrap_or_else(|| {
            let name = op.name.clone();
            rows.push(OpRow { name, launches: 0, seconds: 0.0, bytes: 0, flops: 0, share: 0.0 });
            rows.len() - 1
        });
        let row = &mut rows[at];
        row.launches += 1;
        row.seconds += seconds;
        row.bytes += op.bytes;
        row.flops += op.flops;
    }
    let total: f64 = rows.iter().map(|row| row.seconds).sum();
    rows.iter_mut().for_each(|row| row.share = row.seconds / total.max(f64::MIN_POSITIVE));
    rows.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    rows
}

/// Largest resident memory of this process, where the system says it.
fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
