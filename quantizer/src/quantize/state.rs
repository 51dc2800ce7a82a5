//! Finished blocks and the calibration tokens between blocks, on disk: what a run resumes from.
//!
//! The folder lies beside the output under a temporary name. A block counts as finished when its file has its name,
//! which happens after the streams that the next block starts from have theirs; both are written under another name
//! first. A folder of another run (other source, options or calibration) is emptied.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use awqua::quant::AffineMatrix;
use awqua::{Error, ErrorKind, Result};
use half::f16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};

use super::block::{BlockReport, Finished, SpreadHalves, Streams};
use super::tune::TuneReport;
use crate::decoder::{Block, Site, Slot};
use crate::write::{FolderWriter, free_name};

pub(super) struct State {
    dir: PathBuf,
    /// Whether blocks are read as [`State::store_tuned`] left them, once it did.
    tuned: std::cell::Cell<bool>,
}

/// A block as it was stored.
pub(super) struct Stored {
    pub packed: Vec<Option<AffineMatrix>>,
    /// Norms, biases and weights that are not packed, by the rest of their name.
    pub vectors: Vec<(String, Vec<f32>)>,
    pub report: BlockReport,
    pub spread: Vec<SpreadHalves>,
}

impl State {
    /// Opens or starts the folder of the run with this fingerprint.
    pub fn open(out: &Path, fingerprint: &str) -> Result<Self> {
        let name = free_name(out)?;
        let mut folder = std::ffi::OsString::from(".");
        folder.push(name);
        folder.push(".resume");
        let state = Self { dir: out.with_file_name(folder), tuned: false.into() };
        let run = state.dir.join("run");
        if fs::read(&run).ok().as_deref() != Some(fingerprint.as_bytes()) {
            state.remove()?;
            fs::create_dir_all(&state.dir).map_err(|e| Error::io(&state.dir, &e))?;
            state.write("run", fingerprint.as_bytes())?;
        }
        Ok(state)
    }

