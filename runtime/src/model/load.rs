//! Loading as a sequence of bounded calls, from the first file to the last kernel.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::config::ModelConfig;
use super::generation::GenerationConfig;
use super::head::HeadBits;
use super::residence::{Bring, Cargo, LoadBudget, LoadProgress, LoadStage, Residence, Shared};
use super::{Model, inputs, program, weights};
use crate::backend::{self, Program};
use crate::checkpoint::{Checkpoint, Source};
use crate::engine::{Bytes, Engine};
use crate::error::{Error, ErrorKind, Result};
use crate::session::SessionOptions;
use crate::session::chat::ChatTemplate;
use crate::session::tokenizer::Tokenizer;

/// Bytes between two calls of a progress function, at least.
const LEAST: u64 = 256 << 10;

/// A model on its way, loaded in pieces by [`Load::tick`]. Dropping it, or [`Load::restart`], cancels it in any state.
///
/// Pieces are small but for three, which nobody can cut: opening the driver, compiling one GPU kernel, and reading
/// `tokenizer.json` (some 0.05 s for a byte-pair vocabulary of 150,000).
pub struct Load {
    engine: Arc<Engine>,
    from: From,
    head_bits: HeadBits,
    stage: Stage,
    /// Whether the tokenizer may be read on a thread of its own.
    aside: bool,
}

enum From {
    Path(PathBuf),
    Source(Source),
}

enum Stage {
    Open,
    Tokenizer(Box<Files>),
    Plan(Box<Files>),
    Bring(Box<Model>, Option<Aside>),
}

/// Memory that something will take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// The weights. On the CPU without dense ones of a file that is mapped, which are computed with where they are, but
    /// with the 8 bits of an output layer that is rounded.
    pub weights: Bytes,
    /// One session: KV cache, activations, sampling.
    pub session: Bytes,
}

/// What the files say.
struct Files {
    checkpoint: Checkpoint,
    config: ModelConfig,
    generation: GenerationConfig,
    tokenizer: Reading,
    chat_template: Option<ChatTemplate>,
}

/// A tokenizer, or the thread that reads it while weights are brought.
enum Reading {
    Here(Option<Box<Tokenizer>>),
    Aside(Aside),
}

/// The thread that reads a tokenizer; it does not outlive this.
struct Aside(Option<JoinHandle<Result<Tokenizer>>>);

impl Aside {
    fn join(mut self) -> Result<Option<Tokenizer>> {
        let Some(thread) = self.0.take() else { return Ok(None) };
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map(Some)
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // Nobody wants what it has read.
        let _ = self.0.take().map(JoinHandle::join);
    }
}

impl std::fmt::Debug for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Load").field("progress", &self.progress()).finish_non_exhaustive()
    }
}

impl Load {
    /// Begins to load the Hugging Face style folder at `path`; nothing is opened before the first tick.
    pub fn path(engine: &Arc<Engine>, path: impl Into<PathBuf>) -> Self {
        Self {
            engine: engine.clone(),
            from: From::Path(path.into()),
            head_bits: HeadBits::default(),
            stage: Stage::Open,
            aside: false,
        }
    }

    /// As [`Self::path`], from anywhere.
    pub fn source(engine: &Arc<Engine>, source: Source) -> Self {
        Self { from: From::Source(source), ..Self::path(engine, PathBuf::new()) }
    }

    /// Rounds the output head to so many bits on the way; for before the first tick.
    #[must_use]
    pub fn head_bits(self, head_bits: HeadBits) -> Self {
        Self { head_bits, ..self }
    }

    /// Goes on loading within the budget, without waiting for a device; the model once it is ready. At least one piece
    /// is done. After an error the next call starts over.
    ///
    /// # Errors
    /// Every way a folder can be wrong, unsupported or too large has its [`ErrorKind`]; the message names the file,
    /// the tensor, what was expected and what was found.
    pub fn tick(&mut self, budget: &LoadBudget) -> Result<Option<Arc<Model>>> {
        let time = budget.deadline();
        loop {
            match std::mem::replace(&mut self.stage, Stage::Open) {
                Stage::Open => self.stage = Stage::Tokenizer(Box::new(self.open()?)),
                Stage::Tokenizer(mut files) => {
                    files.tokenizer = self.tokenizer(&files)?;
                    files.chat_template = ChatTemplate::from_checkpoint(&files.checkpoint)?;
                    self.stage = Stage::Plan(files);
                }
                Stage::Plan(files) => {
                    let (model, aside) = self.plan(*files)?;
                    self.stage = Stage::Bring(Box::new(model), aside);
                }
                Stage::Bring(mut model, aside) => {
                    if !model.residence.write().advance(&model.cargo, budget)? {
                        self.stage = Stage::Bring(model, aside);
                        return Ok(None);
                    }
                    if let Some(aside) = aside {
                        model.tokenizer = aside.join()?;
                    }
                    return Ok(Some(Arc::from(model)));
                }
            }
            if time.is_over() {
                return Ok(None);
            }
        }
    }

    /// Blocks until [`Self::tick`] has something to do.
    ///
    /// # Errors
    /// A device error.
    pub fn wait(&mut self) -> Result<()> {
        match &self.stage {
            Stage::Bring(model, _) => model.residence.read().wait(&model.cargo),
            _ => Ok(()),
        }
    }

    /// How far it is.
    pub fn progress(&self) -> LoadProgress {
        match &self.stage {
            Stage::Bring(model, _) => model.residence.read().progress(&model.cargo),
            _ => LoadProgress { stage: LoadStage::Files, done: 0, total: 0 },
        }
    }

