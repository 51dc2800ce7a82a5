//! A renderer that shares its `wgpu` device with Awqua, as a game in Rust does: `awqua-frames MODEL_FOLDER [options]`
//!
//! Sixty times a second a frame of a given weight is drawn, offscreen, and Awqua is ticked once behind it on the same
//! queue. Printed is how long frames take from their submission until the GPU has finished them: alone, beside an answer,
//! beside long prompts, beside both without a budget of the GPU, and alone again. `awqua synth` makes models of real
//! sizes, whose random weights cost what others do.
//!
//! The first frames of every measurement are left out: a GPU that was busy with something else, or idle, takes some to
//! come to the clock that this load keeps it at. `drawing` is what the GPU's own clock says of a frame's passes, where it
//! can: a late frame whose passes were quick waited for somebody, one whose passes were slow shared the GPU.
//!
//! | option | default | |
//! |---|---|---|
//! | `--frames N` | 600 | frames of each measurement |
//! | `--warm-up N` | 60 | frames in front of them that are not counted |
//! | `--seconds T` | 20 | most time of one measurement: without a budget a frame can take a second |
//! | `--render-ms T` | 8 | GPU time of a frame, calibrated at the start |
//! | `--gpu-us N` | 4000 | GPU budget of a tick |
//! | `--cpu-us N` | 2000 | CPU budget of a tick |
//! | `--prompt N` | 2000 | tokens of the long prompt |
//! | `--gpu NAME` | the preferred one | part of the adapter's name |
//! | `--csv FILE` | | where the times of each frame go, those of the warm-up included |
#![allow(clippy::print_stdout, reason = "a program")]

mod renderer;

use std::error::Error;
use std::io::{BufWriter, Write};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use awqua::backend::wgpu::SharedGpu;
use awqua::session::{Phase, TickBudget};
use awqua::{
    BackendChoice, DeviceChoice, Engine, EngineOptions, GenerateOptions, Load, Model, Session, SessionOptions,
};
use renderer::Renderer;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Time of a frame at 60 Hz.
const FRAME: Duration = Duration::from_nanos(16_666_667);

struct Options {
    model: String,
    frames: usize,
    warm_up: usize,
    limit: Duration,
    render: Duration,
    budget: TickBudget,
    prompt: usize,
    gpu: String,
    csv: Option<String>,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Outcome<Self> {
        let mut options = Self {
            model: String::new(),
            frames: 600,
            warm_up: 60,
            limit: Duration::from_secs(20),
            render: Duration::from_millis(8),
            budget: TickBudget { host: Some(Duration::from_millis(2)), device: Some(Duration::from_millis(4)) },
            prompt: 2000,
            gpu: String::new(),
            csv: None,
        };
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("`{argument}` needs a value"));
            match argument.as_str() {
                "--frames" => options.frames = value()?.parse::<usize>()?.max(1),
                "--warm-up" => options.warm_up = value()?.parse()?,
                "--seconds" => options.limit = Duration::try_from_secs_f64(value()?.parse()?)?,
                "--render-ms" => options.render = Duration::try_from_secs_f64(value()?.parse::<f64>()? / 1e3)?,
                "--gpu-us" => options.budget.device = Some(Duration::from_micros(value()?.parse()?)),
                "--cpu-us" => options.budget.host = Some(Duration::from_micros(value()?.parse()?)),
                "--prompt" => options.prompt = value()?.parse::<usize>()?.max(1),
                "--gpu" => options.gpu = value()?.to_lowercase(),
                "--csv" => options.csv = Some(value()?),
                option if option.starts_with("--") => return Err(format!("unknown option `{option}`").into()),
                model => options.model = model.to_owned(),
            }
        }
        match options.model.is_empty() {
            true => Err("usage: awqua-frames MODEL_FOLDER [--frames N] [--warm-up N] [--seconds T] [--render-ms T] \
                         [--gpu-us N] [--cpu-us N] [--prompt N] [--gpu NAME] [--csv FILE]"
                .into()),
            false => Ok(options),
        }
    }
}

/// What Awqua does beside the frames.
#[derive(Clone, Copy)]
enum Beside {
    Nothing,
    /// It makes tokens.
    Decode(TickBudget),
    /// It computes long prompts, one after the other.
    Prefill(TickBudget),
}