    /// Removes the folder.
    pub fn remove(&self) -> Result<()> {
        match fs::remove_dir_all(&self.dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(&self.dir, &e)),
            _ => Ok(()),
        }
    }

    /// Starts the output folder `out`. Until it gets its name it lies in this one, so that a run that was killed while
    /// writing leaves nothing that the next one does not know of.
    pub fn writer(&self, out: &Path) -> Result<FolderWriter> {
        FolderWriter::create_as(out, self.dir.join("output"))
    }

    /// Blocks that are finished.
    pub fn finished(&self) -> usize {
        (0..).take_while(|&layer| self.dir.join(block_file(layer)).exists()).count()
    }

    /// The streams that block `layer` starts from, in the sets they were stored in.
    pub fn streams(&self, layer: usize) -> Result<Vec<Streams>> {
        let path = self.dir.join(streams_file(layer));
        let bytes = fs::read(&path).map_err(|e| Error::io(&path, &e))?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| damaged(&path, &e))?;
        let mut sets: Vec<Streams> = Vec::new();
        for set in 0.. {
            let mut streams = Streams::new();
            while let Ok(tensor) = tensors.tensor(&format!("{set}.{}", streams.len())) {
                streams.push(floats(tensor.data()));
            }
            if streams.is_empty() {
                return Ok(sets);
            }
            sets.push(streams);
        }
        Ok(sets)
    }

    /// Stores a finished block and the streams behind it.
    pub fn store(&self, finished: &Finished, sets: &[&Streams]) -> Result<()> {
        let layer = finished.block.layer;
        let streams = sets.iter().enumerate().flat_map(|(set, streams)| {
            streams.iter().enumerate().map(move |(i, x)| (format!("{set}.{i}"), Dtype::F32, x.len(), bytes(x)))
        });
        self.write_tensors(&streams_file(layer + 1), streams.collect(), None)?;

        self.write_block(&block_file(layer), &finished.block, &finished.packed, &finished.report, &finished.spread)?;
        let _ = fs::remove_file(self.dir.join(streams_file(layer)));
        Ok(())
    }

    /// Stores a block with the parameters that tuning gave it.
    pub fn store_tuned(&self, block: &Block, stored: &Stored) -> Result<()> {
        self.write_block(&tuned_file(block.layer), block, &stored.packed, &stored.report, &stored.spread)
    }

    /// Reads tuned blocks from now on. `report` is kept for a run that resumes here.
    pub fn finish_tuning(&self, report: &TuneReport) -> Result<()> {
        self.write(TUNED, json!(report).to_string().as_bytes())?;
        self.tuned.set(true);
        Ok(())
    }

    /// Notes where tuning is: its losses so far, and all it would need to go on.
    pub fn save_tuning(&self, losses: &[f64], values: &[f32]) -> Result<()> {
        let losses = losses.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let tensors = vec![
            ("losses".to_owned(), Dtype::F64, losses.len() / 8, losses),
            ("values".to_owned(), Dtype::F32, values.len(), bytes(values)),
        ];
        self.write_tensors(TUNING, tensors, None)
    }

    /// What [`State::save_tuning`] noted.
    pub fn load_tuning(&self) -> Result<Option<(Vec<f64>, Vec<f32>)>> {
        let path = self.dir.join(TUNING);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(&path, &error)),
        };
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| damaged(&path, &e))?;
        let losses = tensors.tensor("losses").map_err(|e| damaged(&path, &e))?;
        let losses = losses.data().as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect();
        let values = tensors.tensor("values").map_err(|e| damaged(&path, &e))?;
        Ok(Some((losses, floats(values.data()))))
    }

    /// The report of tuning, if that is finished.
    pub fn tuning(&self) -> Option<TuneReport> {
        let report = serde_json::from_slice(&fs::read(self.dir.join(TUNED)).ok()?).ok()?;
        self.tuned.set(true);
        Some(report)
    }

    fn write_block(
        &self,
        file: &str,
        block: &Block,
        packed: &[Option<AffineMatrix>],
        report: &BlockReport,
        spread: &[SpreadHalves],
    ) -> Result<()> {
        let mut tensors = Vec::new();
        let mut vectors: Vec<(String, &[f32])> = vec![
            ("input_layernorm.weight".into(), &block.input_norm),
            ("post_attention_layernorm.weight".into(), &block.post_norm),
        ];
        for (&slot, matrix) in Slot::ALL.iter().zip(packed) {
            let (module, linear) = (slot.module(), block.linear(slot));
            if let Some(bias) = &linear.bias {
                vectors.push((format!("{module}.bias"), bias));
            }
            match matrix {
                Some(matrix) => {
                    let scales: Vec<u8> = matrix.scales.iter().flat_map(|s| s.to_le_bytes()).collect();
                    tensors.push((format!("{module}.codes"), Dtype::U8, matrix.codes.len(), matrix.codes.clone()));
                    tensors.push((format!("{module}.scales"), Dtype::F16, matrix.scales.len(), scales));
                    tensors.push((format!("{module}.zeros"), Dtype::U8, matrix.zeros.len(), matrix.zeros.clone()));
                }
                // Scaling may have changed modules that are not packed.
                None => vectors.push((format!("{module}.weight"), &linear.weight)),
            }
        }
        for (name, values) in vectors {
            tensors.push((format!("vector.{name}"), Dtype::F32, values.len(), bytes(values)));
        }
        for SpreadHalves { site, halves } in spread {
            for (i, half) in halves.iter().enumerate() {
                tensors.push((format!("spread.{}.{i}", site.name()), Dtype::F32, half.len(), bytes(half)));
            }
        }
        let shapes: Vec<Value> = packed
            .iter()
            .map(|m| m.as_ref().map_or(Value::Null, |m| json!([m.n, m.k, m.bits, m.group_size])))
            .collect();
        let about = json!({ "report": report, "shapes": shapes }).to_string();
        self.write_tensors(file, tensors, Some(about))
    }

    /// Reads a finished block.
    pub fn load(&self, layer: usize) -> Result<Stored> {
        let path = self.dir.join(if self.tuned.get() { tuned_file(layer) } else { block_file(layer) });
        let bytes = fs::read(&path).map_err(|e| Error::io(&path, &e))?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| damaged(&path, &e))?;
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| damaged(&path, &e))?;
        let about = metadata.metadata().as_ref().and_then(|m| m.get("about"));
        let about: Value = serde_json::from_str(about.map_or("", String::as_str)).map_err(|e| damaged(&path, &e))?;
        let report = serde_json::from_value(about["report"].clone()).map_err(|e| damaged(&path, &e))?;
        let mut packed = Vec::new();
        for (i, slot) in Slot::ALL.iter().enumerate() {
            let shape: Option<(usize, usize, u32, usize)> =
                serde_json::from_value(about["shapes"][i].clone()).map_err(|e| damaged(&path, &e))?;
            let Some((n, k, bits, group_size)) = shape else {
                packed.push(None);
                continue;
            };
            let data = |suffix: &str| {
                let name = format!("{}.{suffix}", slot.module());
                tensors.tensor(&name).map(|t| t.data().to_vec()).map_err(|e| damaged(&path, &e))
            };
            let scales = data("scales")?.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b)).collect();
            let matrix = AffineMatrix { n, k, bits, group_size, codes: data("codes")?, scales, zeros: data("zeros")? };
            matrix.check().map_err(|e| e.in_file(&path))?;
            packed.push(Some(matrix));
        }
        let vectors = tensors
            .iter()
            .filter_map(|(name, tensor)| Some((name.strip_prefix("vector.")?.to_owned(), floats(tensor.data()))));
        let vectors = vectors.collect();
        let spread = Site::ALL.into_iter().filter_map(|site| {
            let half = |i: usize| Some(floats(tensors.tensor(&format!("spread.{}.{i}", site.name())).ok()?.data()));
            Some(SpreadHalves { site, halves: [half(0)?, half(1)?] })
        });
        let spread = spread.collect();
        Ok(Stored { packed, vectors, report, spread })
    }

    fn write_tensors(
        &self,
        file: &str,
        tensors: Vec<(String, Dtype, usize, Vec<u8>)>,
        about: Option<String>,
    ) -> Result<()> {
        let path = self.dir.join(file);
        let views: Vec<_> = tensors
            .iter()
            .map(|(name, dtype, len, data)| Ok((name.as_str(), TensorView::new(*dtype, vec![*len], data)?)))
            .collect::<Result<_, safetensors::SafeTensorError>>()
            .map_err(|e| damaged(&path, &e))?;
        let about = about.map(|about| [("about".to_owned(), about)].into());
        let bytes = safetensors::serialize(views, about).map_err(|e| damaged(&path, &e))?;
        self.write(file, &bytes)
    }

    /// Writes a file under another name, then gives it its own.
    fn write(&self, file: &str, content: &[u8]) -> Result<()> {
        let path = self.dir.join(file);
        let temporary = self.dir.join(format!("{file}.partial"));
        let write = || -> std::io::Result<()> {
            let mut out = fs::File::create(&temporary)?;
            out.write_all(content)?;
            out.sync_all()?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|e| Error::io(&path, &e))
    }
}

