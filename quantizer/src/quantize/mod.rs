//! From a floating-point checkpoint to a packed one, a decoder block at a time.
//!
//! Weights are read from the mapping when their block comes up, and finished blocks wait on disk for the
//! writing of the checkpoint, so memory holds one block and the calibration tokens. The same source, options and
//! calibration give the same bytes, interrupted or not, on any number of threads.

use std::collections::BTreeMap;
use std::path::Path;

use awqua::checkpoint::{Checkpoint, TensorView};
use awqua::quant::Quantization;
use awqua::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::calibration::Calibration;
use crate::decoder::{Decoder, Slot};
use crate::device::Compute;
use crate::grid::Grid;
use crate::method::{Method, Recipe};
use crate::write::DEFAULT_SHARD_BYTES;

mod assemble;
mod block;
mod package;
mod state;
pub mod tune;

pub use block::{BlockReport, LinearReport};
pub(crate) use block::{Streams, Task};
pub use package::Format;

/// Input features that share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum GroupSize {
    /// The largest of 128, 64 and 32 that divides the input features of every linear.
    #[default]
    Auto,
    /// This many.
    Features(usize),
    /// All of a row.
    Channel,
}

impl GroupSize {
    /// Input features that share a scale in this model; `None`: all of a row.
    pub(crate) fn resolve(self, decoder: &Decoder) -> Result<Option<usize>> {
        let fits = |size: usize| Slot::ALL.iter().all(|&slot| decoder.shape(slot).1.is_multiple_of(size));
        match self {
            Self::Channel => Ok(None),
            Self::Features(size) => Ok(Some(size)),
            Self::Auto => [128, 64, 32].into_iter().find(|&size| fits(size)).map(Some).ok_or_else(|| {
                let message = "none of 128, 64 and 32 divides the input features of every linear; try one group a row";
                Error::new(ErrorKind::Unsupported, message)
            }),
        }
    }
}

/// What [`quantize`] does.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct QuantizeOptions {
    /// How codes are chosen.
    pub method: Method,
    /// Replaces the parts that `method` stands for.
    pub recipe: Option<Recipe>,
    /// Bits of a code: 2 to 6, or 8.
    pub bits: u32,
    /// Input features that share a scale.
    pub group_size: GroupSize,
    /// Whether zero points are the middle of the range.
    pub symmetric: bool,
    /// Other bits for single modules by name without `.weight`; 16 leaves a module as it is.
    pub bits_of: BTreeMap<String, u32>,
    /// Dialect to write.
    pub format: Format,
    /// Whether a block is calibrated with what the quantized blocks before it put out.
    pub propagate: bool,
    /// Seed of the random numbers.
    pub seed: u64,
    /// Largest weight file, bytes.
    pub shard_bytes: u64,
}

impl QuantizeOptions {
    /// The defaults of a method and width.
    pub fn new(method: Method, bits: u32) -> Self {
        Self {
            method,
            recipe: None,
            bits,
            group_size: GroupSize::Auto,
            symmetric: false,
            bits_of: BTreeMap::new(),
            format: if bits == 4 { Format::AwqGemm } else { Format::PackQuantized },
            propagate: true,
            seed: 0,
            shard_bytes: DEFAULT_SHARD_BYTES,
        }
    }
}

/// How far [`quantize`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Blocks finished, and at the end the writing as one more.
    pub done: usize,
    /// Blocks of the model plus one.
    pub total: usize,
}

/// What [`quantize`] did.
#[derive(Debug, Clone, Serialize)]
pub struct QuantizeReport {
    /// Input features that share a scale; `None`: all of a row.
    pub group_size: Option<usize>,
    /// Mean bits of a packed weight, scales and zero points included.
    pub bits_per_weight: f64,
    /// Blocks in order.
    pub blocks: Vec<BlockReport>,
    /// How tuning went, where the recipe has it.
    pub tuning: Option<tune::TuneReport>,
    /// Blocks that were taken over from an interrupted run.
    pub resumed: usize,
    /// Bytes of the source's weight files.
    pub source_bytes: u64,
    /// Bytes of the written weight files.
    pub packed_bytes: u64,
}

/// What a run is going to do; see [`plan`].
#[derive(Debug)]
pub struct Plan {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) decoder: Decoder,
    pub(crate) group_size: Option<usize>,
    pub(crate) recipe: Recipe,
    pub(crate) options: QuantizeOptions,
    identity: String,
}

