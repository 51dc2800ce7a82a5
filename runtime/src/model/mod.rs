//! What is computed: a checkpoint's configuration turned into a program over uploaded weights.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use crate::backend::{self, Backend, BackendInfo, Program};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::session::chat::ChatTemplate;
use crate::session::tokenizer::Tokenizer;

mod arch;
mod config;
mod generation;
mod program;
mod rope;
mod weights;

pub use config::ModelConfig;
pub use generation::GenerationConfig;
pub use rope::{Rope, RopeScaling};

/// Which backend loads a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BackendChoice {
    /// A GPU if there is a usable one, else the CPU. A software GPU is not chosen on its own.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU through wgpu, software ones included; an error if there is none.
    Wgpu,
}

/// How to load a model.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Which backend.
    pub backend: BackendChoice,
    /// Part of the adapter's name, in any letter case; the first adapter that has it is used.
    pub device: Option<String>,
    /// Never use f16 arithmetic or subgroup operations on the GPU, whatever the adapter offers.
    pub portable_kernels: bool,
}

/// How far loading is; `done / total` is the share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Parts loaded.
    pub done: u64,
    /// Parts of the model.
    pub total: u64,
}

/// A loaded model: weights on a device, program, tokenizer. Sessions share it.
pub struct Model {
    config: ModelConfig,
    generation: GenerationConfig,
    backend: Arc<dyn Backend>,
    program: Arc<Program>,
    tokenizer: Option<Tokenizer>,
    chat_template: Option<ChatTemplate>,
    folder: std::path::PathBuf,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("folder", &self.folder).field("config", &self.config).finish_non_exhaustive()
    }
}

impl Model {
    /// Opens a Hugging Face style folder and uploads its weights.
    ///
    /// # Errors
    /// Every way a folder can be wrong, unsupported or too large has its [`ErrorKind`]; the message names the file,
    /// the tensor, what was expected and what was found.
    pub fn open(dir: impl AsRef<Path>, options: &LoadOptions) -> Result<Arc<Self>> {
        Self::open_with_progress(dir, options, &mut |_| ControlFlow::Continue(()))
    }

    /// As [`Self::open`]; `progress` is called after each part and can stop loading with `Break`.
    ///
    /// # Errors
    /// As [`Self::open`], and [`ErrorKind::Cancelled`].
    pub fn open_with_progress(
        dir: impl AsRef<Path>,
        options: &LoadOptions,
        progress: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<Arc<Self>> {
        let dir = dir.as_ref();
        let checkpoint = Checkpoint::open(dir)?;
        let in_config = |e: Error| e.in_file(dir.join("config.json"));
        let config = ModelConfig::from_json(checkpoint.config()).map_err(in_config)?;
        let generation = GenerationConfig::from_json(
            checkpoint.json("generation_config.json")?.as_ref(),
            checkpoint.config(),
            config.vocab_size,
        )
        .map_err(|e| e.in_file(dir.join("generation_config.json")))?;
        let tokenizer = Tokenizer::from_checkpoint(&checkpoint, config.vocab_size)?;
        let chat_template = ChatTemplate::from_checkpoint(&checkpoint)?;

        let mut backend = open_backend(options)?;
        let (plan, weights) = weights::plan(&checkpoint, &config)?;
        let total = plan.bytes(&*backend);
        let (mut upload, mut done) = (weights::Upload::default(), 0);
        let mut report = |done: u64| match progress(LoadProgress { done: done.min(total), total }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::new(ErrorKind::Cancelled, "loading was cancelled")),
        };
        report(0)?;
        while !upload.is_complete(&plan) {
            done += upload.advance(&plan, &checkpoint, &mut *backend, 4 << 20)?;
            while !backend.upload_is_settled()? {
                backend.wait()?;
            }
            report(done)?;
        }
        report(total)?;
        let program = Arc::new(program::build(&config, &weights));
        Ok(Arc::new(Self {
            config,
            generation,
            backend: backend.into(),
            program,
            tokenizer,
            chat_template,
            folder: dir.to_path_buf(),
        }))
    }

    /// Hyper-parameters.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// End-of-turn ids and recommended sampling.
    pub fn generation(&self) -> &GenerationConfig {
        &self.generation
    }

    /// Device, kernel variant and weight memory.
    pub fn backend_info(&self) -> BackendInfo {
        self.backend.info()
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`] if the folder has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer
            .as_ref()
            .ok_or_else(|| Error::new(ErrorKind::Tokenizer, "the folder has no tokenizer.json").in_file(&self.folder))
    }

    /// The chat template, if the model has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    pub(crate) fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    pub(crate) fn program(&self) -> &Arc<Program> {
        &self.program
    }
}

#[cfg(feature = "wgpu")]
fn open_backend(options: &LoadOptions) -> Result<Box<dyn Backend>> {
    let wgpu = backend::wgpu::WgpuOptions {
        device: options.device.clone(),
        force_f32: options.portable_kernels,
        force_no_subgroup: options.portable_kernels,
        ..Default::default()
    };
    match options.backend {
        BackendChoice::Cpu => Ok(backend::cpu::open()),
        BackendChoice::Wgpu => backend::wgpu::open(&wgpu),
        BackendChoice::Auto => {
            let hardware = backend::wgpu::adapters().iter().any(|a| a.kind != "cpu" && a.unusable.is_none());
            // Naming a device is asking for it.
            if hardware || options.device.is_some() { backend::wgpu::open(&wgpu) } else { Ok(backend::cpu::open()) }
        }
    }
}

#[cfg(not(feature = "wgpu"))]
fn open_backend(options: &LoadOptions) -> Result<Box<dyn Backend>> {
    match options.backend {
        BackendChoice::Cpu | BackendChoice::Auto if options.device.is_none() => Ok(backend::cpu::open()),
        _ => Err(Error::new(ErrorKind::NoDevice, "this build has no GPU backend (feature `wgpu`)")),
    }
}
