//! Writing the checkpoint from finished blocks, and reading it back before it gets its name.

use std::collections::BTreeMap;

use awqua::checkpoint::Checkpoint;
use awqua::quant::{self, InputTransform, Quantization};
use awqua::{Error, ErrorKind, Result};
use half::f16;
use serde_json::json;

use super::state::{State, Stored};
use super::{BlockReport, Plan};
use crate::calibration::{Calibration, check};
use crate::decoder::Slot;
use crate::grid::Grid;
use crate::rtn::COMPANIONS;
use crate::write::{Elements, FolderWriter, TensorSpec, copy_tensor};

pub(super) fn assemble(
    plan: &Plan,
    calibration: &Calibration,
    state: &State,
    writer: FolderWriter,
) -> Result<(Vec<BlockReport>, u64)> {
    let source = &plan.checkpoint;
    let Layout { specs, modules, dense } = layout(plan);
    let mut config = source.config().clone();
    config["quantization_config"] = plan
        .options
        .format
        .section(&modules, &dense, &plan.record(calibration))
        .map_err(|e| e.in_file(source.dir()))?;
    let key = if config.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    config[key] = json!("float16");
    writer.write_json("config.json", &config)?;
    for file in COMPANIONS {
        writer.copy_file(source.dir(), file)?;
    }

    let mut blocks = Blocks { plan, state, held: None };
    writer.write_tensors(&specs, plan.options.shard_bytes, &mut |spec, out| {
        let mut write = |bytes: &[u8]| out.write_all(bytes).map_err(|error| Error::io(writer.dir(), &error));
        match blocks.packed(&spec.name)? {
            Some(bytes) => write(bytes),
            None => match blocks.vector(&spec.name)? {
                Some(values) => write(&halves(&values, &spec.name)?),
                None => copy_tensor(source.get(&spec.name)?, Elements::Halves, &mut write),
            },
        }
    })?;

    let written = Checkpoint::open(writer.dir())?;
    verify(plan, &written, &mut blocks)?;
    let packed_bytes = written.bytes_on_disk();
    drop(written);
    let mut reports = Vec::new();
    let mut spread = Vec::new();
    for layer in 0..plan.decoder.config.num_hidden_layers {
        let stored = state.load(layer)?;
        reports.push(stored.report);
        spread.extend(stored.spread.into_iter().map(|s| (layer, s.site, s.halves)));
    }
    writer.write_json("awqua_report.json", &json!(reports))?;
    if !spread.is_empty() {
        writer.write_file(check::FILE, &check::encode(&spread)?)?;
    }
    writer.finish()?;
    Ok((reports, packed_bytes))
}

/// What the checkpoint of a plan holds.
pub(super) struct Layout {
    /// Every tensor, in the order of writing.
    pub specs: Vec<TensorSpec>,
    /// Packed modules.
    pub modules: Vec<(String, Grid)>,
    /// Linears of decoder layers that are left as they are.
    pub dense: Vec<String>,
}

pub(super) fn layout(plan: &Plan) -> Layout {
    let mut modules = Vec::new();
    for layer in 0..plan.decoder.config.num_hidden_layers {
        for slot in Slot::ALL {
            if let Some(grid) = plan.grid(layer, slot) {
                modules.push((plan.decoder.name(layer, slot.module()), grid));
            }
        }
    }
    let mut dense = Vec::new();
    let mut specs = Vec::new();
    for tensor in plan.checkpoint.tensors() {
        let module = tensor.name.strip_suffix(".weight").and_then(|name| Some((name, plan.slot_of(name)?)));
        match module.and_then(|(name, (layer, slot))| Some((name, plan.grid(layer, slot)?))) {
            Some((name, grid)) => {
                specs.extend(plan.options.format.specs(name, (tensor.shape[0], tensor.shape[1]), grid));
            }
            None => {
                dense.extend(module.map(|(name, _)| name.to_owned()));
                specs.push(TensorSpec {
                    name: tensor.name.clone(),
                    dtype: Elements::Halves.of(tensor.dtype),
                    shape: tensor.shape.clone(),
                });
            }
        }
    }
    Layout { specs, modules, dense }
}

/// Finished blocks, one in memory at a time.
struct Blocks<'a> {
    plan: &'a Plan,
    state: &'a State,
    held: Option<Held>,
}

struct Held {
    layer: usize,
    stored: Stored,
    /// Tensors of each packed module by their suffixes, in the order of [`Slot::ALL`]; empty until one is asked for.
    encoded: Vec<Vec<(&'static str, Vec<u8>)>>,
}

impl Blocks<'_> {
    fn layer(&mut self, layer: usize) -> Result<&mut Held> {
        if self.held.as_ref().is_none_or(|held| held.layer != layer) {
            self.held = None;
            self.held = Some(Held { layer, stored: self.state.load(layer)?, encoded: Vec::new() });
        }
        self.held.as_mut().ok_or_else(|| Error::new(ErrorKind::Io, "the finished block is gone"))
    }