/// Checks the source, the options and the calibration against each other without computing anything.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if the source is packed already, of an unknown architecture or cannot be written in the
/// dialect; [`ErrorKind::InvalidInput`] for options or a calibration that cannot be used; those of reading.
pub fn plan(
    source: &Path,
    calibration: &Calibration,
    options: &QuantizeOptions,
    compute: impl Into<Compute>,
) -> Result<Plan> {
    let checkpoint = Checkpoint::open(source)?;
    if Quantization::of(&checkpoint)?.is_some() {
        return Err(Error::new(ErrorKind::Unsupported, "the checkpoint is already quantized").in_file(source));
    }
    let length = calibration.sequences.iter().map(Vec::len).max().unwrap_or(0);
    let decoder = Decoder::new(&checkpoint, length, compute)?;
    let recipe = options.recipe.clone().unwrap_or_else(|| options.method.recipe(options.bits));
    if recipe.uses_tokens() {
        calibration.check(decoder.config.vocab_size)?;
    }
    let shapes: Vec<(Slot, (usize, usize))> = Slot::ALL.iter().map(|&slot| (slot, decoder.shape(slot))).collect();
    let group_size = options.group_size.resolve(&decoder).map_err(|error| error.in_file(source))?;
    let plan =
        Plan { identity: identity(&checkpoint)?, checkpoint, decoder, group_size, recipe, options: options.clone() };
    for layer in 0..plan.decoder.config.num_hidden_layers {
        for &(slot, shape) in &shapes {
            let Some(grid) = plan.grid(layer, slot) else { continue };
            let name = plan.decoder.name(layer, slot.module());
            let checked = grid.check(shape.1).and_then(|()| options.format.check(shape, grid));
            checked.map_err(|error| error.in_file(source).in_tensor(name))?;
        }
    }
    if let Some(name) = options.bits_of.keys().find(|name| plan.slot_of(name).is_none()) {
        let message = format!("`{name}` is not a linear module of a decoder layer");
        return Err(Error::new(ErrorKind::InvalidInput, message).in_file(source));
    }
    Ok(plan)
}

impl Plan {
    /// Bytes that the run needs at most, the mapped source not included, if it calibrates with `calibration`.
    pub fn peak_memory(&self, calibration: &Calibration) -> u64 {
        let tokens: usize = calibration.sequences.iter().map(Vec::len).sum();
        let longest = calibration.sequences.iter().map(Vec::len).max().unwrap_or(0);
        let c = &self.decoder.config;
        let weights: usize = Slot::ALL.iter().map(|&slot| self.decoder.shape(slot)).map(|(n, k)| n * k).sum();
        let widest = c.intermediate_size.max(c.hidden_size).max(self.decoder.q_width());
        let copies = if self.recipe.learn.is_some() { 7 } else { 3 };
        let gram = if self.recipe.compensate.is_some() { 3 * widest * widest } else { 256 * widest };
        let streams = tokens * (4 * c.hidden_size + widest.max(2 * c.hidden_size + self.decoder.q_width()));
        let one = longest * (3 * c.intermediate_size + 8 * c.hidden_size) + 2 * longest * longest;
        4 * (copies * weights + gram + streams + one) as u64
    }

    /// Bytes of the weight files that will be written.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if the size overflows.
    pub fn packed_bytes(&self) -> Result<u64> {
        crate::write::weight_bytes(&assemble::layout(self).specs, self.options.shard_bytes)
    }

    /// Bytes of the tensors of the linear module `name` packed with `bits` bits, or left as it is with 16.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if there is no such module.
    pub fn module_bytes(&self, name: &str, bits: u32) -> Result<u64> {
        let (_, slot) = self.slot_of(name).ok_or_else(|| {
            let message = format!("`{name}` is not a linear module of a decoder layer");
            Error::new(ErrorKind::InvalidInput, message)
        })?;
        let (n, k) = self.decoder.shape(slot);
        if bits >= 16 {
            return Ok(2 * (n * k) as u64);
        }
        let grid = Grid { bits, group_size: self.group_size, symmetric: self.options.symmetric };
        self.options.format.specs(name, (n, k), grid).iter().map(crate::write::TensorSpec::bytes).sum()
    }

    /// How a module is packed; `None` leaves it as it is.
    fn grid(&self, layer: usize, slot: Slot) -> Option<Grid> {
        let name = self.decoder.name(layer, slot.module());
        let bits = self.options.bits_of.get(&name).copied().unwrap_or(self.options.bits);
        (bits < 16).then_some(Grid { bits, group_size: self.group_size, symmetric: self.options.symmetric })
    }

    /// Layer and slot of a module name.
    fn slot_of(&self, module: &str) -> Option<(usize, Slot)> {
        let (layer, rest) = module.strip_prefix("model.layers.")?.split_once('.')?;
        let layer = layer.parse().ok().filter(|&layer| layer < self.decoder.config.num_hidden_layers)?;
        Slot::ALL.into_iter().find(|slot| slot.module() == rest).map(|slot| (layer, slot))
    }

    /// What the configuration of the result says about the run.
    fn record(&self, calibration: &Calibration) -> Value {
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "method": self.options.method.name(),
            "recipe": self.recipe,
            "propagate": self.options.propagate,
            "seed": self.options.seed,
            "calibration": calibration.record(),
        })
    }
}

