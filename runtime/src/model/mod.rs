//! What is computed: a checkpoint's configuration turned into a program over uploaded weights.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use crate::backend::{Backend, BackendInfo, KvType, Program};
use crate::engine::{BackendChoice, DeviceChoice, Engine, EngineOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::session::chat::ChatTemplate;
use crate::session::tokenizer::Tokenizer;

mod arch;
mod config;
mod generation;
mod head;
mod inputs;
mod load;
mod program;
mod residence;
mod rope;
mod verify;
mod weights;

pub use config::{ExpertConfig, LayerConfig, ModelConfig};
pub use generation::GenerationConfig;
pub use head::HeadBits;
pub use load::{Estimate, Load};
pub use residence::{LoadBudget, LoadProgress, LoadStage};
pub(crate) use rope::append_rows;
pub use rope::{Rope, RopeScaling};
pub use verify::{Finding, Severity, verify};

use residence::{Cargo, Residence};

/// How to load a single model; [`EngineOptions`] has all there is to choose.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Which backend.
    pub backend: BackendChoice,
    /// Part of the adapter's name, in any letter case; the first adapter that has it is used.
    pub device: Option<String>,
    /// See [`EngineOptions::portable_kernels`].
    pub portable_kernels: bool,
    /// Bits of the output head.
    pub head_bits: HeadBits,
    /// See [`EngineOptions::tuning`].
    pub tuning: Option<Arc<Vec<u8>>>,
}

impl From<&LoadOptions> for EngineOptions {
    fn from(options: &LoadOptions) -> Self {
        Self {
            backend: options.backend,
            device: options.device.clone().map_or(DeviceChoice::Best, DeviceChoice::Named),
            portable_kernels: options.portable_kernels,
            tuning: options.tuning.clone(),
            ..Self::default()
        }
    }
}

/// A loaded model: weights on a device, program, tokenizer. Sessions share it.
pub struct Model {
    config: ModelConfig,
    generation: GenerationConfig,
    tokenizer: Option<Tokenizer>,
    chat_template: Option<ChatTemplate>,
    identity: u64,
    cargo: Cargo,
    residence: residence::Shared,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("folder", &self.folder()).field("config", &self.config).finish_non_exhaustive()
    }
}

impl Model {
    /// Opens a Hugging Face style folder and uploads its weights.
    ///
    /// # Errors
    /// As [`Load::tick`].
    pub fn open(dir: impl AsRef<Path>, options: &LoadOptions) -> Result<Arc<Self>> {
        Self::open_with_progress(dir, options, &mut |_| ControlFlow::Continue(()))
    }

    /// As [`Self::open`]; `progress` is called after each piece and can stop loading with `Break`.
    ///
    /// # Errors
    /// As [`Self::open`], and [`ErrorKind::Cancelled`].
    pub fn open_with_progress(
        dir: impl AsRef<Path>,
        options: &LoadOptions,
        progress: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<Arc<Self>> {
        Load::path(&Engine::new(options.into()), dir.as_ref()).head_bits(options.head_bits).run(progress)
    }

    /// Tells the system that mapped pages of its files will not be read soon. They come back when they are.
    pub fn release_pages(&self) {
        self.cargo.checkpoint.tensors().for_each(|tensor| tensor.release());
    }

    /// The engine it runs on.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.cargo.engine
    }

    /// A number that tells this model's weights from others': of names, shapes and a part of the values of all tensors.
    pub fn identity(&self) -> u64 {
        self.identity
    }

    /// Gives the memory of the weights back. Sessions keep their caches but fail with [`ErrorKind::Evicted`] until
    /// [`Self::restore`]; the checkpoint stays open, so that the weights can come back.
    pub fn evict(&self) {
        self.residence.write().evict();
    }

    /// Begins to bring evicted weights back; [`Self::tick`], or the ticks of its sessions, go on. Nothing happens if
    /// they are there.
    pub fn restore(&self) {
        self.residence.write().restore();
    }

    /// Goes on bringing weights back after [`Self::restore`], or after a lost device was recovered: true once they are
    /// there. False also while another thread is at it.
    ///
    /// # Errors
    /// [`ErrorKind::Evicted`] before [`Self::restore`], [`ErrorKind::DeviceLost`] before [`Engine::recover`], or those
    /// of [`Load::tick`]; after one of these the next call starts over.
    pub fn tick(&self, budget: &LoadBudget) -> Result<bool> {
        match self.residence.try_write() {
            Some(mut residence) => residence.advance(&self.cargo, budget),
            None => Ok(false),
        }
    }

    /// Blocks until [`Self::tick`] has something to do.
    ///
    /// # Errors
    /// A device error.
    pub fn wait(&self) -> Result<()> {
        self.residence.read().wait(&self.cargo)
    }

    /// How far the weights are.
    pub fn progress(&self) -> LoadProgress {
        self.residence.read().progress(&self.cargo)
    }

    /// Hyper-parameters.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// End-of-turn ids and recommended sampling.
    pub fn generation(&self) -> &GenerationConfig {
        &self.generation
    }

    /// Device, kernel variant and weight memory; the backend is `none` while the weights are away.
    pub fn backend_info(&self) -> BackendInfo {
        let Residence::Here(backend, _) = &*self.residence.read() else {
            return BackendInfo {
                backend: "none",
                device: String::new(),
                variant: String::new(),
                default_kv: KvType::F32,
                weight_bytes: 0,
            };
        };
        let mut info = backend.info();
        if let Some(reason) = self.cargo.engine.given_up() {
            info.variant += &format!("; the GPU is not used: {reason}");
        }
        info
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`] if the folder has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer
            .as_ref()
            .ok_or_else(|| Error::new(ErrorKind::Tokenizer, "the folder has no tokenizer.json").in_file(self.folder()))
    }

    /// The chat template, if the model has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// The backend with the weights on it; `None` while they are coming or another thread works on that.
    ///
    /// # Errors
    /// [`ErrorKind::Evicted`] or [`ErrorKind::DeviceLost`].
    pub(crate) fn backend(&self) -> Result<Option<Arc<dyn Backend>>> {
        match self.residence.try_read().as_deref() {
            None | Some(Residence::Coming(_)) => Ok(None),
            Some(Residence::Away) => Err(residence::evicted()),
            Some(Residence::Here(backend, _)) if !backend.is_lost() => Ok(Some(backend.clone())),
            Some(Residence::Here(..)) if self.cargo.engine.is_lost() => {
                Err(Error::new(ErrorKind::DeviceLost, "the device was lost and not recovered yet"))
            }
            Some(Residence::Here(..)) => Ok(None),
        }
    }

    pub(crate) fn program(&self) -> &Arc<Program> {
        &self.cargo.program
    }

    fn folder(&self) -> &Path {
        self.cargo.checkpoint.dir()
    }
}