    /// The data of tensor `name`, if it is a part of a packed module.
    fn packed(&mut self, name: &str) -> Result<Option<&[u8]>> {
        let plan = self.plan;
        let Some((module, suffix)) = name.rsplit_once('.') else { return Ok(None) };
        let Some((layer, slot)) = plan.slot_of(module) else { return Ok(None) };
        // A bias has the name of a part, and is none.
        if matches!(suffix, "weight" | "bias") {
            return Ok(None);
        }
        let Held { stored, encoded, .. } = self.layer(layer)?;
        let Some(_) = &stored.packed[slot as usize] else { return Ok(None) };
        if encoded.is_empty() {
            let encode = |i: usize| match &stored.packed[i] {
                Some(matrix) => plan.options.format.encode(matrix, plan.options.symmetric),
                None => Ok(Vec::new()),
            };
            *encoded = plan.decoder.threads.map(stored.packed.len(), encode).into_iter().collect::<Result<_>>()?;
        }
        let part = encoded[slot as usize].iter().find(|(known, _)| *known == suffix);
        let missing = || Error::new(ErrorKind::InvalidInput, format!("the dialect has no tensor `{suffix}`"));
        part.map(|(_, bytes)| Some(bytes.as_slice())).ok_or_else(missing)
    }

    /// The changed norm or bias of this name.
    fn vector(&mut self, name: &str) -> Result<Option<Vec<f32>>> {
        let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
        let Some((Ok(layer), rest)) = layer.map(|(layer, rest)| (layer.parse(), rest)) else { return Ok(None) };
        let stored = &self.layer(layer)?.stored;
        Ok(stored.vectors.iter().find(|(known, _)| known == rest).map(|(_, values)| values.clone()))
    }
}

/// The values in half precision, which has to hold them.
fn halves(values: &[f32], name: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(2 * values.len());
    for &value in values {
        let half = f16::from_f32(value);
        if !half.is_finite() {
            let message = format!("{value} does not fit half precision");
            return Err(Error::new(ErrorKind::InvalidTensor, message).in_tensor(name));
        }
        bytes.extend(half.to_le_bytes());
    }
    Ok(bytes)
}

/// Compares the written checkpoint with what was meant, through the functions that load it.
fn verify(plan: &Plan, written: &Checkpoint, blocks: &mut Blocks<'_>) -> Result<()> {
    let quantization = Quantization::of(written)?;
    let mut changed = BTreeMap::new();
    for layer in 0..plan.decoder.config.num_hidden_layers {
        let stored = &blocks.layer(layer)?.stored;
        let check = |i: usize| {
            let Some(matrix) = &stored.packed[i] else { return Ok(()) };
            let module = plan.decoder.name(layer, Slot::ALL[i].module());
            let found = quant::load_linear(written, quantization.as_ref(), &module, matrix.n, matrix.k)?;
            let same = found.weight == matrix.to_weight()? && found.input == InputTransform::default();
            if same { Ok(()) } else { Err(differs(written, &module)) }
        };
        plan.decoder.threads.map(stored.packed.len(), check).into_iter().collect::<Result<()>>()?;
        for (rest, values) in &stored.vectors {
            changed.insert(plan.decoder.name(layer, rest), values.clone());
        }
    }
    for tensor in plan.checkpoint.tensors() {
        let packed = tensor.name.strip_suffix(".weight").and_then(|name| plan.slot_of(name));
        if packed.is_some_and(|(layer, slot)| plan.grid(layer, slot).is_some()) {
            continue;
        }
        let found = written.require(&tensor.name, &tensor.shape)?;
        let bytes = found.bytes()?;
        let (mut at, mut same) = (0, true);
        let mut compare = |meant: &[u8]| {
            same &= bytes.get(at..at + meant.len()) == Some(meant);
            at += meant.len();
            Ok(())
        };
        match changed.get(&tensor.name) {
            Some(values) => compare(&halves(values, &tensor.name)?)?,
            None => copy_tensor(tensor, Elements::Halves, &mut compare)?,
        }
        if !same || at != bytes.len() {
            return Err(differs(written, &tensor.name));
        }
        found.release();
    }
    Ok(())
}

fn differs(written: &Checkpoint, name: &str) -> Error {
    let message = "the written checkpoint does not read back as it was meant";
    Error::new(ErrorKind::InvalidTensor, message).in_file(written.dir()).in_tensor(name)
}
