//! A renderer that shares its `wgpu` device with Awqua, as a game in Rust does: `awqua-frames MODEL_FOLDER [options]`
//!
//! Sixty times a second a frame of a given weight is drawn, offscreen, and Awqua is ticked once behind it on the same
//! queue. Printed is how long frames take from their submission until the GPU has finished them, first alone, then
//! beside an answer, beside long prompts, and beside both without a budget of the GPU. `awqua synth` makes models of real
//! sizes, whose random weights cost what others do.
//!
//! | option | default | |
//! |---|---|---|
//! | `--frames N` | 600 | frames of each measurement |
//! | `--render-ms T` | 8 | GPU time of a frame, calibrated at the start |
//! | `--gpu-us N` | 4000 | GPU budget of a tick |
//! | `--cpu-us N` | 2000 | CPU budget of a tick |
//! | `--prompt N` | 2000 | tokens of the long prompt |
//! | `--gpu NAME` | the preferred one | part of the adapter's name |
#![allow(clippy::print_stdout, reason = "a program")]

mod renderer;

use std::error::Error;
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
    render: Duration,
    budget: TickBudget,
    prompt: usize,
    gpu: String,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Outcome<Self> {
        let mut options = Self {
            model: String::new(),
            frames: 600,
            render: Duration::from_millis(8),
            budget: TickBudget { host: Some(Duration::from_millis(2)), device: Some(Duration::from_millis(4)) },
            prompt: 2000,
            gpu: String::new(),
        };
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("`{argument}` needs a value"));
            match argument.as_str() {
                "--frames" => options.frames = value()?.parse::<usize>()?.max(1),
                "--render-ms" => options.render = Duration::try_from_secs_f64(value()?.parse::<f64>()? / 1e3)?,
                "--gpu-us" => options.budget.device = Some(Duration::from_micros(value()?.parse()?)),
                "--cpu-us" => options.budget.host = Some(Duration::from_micros(value()?.parse()?)),
                "--prompt" => options.prompt = value()?.parse::<usize>()?.max(1),
                "--gpu" => options.gpu = value()?.to_lowercase(),
                option if option.starts_with("--") => return Err(format!("unknown option `{option}`").into()),
                model => options.model = model.to_owned(),
            }
        }
        match options.model.is_empty() {
            true => Err("usage: awqua-frames MODEL_FOLDER [--frames N] [--render-ms T] [--gpu-us N] [--cpu-us N] \
                         [--prompt N] [--gpu NAME]"
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

/// Frame times, sorted, and what was computed meanwhile.
struct Measured {
    milliseconds: Vec<f64>,
    /// Longest time of a tick on the calling thread, in milliseconds.
    longest_tick: f64,
    tokens: usize,
    seconds: f64,
}

impl Measured {
    fn percentile(&self, p: f64) -> f64 {
        let last = self.milliseconds.len() - 1;
        self.milliseconds[(last as f64 * p).round() as usize]
    }

    fn print(&self, name: &str) {
        let over = self.milliseconds.iter().filter(|&&ms| ms > FRAME.as_secs_f64() * 1e3).count();
        println!(
            "{name:<26} {:>8.2} {:>8.2} {:>8.2} {:>7.1}% {:>9.2} {:>9.1}",
            self.percentile(0.5),
            self.percentile(0.99),
            self.percentile(1.0),
            100.0 * over as f64 / self.milliseconds.len() as f64,
            self.longest_tick,
            self.tokens as f64 / self.seconds,
        );
    }
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
        "{:<26} {:>8} {:>8} {:>8} {:>8} {:>9} {:>9}",
        "frame ms", "median", "p99", "max", ">16.7", "tick max", "tokens/s"
    );
    // As much as the calling thread can queue in its time.
    let unlimited = TickBudget { device: None, ..options.budget };
    for (name, beside) in [
        ("alone", Beside::Nothing),
        ("decode, budget", Beside::Decode(options.budget)),
        ("prefill, budget", Beside::Prefill(options.budget)),
        ("decode, no budget", Beside::Decode(unlimited)),
        ("prefill, no budget", Beside::Prefill(unlimited)),
    ] {
        measure(&renderer, &mut session, beside, options.frames, prompt)?.print(name);
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

/// Draws `frames` frames with `beside` behind each.
fn measure(
    renderer: &Renderer,
    session: &mut Session,
    beside: Beside,
    frames: usize,
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
    // The queue is shared, so what an earlier measurement left there is done with these.
    for _ in 0..3 {
        renderer.wait(renderer.draw())?;
    }
    let mut measured =
        Measured { milliseconds: Vec::with_capacity(frames), longest_tick: 0.0, tokens: 0, seconds: 0.0 };
    let start = Instant::now();
    let mut next = start;
    for _ in 0..frames {
        let submitted = Instant::now();
        let frame = renderer.draw();
        // Behind the frame, so that it does not wait for us; what we queue has to be done before the next one comes.
        if let Beside::Decode(budget) | Beside::Prefill(budget) = beside {
            if !session.is_busy() {
                session.reset();
                begin(session, &model, beside, prompt)?;
            }
            let before = session.tokens().len();
            let tick = session.tick(&budget)?;
            while session.poll(&mut [0; 256]).is_some() {}
            measured.tokens += match beside {
                Beside::Prefill(_) => session.tokens().len().saturating_sub(before),
                _ => tick.new_tokens,
            };
            measured.longest_tick = measured.longest_tick.max(tick.host_time.as_secs_f64() * 1e3);
        }
        renderer.wait(frame)?;
        measured.milliseconds.push(submitted.elapsed().as_secs_f64() * 1e3);
        // A frame that came late does not make the next ones early.
        next = (next + FRAME).max(Instant::now());
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    measured.seconds = start.elapsed().as_secs_f64();
    measured.milliseconds.sort_by(f64::total_cmp);
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
