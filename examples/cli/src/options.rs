//! Arguments that several subcommands share.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use awqua::backend::KvType;
use awqua::{BackendChoice, HeadBits, LoadOptions, Model, Sampling, Session, SessionOptions};
use awqua_quantizer::device::Compute;
use awqua_quantizer::math::Threads;
use clap::{Args, ValueEnum};

use crate::cache;
use crate::output::{self, Failure, Outcome, Unit};

/// Where and how big.
#[derive(Args, Debug, Clone)]
pub struct DeviceArgs {
    /// Backend to run on
    #[arg(long, value_enum, default_value_t = BackendArg::Auto)]
    pub backend: BackendArg,
    /// Use the first adapter whose name contains this
    #[arg(long, value_name = "SUBSTRING")]
    pub device: Option<String>,
    /// CPU threads [default: all cores of the fastest kind, at most 16]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Tokens of context [default: the model's, at most 4096]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub ctx: Option<u32>,
    /// Element type of the KV cache [default: f32 on the CPU, f16 on a GPU]
    #[arg(long, value_enum, value_name = "TYPE")]
    pub kv: Option<KvArg>,
    /// Use only the GPU kernels that run everywhere: no f16 arithmetic, no subgroups
    #[arg(long)]
    pub portable_kernels: bool,
    /// Ignore what `awqua tune` found
    #[arg(long)]
    pub untuned: bool,
    /// Round an output head in half or single precision to so many bits while loading
    #[arg(long, value_enum, default_value_t = HeadBitsArg::B16)]
    pub head_bits: HeadBitsArg,
    /// On the CPU: multiply in f32 instead of rounding activations to 16 bits and the output layer to 8
    #[arg(long)]
    pub exact: bool,
}

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendArg {
    /// A GPU if there is one, else the CPU
    Auto,
    Cpu,
    /// A GPU through wgpu, software ones included
    Wgpu,
    /// An NVIDIA GPU through CUDA; not in every build
    Cuda,
}

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvArg {
    F16,
    F32,
    /// A byte, with a scale for every 32 elements
    Q8,
}

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadBitsArg {
    /// As stored
    #[value(name = "16")]
    B16,
    #[value(name = "8")]
    B8,
    #[value(name = "4")]
    B4,
}

impl DeviceArgs {
    /// How to load a model.
    pub fn load_options(&self) -> LoadOptions {
        LoadOptions {
            backend: match self.backend {
                BackendArg::Auto => BackendChoice::Auto,
                BackendArg::Cpu => BackendChoice::Cpu,
                BackendArg::Wgpu => BackendChoice::Wgpu,
                BackendArg::Cuda => BackendChoice::Cuda,
            },
            device: self.device.clone(),
            portable_kernels: self.portable_kernels,
            tuning: if self.untuned || self.backend == BackendArg::Cpu { None } else { cache::tuning() },
            head_bits: match self.head_bits {
                HeadBitsArg::B16 => HeadBits::Sixteen,
                HeadBitsArg::B8 => HeadBits::Eight,
                HeadBitsArg::B4 => HeadBits::Four,
            },
        }
    }

    /// Loads a model behind a progress bar.
    pub fn open(&self, dir: &Path) -> Outcome<Arc<Model>> {
        let bar = output::progress("loading", Unit::Parts);
        let model = Model::open_with_progress(dir, &self.load_options(), &mut |p| {
            bar.set_length(p.total);
            bar.set_position(p.done);
            ControlFlow::Continue(())
        });
        bar.finish_and_clear();
        Ok(model?)
    }

    /// A session; without `--ctx` its context is at least `needed` tokens.
    pub fn session(&self, model: &Arc<Model>, needed: usize) -> Outcome<Session> {
        Ok(Session::new(model, &self.session_options(model, needed))?)
    }