/// What one frame took, in milliseconds.
#[derive(Clone, Copy)]
struct Frame {
    /// From its submission until the GPU had finished it.
    whole: f64,
    /// Its passes, by the GPU's clock.
    drawing: Option<f64>,
    /// The tick behind it on the calling thread.
    tick: f64,
}

/// Frames, and what was computed beside those that count.
struct Measured {
    warm_up: Vec<Frame>,
    frames: Vec<Frame>,
    tokens: usize,
    seconds: f64,
}

impl Measured {
    /// One of the times of all frames that count, sorted.
    fn sorted(&self, time: impl Fn(&Frame) -> Option<f64>) -> Vec<f64> {
        let mut times: Vec<f64> = self.frames.iter().filter_map(time).collect();
        times.sort_by(f64::total_cmp);
        times
    }

    fn print(&self, name: &str) {
        let whole = self.sorted(|frame| Some(frame.whole));
        let drawing = self.sorted(|frame| frame.drawing);
        let tick = self.sorted(|frame| Some(frame.tick));
        let over = whole.iter().filter(|&&ms| ms > milliseconds(FRAME)).count();
        println!(
            "{name:<20} {:>6} {} {} {} {:>7.2}% {} {} {} {:>8.1}",
            whole.len(),
            percentile(&whole, 0.5),
            percentile(&whole, 0.99),
            percentile(&whole, 1.0),
            100.0 * over as f64 / whole.len() as f64,
            percentile(&drawing, 0.5),
            percentile(&drawing, 0.99),
            percentile(&tick, 1.0),
            self.tokens as f64 / self.seconds,
        );
    }

    /// A line for each frame; those of the warm-up have numbers below 0.
    fn write(&self, name: &str, to: &mut impl Write) -> std::io::Result<()> {
        let first = -(self.warm_up.len() as i64);
        for (number, frame) in (first..).zip(self.warm_up.iter().chain(&self.frames)) {
            let drawing = frame.drawing.map_or(String::new(), |ms| format!("{ms:.3}"));
            writeln!(to, "{},{number},{:.3},{drawing},{:.3}", name.replace(',', ""), frame.whole, frame.tick)?;
        }
        Ok(())
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The percentile `p` of sorted times for a column, or a dash.
fn percentile(sorted: &[f64], p: f64) -> String {
    let Some(last) = sorted.len().checked_sub(1) else { return format!("{:>8}", "-") };
    format!("{:>8.2}", sorted[(last as f64 * p).round() as usize])
}

fn main() -> Outcome<()> {
    let options = Options::parse(std::env::args().skip(1))?;
    let gpu = open(&options.gpu)?;
    let renderer = Renderer::new(&gpu, options.render)?;
    println!("{}: {}", gpu.adapter.get_info().name, renderer.describe());

    let engine = Engine::new(EngineOptions {
        backend: BackendChoice::Wgpu,
        device: DeviceChoice::Shared(gpu),
        ..EngineOptions::default()
    });
    let start = Instant::now();
    let model = Load::path(&engine, &options.model).run(&mut |_| ControlFlow::Continue(()))?;
    let info = model.backend_info();
    println!(
        "model loaded in {:.1} s, {} MB, {}",
        start.elapsed().as_secs_f64(),
        info.weight_bytes >> 20,
        info.variant
    );
    let context = model.config().positions().min(4096) as u32;
    let mut session = Session::new(&model, &SessionOptions { context: Some(context), ..SessionOptions::default() })?;
    let prompt = options.prompt.min(context as usize - 2);

    println!(
        "{:<20} {:>6} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "ms", "frames", "median", "p99", "max", ">16.7", "drawing", "its p99", "tick max", "tokens/s"
    );
    let mut csv = options.csv.as_ref().map(std::fs::File::create).transpose()?.map(BufWriter::new);
    if let Some(csv) = &mut csv {
        writeln!(csv, "beside,frame,whole_ms,drawing_ms,tick_ms")?;
    }
    // As much as the calling thread can queue in its time.
    let unlimited = TickBudget { device: None, ..options.budget };
    for (name, beside) in [
        ("alone", Beside::Nothing),
        ("decode, budget", Beside::Decode(options.budget)),
        ("prefill, budget", Beside::Prefill(options.budget)),
        ("decode, no budget", Beside::Decode(unlimited)),
        ("prefill, no budget", Beside::Prefill(unlimited)),
        ("alone again", Beside::Nothing),
    ] {
        let measured = measure(&renderer, &mut session, beside, &options, prompt)?;
        measured.print(name);
        if let Some(csv) = &mut csv {
            measured.write(name, csv)?;
        }
    }
    if let Some(csv) = &mut csv {
        csv.flush()?;
    }
    Ok(())
}

/// The device of the renderer, made with what makes Awqua's kernels fast as well.
fn open(name: &str) -> Outcome<SharedGpu> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::PRIMARY;
    let instance = wgpu::Instance::new(descriptor);
    let mut adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::PRIMARY));
    adapters.retain(|adapter| adapter.get_info().name.to_lowercase().contains(name));
    adapters.sort_by_key(|adapter| match adapter.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::Cpu => 2,
        _ => 1,
    });
    let adapter = adapters.into_iter().next().ok_or("no GPU adapter found")?;
    let features = awqua::backend::wgpu::features_for_sharing(&adapter);
    let experimental = wgpu::Features::all_experimental_mask();
    let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
        label: Some("game"),
        // A game that avoids experimental features leaves the matrix units out.
        required_features: features.difference(experimental),
        required_limits: adapter.limits(),
        ..wgpu::DeviceDescriptor::default()
    }))?;
    Ok(SharedGpu { adapter, device, queue })
}