/// Packs the floating-point checkpoint in folder `source` and writes it to the new folder `out`.
///
/// The result is reopened and compared with what was meant before it gets its name. An error from `progress`, as any
/// other, leaves nothing under that name; called again with the same arguments the run goes on after the last finished
/// block, with the same result.
///
/// # Errors
/// As [`plan`]; [`ErrorKind::InvalidFile`] if the source changed meanwhile; those of `progress` and of writing.
pub fn quantize(
    source: &Path,
    out: &Path,
    calibration: &Calibration,
    options: &QuantizeOptions,
    compute: impl Into<Compute>,
    progress: &mut dyn FnMut(Progress) -> Result<()>,
) -> Result<QuantizeReport> {
    let plan = plan(source, calibration, options, compute)?;
    let (decoder, recipe, seed) = (&plan.decoder, &plan.recipe, options.seed);
    let layers = decoder.config.num_hidden_layers;
    // Refuses an output that cannot be used before the work, not after it.
    let state = state::State::open(out, &plan.fingerprint(calibration)?)?;
    let resumed = state.finished().min(layers);
    let total = layers + 1;

    let mut sets = match resumed {
        0 => {
            let start = || -> Result<block::Streams> {
                calibration.sequences.iter().map(|ids| decoder.embed(&plan.checkpoint, ids)).collect()
            };
            match (recipe.uses_tokens(), recipe.follows_exact()) {
                (false, _) => vec![],
                (true, false) => vec![start()?],
                (true, true) => vec![start()?, start()?],
            }
        }
        _ => state.streams(resumed)?,
    };
    for layer in resumed..layers {
        progress(Progress { done: layer, total })?;
        let block = decoder.load(&plan.checkpoint, None, layer)?;
        let task = block::Task {
            decoder,
            recipe,
            grid: &|slot| plan.grid(layer, slot),
            propagate: options.propagate,
            seed: options.seed.wrapping_add(layer as u64),
        };
        let mut none = block::Streams::new();
        let finished = match sets.as_mut_slice() {
            [] => task.run(block, &mut none, None),
            [streams] => task.run(block, streams, None),
            [streams, exact, ..] => task.run(block, streams, Some(exact)),
        };
        if let Some((_, slot)) =
            finished.packed.iter().zip(Slot::ALL).find(|(m, _)| m.as_ref().is_some_and(|m| m.check().is_err()))
        {
            let message = "quantizing it gave scales that are not finite; its weights or inputs are out of range";
            let name = decoder.name(layer, slot.module());
            return Err(Error::new(ErrorKind::InvalidTensor, message).in_file(source).in_tensor(name));
        }
        state.store(&finished, &sets.iter().collect::<Vec<_>>())?;
    }
    drop(sets);
    let tuned = match (recipe.tune, state.tuning()) {
        (None, _) => None,
        (Some(_), Some(report)) => Some(report),
        (Some(options), None) => {
            let sequences = &calibration.sequences;
            let mut beat = |_, _| progress(Progress { done: layers, total });
            let report = tune::tune(decoder, &plan.checkpoint, &state, sequences, &options, seed, &mut beat)?;
            state.finish_tuning(&report)?;
            Some(report)
        }
    };
    progress(Progress { done: layers, total })?;
    if identity(&plan.checkpoint)? != plan.identity {
        return Err(Error::new(ErrorKind::InvalidFile, "the source changed while it was read").in_file(source));
    }
    let writer = state.writer(out)?;
    let (blocks, packed_bytes) = assemble::assemble(&plan, calibration, &state, writer)?;
    state.remove()?;
    progress(Progress { done: total, total })?;

    let (mut bits, mut weights) = (0.0, 0.0);
    for linear in blocks.iter().flat_map(|block| &block.linears) {
        let count = (linear.shape[0] * linear.shape[1]) as f64;
        let group = plan.group_size.unwrap_or(linear.shape[1]) as f64;
        let zero = if options.symmetric { 0.0 } else { f64::from(linear.bits) };
        bits += count * (f64::from(linear.bits) + (16.0 + zero) / group);
        weights += count;
    }
    Ok(QuantizeReport {
        group_size: plan.group_size,
        bits_per_weight: bits / f64::max(weights, 1.0),
        blocks,
        tuning: tuned,
        resumed,
        source_bytes: plan.checkpoint.bytes_on_disk(),
        packed_bytes,
    })
}

impl Plan {
    /// What two runs have to have in common to continue one another.
    fn fingerprint(&self, calibration: &Calibration) -> Result<String> {
        let all = json!({
            "record": self.record(calibration),
            "options": self.options,
            "source": self.identity,
        });
        let digest = Sha256::digest(all.to_string().as_bytes());
        Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// Names, sizes and times of change of the weight files.
fn identity(checkpoint: &Checkpoint) -> Result<String> {
    let mut files: Vec<&Path> = checkpoint.tensors().map(|tensor: &TensorView| &*tensor.file).collect();
    files.sort();
    files.dedup();
    let mut text = String::new();
    for file in files {
        let metadata = std::fs::metadata(file).map_err(|e| Error::io(file, &e))?;
        text += &format!("{} {} {:?};", file.display(), metadata.len(), metadata.modified().ok());
    }
    Ok(text)
}