    /// What [`Self::session`] makes it with.
    pub fn session_options(&self, model: &Model, needed: usize) -> SessionOptions {
        let config = model.config();
        let trained = config.positions().min(4096);
        let needed = u32::try_from(trained.max(needed)).unwrap_or(u32::MAX);
        SessionOptions {
            context: Some(self.ctx.unwrap_or(needed)),
            kv_type: self.kv.map(|kv| match kv {
                KvArg::F16 => KvType::F16,
                KvArg::F32 => KvType::F32,
                KvArg::Q8 => KvType::Q8,
            }),
            threads: Some(self.threads.map_or_else(default_threads, usize::from)),
            exact: self.exact,
            ..SessionOptions::default()
        }
    }
}

/// What quantizing and evaluating compute with.
#[derive(Args, Debug, Clone)]
pub struct ComputeArgs {
    /// Whether a GPU helps the processor
    #[arg(long, value_enum, default_value_t = BackendArg::Auto)]
    pub backend: BackendArg,
    /// Use the first adapter whose name contains this
    #[arg(long, value_name = "SUBSTRING")]
    pub device: Option<String>,
    /// Threads [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
}

impl ComputeArgs {
    /// Threads and the device.
    pub fn compute(&self) -> Outcome<Compute> {
        let threads = self.threads.map_or_else(Threads::available, |n| Threads::new(n.into()));
        Ok(Compute { threads, device: crate::accelerator::open(self.backend, self.device.as_deref())? })
    }
}

/// Says which device helped, or why it stopped to.
pub fn note_device(compute: &Compute) {
    if let Some(device) = &compute.device {
        let products = device.products();
        match device.take_failure() {
            Some(error) => output::note(&format!("went on without `{}`: {error}", products.name())),
            None => output::note(&format!("{} held at most {}", products.name(), output::bytes(products.peak_bytes()))),
        }
    }
}

/// How tokens are chosen. What is not given comes from the model's generation_config.json.
#[derive(Args, Debug, Clone)]
pub struct SamplingArgs {
    /// Temperature; 0 always takes the most likely token
    #[arg(long, value_name = "T")]
    pub temp: Option<f32>,
    /// Keep the K most likely tokens; 0 keeps all
    #[arg(long, value_name = "K")]
    pub top_k: Option<u32>,
    /// Keep the most likely tokens up to this probability
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,
    /// Drop tokens less likely than this times the most likely one
    #[arg(long, value_name = "P")]
    pub min_p: Option<f32>,
    /// Divide the logits of recent tokens by this
    #[arg(long, value_name = "X")]
    pub repeat_penalty: Option<f32>,
    /// Subtract this from the logits of recent tokens
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// Subtract this from the logits of recent tokens for each occurrence
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// Seed of the random numbers (PCG-32)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

impl SamplingArgs {
    /// The model's own sampling with what was given on the command line.
    pub fn sampling(&self, model: &Model) -> Outcome<Sampling> {
        let base = &model.generation().sampling;
        let sampling = Sampling {
            temperature: self.temp.unwrap_or(base.temperature),
            top_k: self.top_k.unwrap_or(base.top_k),
            top_p: self.top_p.unwrap_or(base.top_p),
            min_p: self.min_p.unwrap_or(base.min_p),
            repetition_penalty: self.repeat_penalty.unwrap_or(base.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(base.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(base.frequency_penalty),
            penalty_window: base.penalty_window,
        };
        sampling.validate().map_err(|e| Failure::Usage(e.message().to_owned()))?;
        Ok(sampling)
    }
}

/// Token ids separated by commas.
#[derive(Debug, Clone)]
pub struct Ids(pub Vec<u32>);

impl std::str::FromStr for Ids {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split(',')
            .map(|id| id.trim().parse().map_err(|_| format!("`{}` is not a token id", id.trim())))
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

/// Every core of the fastest kind up to 16: beyond that, decode waits for memory and not for threads.
fn default_threads() -> usize {
    awqua::backend::cpu::performance_cores().min(16)
}