/// Draws frames with `beside` behind each.
fn measure(
    renderer: &Renderer,
    session: &mut Session,
    beside: Beside,
    options: &Options,
    prompt: usize,
) -> Outcome<Measured> {
    let model = session.model().clone();
    session.cancel()?;
    session.reset();
    if let Beside::Decode(_) = beside {
        begin(session, &model, beside, prompt)?;
        // Up to the first token, which is not what is measured.
        while session.phase() == Phase::Prefill {
            if session.tick(&TickBudget::UNLIMITED)?.is_waiting {
                session.wait()?;
            }
        }
    }
    let mut measured = Measured {
        warm_up: Vec::with_capacity(options.warm_up),
        frames: Vec::with_capacity(options.frames),
        tokens: 0,
        seconds: 0.0,
    };
    let begun = Instant::now();
    let (mut start, mut next) = (begun, begun);
    let mut counts = false;
    while measured.frames.len() < options.frames && (measured.frames.is_empty() || begun.elapsed() < options.limit) {
        // Frames so slow that they reach the limit are not left out all.
        if !counts && (measured.warm_up.len() == options.warm_up || begun.elapsed() > options.limit / 4) {
            (counts, start) = (true, Instant::now());
        }
        let submitted = Instant::now();
        let frame = renderer.draw();
        let mut on_host = Duration::ZERO;
        // Behind the frame, so that it does not wait for us; what we queue has to be done before the next one comes.
        if let Beside::Decode(budget) | Beside::Prefill(budget) = beside {
            if !session.is_busy() {
                session.reset();
                begin(session, &model, beside, prompt)?;
            }
            let before = session.tokens().len();
            let tick = session.tick(&budget)?;
            while session.poll(&mut [0; 256]).is_some() {}
            let tokens = match beside {
                Beside::Prefill(_) => session.tokens().len().saturating_sub(before),
                _ => tick.new_tokens,
            };
            measured.tokens += if counts { tokens } else { 0 };
            on_host = tick.host_time;
        }
        let drawing = renderer.wait(frame)?;
        let frame = Frame {
            whole: milliseconds(submitted.elapsed()),
            drawing: drawing.map(milliseconds),
            tick: milliseconds(on_host),
        };
        if counts { &mut measured.frames } else { &mut measured.warm_up }.push(frame);
        // A frame that came late does not make the next ones early.
        next = (next + FRAME).max(Instant::now());
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    measured.seconds = start.elapsed().as_secs_f64();
    Ok(measured)
}

fn begin(session: &mut Session, model: &Arc<Model>, beside: Beside, prompt: usize) -> awqua::Result<()> {
    let vocab = model.config().vocab_size as u32;
    let (length, max_tokens) = match beside {
        Beside::Prefill(_) => (prompt, 1),
        _ => (16, session.context() as usize - 16),
    };
    // Any ids will do: their number is what costs.
    let ids: Vec<u32> = (0..length as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) % vocab).collect();
    session.begin(&ids, GenerateOptions { max_tokens, ignore_eos: true, ..GenerateOptions::default() })
}