/// Written when all blocks are tuned.
const TUNED: &str = "tuned";

/// Where tuning is.
const TUNING: &str = "tuning.safetensors";

impl Stored {
    /// Gives `block` the norms, biases and unpacked weights of the stored one.
    pub fn apply(&self, block: &mut Block) {
        for (name, values) in &self.vectors {
            match name.as_str() {
                "input_layernorm.weight" => block.input_norm.clone_from(values),
                "post_attention_layernorm.weight" => block.post_norm.clone_from(values),
                _ => {
                    let Some((module, part)) = name.rsplit_once('.') else { continue };
                    let Some(slot) = Slot::ALL.into_iter().find(|slot| slot.module() == module) else { continue };
                    let linear = block.linear_mut(slot);
                    match part {
                        "bias" => linear.bias = Some(values.clone()),
                        _ => linear.weight.clone_from(values),
                    }
                }
            }
        }
    }
}

fn tuned_file(layer: usize) -> String {
    format!("tuned-{layer:04}.safetensors")
}

fn block_file(layer: usize) -> String {
    format!("block-{layer:04}.safetensors")
}

fn streams_file(layer: usize) -> String {
    format!("streams-{layer:04}.safetensors")
}

fn damaged(path: &Path, error: &dyn std::fmt::Display) -> Error {
    Error::new(ErrorKind::InvalidFile, error.to_string()).in_file(path)
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}