    /// Gives back everything loaded so far; the next tick starts over.
    pub fn restart(&mut self) {
        self.stage = Stage::Open;
    }

    /// Memory that the model and a session on it will take, from headers alone. Known exactly for weights; sessions take
    /// at most as much.
    ///
    /// # Errors
    /// As [`Self::tick`].
    pub fn estimate(&self, session: &SessionOptions) -> Result<Estimate> {
        let checkpoint = self.checkpoint()?;
        let (config, _) = configs(&checkpoint)?;
        let (plan, weights) = weights::plan(&checkpoint, &config, self.head_bits)?;
        let program = program_of(&config, &weights)?;
        let shapes: Vec<_> = plan.shapes().copied().collect();
        let runner = session.runner_config(&config, &self.engine)?;
        let host = |bytes| Bytes { host: bytes, device: 0 };
        let device = |bytes| Bytes { host: 0, device: bytes };
        Ok(match self.engine.is_host() {
            true => Estimate {
                weights: host(
                    plan.copied_bytes(&checkpoint, |shape| shape.bytes(shape.rows()))
                        .saturating_add(backend::cpu::rounded_bytes(&program, &shapes)),
                ),
                session: host(backend::cpu::runner_bytes(&program, &runner)),
            },
            false => Estimate {
                weights: device(plan.shapes().map(|shape| self.engine.weight_bytes(shape)).sum()),
                session: device(self.engine.runner_bytes(&program, &runner)),
            },
        })
    }

    fn checkpoint(&self) -> Result<Checkpoint> {
        Checkpoint::open_source(match &self.from {
            From::Path(path) => Source::path(path)?,
            From::Source(source) => source.clone(),
        })
    }

    fn open(&self) -> Result<Files> {
        let checkpoint = self.checkpoint()?;
        let (config, generation) = configs(&checkpoint)?;
        Ok(Files { checkpoint, config, generation, tokenizer: Reading::Here(None), chat_template: None })
    }

    fn tokenizer(&self, files: &Files) -> Result<Reading> {
        let reader = || Tokenizer::reader(&files.checkpoint, files.config.vocab_size);
        let Some(read) = reader()? else { return Ok(Reading::Here(None)) };
        if self.aside
            && let Ok(thread) = std::thread::Builder::new().name("awqua-tokenizer".into()).spawn(read)
        {
            return Ok(Reading::Aside(Aside(Some(thread))));
        }
        // Here, where the system refuses a thread, with which `read` went.
        let tokenizer = reader()?.map(|read| read()).transpose()?;
        Ok(Reading::Here(tokenizer.map(Box::new)))
    }

    /// The model without weights, and the thread that reads its tokenizer.
    fn plan(&self, files: Files) -> Result<(Model, Option<Aside>)> {
        let Files { checkpoint, config, generation, tokenizer, chat_template } = files;
        let (tokenizer, aside) = match tokenizer {
            Reading::Here(tokenizer) => (tokenizer.map(|tokenizer| *tokenizer), None),
            Reading::Aside(aside) => (None, Some(aside)),
        };
        let (plan, weights) = weights::plan(&checkpoint, &config, self.head_bits)?;
        let program = Arc::new(program_of(&config, &weights)?);
        let identity = plan.identity(&checkpoint)?;
        self.engine.choose_for(&program, &plan.shapes().copied().collect::<Vec<_>>());
        let session = SessionOptions::default().runner_config(&config, &self.engine)?;
        let cargo = Cargo { engine: self.engine.clone(), checkpoint, plan, program, config: session };
        let residence = Shared::new(Residence::Coming(Bring::Device));
        Ok((Model { config, generation, tokenizer, chat_template, identity, cargo, residence }, aside))
    }
}

/// The program over planned weights, with what some of them do to their inputs.
fn program_of(config: &ModelConfig, weights: &weights::ModelWeights) -> Result<Program> {
    let mut program = program::build(config, weights);
    inputs::arrange(&mut program, &weights.inputs)?;
    Ok(program)
}

/// What configuration and generation configuration say.
pub(super) fn configs(checkpoint: &Checkpoint) -> Result<(ModelConfig, GenerationConfig)> {
    let dir = checkpoint.dir();
    let in_config = |e: Error| e.in_file(dir.join("config.json"));
    let config = ModelConfig::from_json(checkpoint.config()).map_err(in_config)?;
    let generation = GenerationConfig::from_json(
        checkpoint.json("generation_config.json")?.as_ref(),
        checkpoint.config(),
        config.vocab_size,
    )
    .map_err(|e| e.in_file(dir.join("generation_config.json")))?;
    Ok((config, generation))
}

impl Load {
    /// Loads to the end; `progress` is called after each piece and can stop it with `Break`. A thread for this time reads
    /// the tokenizer meanwhile.
    ///
    /// # Errors
    /// As [`Self::tick`], and [`ErrorKind::Cancelled`].
    pub fn run(mut self, progress: &mut dyn FnMut(LoadProgress) -> std::ops::ControlFlow<()>) -> Result<Arc<Model>> {
        self.aside = true;
        let host = self.engine.is_host();
        loop {
            // On a host, of large models enough at a time to share it among processors, which lay weights out.
            let bytes = if host { (self.progress().total / 64).clamp(LEAST, 32 * LEAST) } else { LEAST };
            let kernels = if host { None } else { Some(1) };
            let budget = LoadBudget { bytes: Some(bytes), kernels, on_threads: true, ..LoadBudget::default() };
            if let Some(model) = self.tick(&budget)? {
                return Ok(model);
            }
            if progress(self.progress()).is_break() {
                return Err(Error::new(ErrorKind::Cancelled, "loading was cancelled"));
            }
            self.wait()?;
        }
    }
}
