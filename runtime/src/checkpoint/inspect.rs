//! What a checkpoint holds, as data for people and programs.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::Value;

use crate::error::Result;
use crate::quant::{self, Dialect, LinearShape, Part, Quantization, Scheme, part_of};
use crate::tensor::{GgmlType, WeightShape};

use super::{Checkpoint, Dtype, TensorView};

/// Facts about a checkpoint, from its configuration and headers alone.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// First of `architectures` in the configuration.
    pub architecture: Option<String>,
    /// `model_type` of the configuration.
    pub model_type: Option<String>,
    /// Layout of the packed modules; `None` for a checkpoint that is not quantized.
    pub dialect: Option<&'static str>,
    /// The software that wrote it and its version, where the file says so.
    pub writer: Option<String>,
    /// Bits of a packed weight; those of most where there are several widths.
    pub bits: Option<u32>,
    /// Input features that share a scale; `None` if nothing is packed or each row is one group.
    pub group_size: Option<usize>,
    /// Every tensor, sorted by name.
    pub tensors: Vec<TensorInfo>,
    /// Linear modules of decoder layers, and the output head, that stay in floating point.
    pub unquantized_linears: Vec<String>,
    /// What is not as in most checkpoints of this dialect, in sentences.
    pub unusual: Vec<String>,
    /// Bytes of the weight files.
    pub bytes_on_disk: u64,
    /// Bytes of the weights on a device: packed modules in canonical form, matrices as stored, vectors as f32.
    pub device_bytes: u64,
}

/// One tensor of an [`Inspection`].
#[derive(Debug, Clone, Serialize)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// Element type as safetensors names it.
    pub dtype: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Bytes on disk.
    pub bytes: u64,
    /// Whether it is a part of a packed module.
    pub quantized: bool,
    /// Bits of a code, for the codes of a packed module.
    pub bits: Option<u32>,
    /// What it is for.
    pub kind: TensorKind,
}

/// What a tensor is for, judged by its name and shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TensorKind {
    /// Packed codes.
    Codes,
    /// Scales of packed codes.
    Scales,
    /// Zero points or biases of packed codes.
    Zeros,
    /// Stored shape or order of packed codes.
    Metadata,
    /// Token embedding.
    Embedding,
    /// Output head.
    Head,
    /// Floating-point matrix.
    Linear,
    /// Norm weight.
    Norm,
    /// Bias.
    Bias,
    /// Anything else.
    Other,
}

/// Describes a checkpoint. Of tensor data only the order of groups and the descriptions of modules are read.
///
/// # Errors
/// Those of reading the quantization configuration.
pub fn inspect(checkpoint: &Checkpoint) -> Result<Inspection> {
    let quantization = Quantization::of(checkpoint)?;
    let config = checkpoint.config();
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
    let architectures = config.get("architectures").and_then(|list| list.get(0));

    let mut tensors = Vec::with_capacity(checkpoint.tensors().len());
    let mut unquantized_linears = Vec::new();
    let mut device_bytes = 0u64;
    let mut survey = Survey::default();
    for tensor in checkpoint.tensors() {
        let part = part_of(checkpoint, &tensor.name);
        let kind = kind(tensor, part.map(|(_, part)| part));
        let in_layer = tensor.name.split('.').any(|part| part == "layers");
        if kind == TensorKind::Head || kind == TensorKind::Linear && in_layer {
            unquantized_linears.push(tensor.name.trim_end_matches(".weight").to_owned());
        }
        let bytes = tensor.byte_len() as u64;
        let mut bits = None;
        let on_device = match (part, tensor.dtype) {
            (Some((module, Part::Codes)), _) => match described(checkpoint, quantization.as_ref(), module) {
                Some((scheme, shape)) => {
                    bits = Some(survey.add(checkpoint, module, scheme, &shape));
                    shape.weight.bytes(shape.weight.rows())
                }
                None => 0,
            },
            (Some(_), _) => 0,
            (None, Dtype::F16 | Dtype::BF16) if tensor.shape.len() == 1 => bytes.saturating_mul(2),
            _ => bytes,
        };
        device_bytes = device_bytes.saturating_add(on_device);
        tensors.push(TensorInfo {
            name: tensor.name.clone(),
            dtype: tensor.ggml_type().map_or(tensor.dtype.to_string(), |ggml| ggml.name().to_owned()),
            shape: tensor.elements(),
            bytes,
            quantized: part.is_some(),
            bits,
            kind,
        });
    }
    let writer = quantization.as_ref().and_then(Quantization::writer).map(str::to_owned);
    Ok(Inspection {
        architecture: text(architectures),
        model_type: text(config.get("model_type")),
        dialect: quantization
            .as_ref()
            .filter(|q| q.dialect() != Dialect::Gguf || !survey.widths.is_empty())
            .map(|q| q.dialect().name()),
        writer,
        bits: survey.most().or(quantization.as_ref().filter(|q| q.dialect() != Dialect::Gguf).map(|q| q.scheme().bits)),
        group_size: quantization.as_ref().filter(|q| q.dialect() != Dialect::Gguf).and_then(|q| q.scheme().group_size),
        tensors,
        unquantized_linears,
        unusual: survey.findings(config),
        bytes_on_disk: checkpoint.bytes_on_disk(),
        device_bytes,
    })
}

/// How a packed module is packed and what it becomes.
fn described(
    checkpoint: &Checkpoint,
    quantization: Option<&Quantization>,
    module: &str,
) -> Option<(Scheme, LinearShape)> {
    let scheme = quant::scheme_of_stored(checkpoint, quantization, module).ok().flatten()?;
    let (n, k) = quant::stored_shape(checkpoint, scheme, module)?;
    Some((scheme, quant::linear_shape(checkpoint, quantization, module, n, k).ok()?))
}

/// What the packed modules have in common, and what not.
#[derive(Default)]
struct Survey {
    /// Modules by the bits of their codes.
    widths: BTreeMap<u32, usize>,
    dialects: BTreeSet<&'static str>,
    groups: BTreeSet<Option<usize>>,
    blocks: BTreeSet<&'static str>,
    act_order: usize,
    factors: usize,
    short_groups: usize,
    no_zeros: usize,
    nested: usize,
    wide: usize,
    tables: Vec<String>,
    modules: usize,
}

impl Survey {
    /// Takes a module and returns the bits of its codes.
    fn add(&mut self, checkpoint: &Checkpoint, module: &str, scheme: Scheme, shape: &LinearShape) -> u32 {
        let has = |suffix: &str| checkpoint.tensor(&format!("{module}{suffix}")).is_some();
        let codes = checkpoint.tensor(&format!("{module}.weight"));
        let ggml = codes.and_then(|codes| codes.ggml_type());
        let bits = match ggml {
            Some(GgmlType::Q4_0 | GgmlType::Q4_1 | GgmlType::Q4K) => 4,
            Some(GgmlType::Q5_0 | GgmlType::Q5_1 | GgmlType::Q5K) => 5,
            Some(GgmlType::Q6K) => 6,
            Some(_) => 8,
            None => scheme.bits,
        };
        self.modules += 1;
        *self.widths.entry(bits).or_default() += 1;
        self.dialects.insert(scheme.dialect.name());
        self.blocks.extend(ggml.map(GgmlType::name));
        let (k, group_size) = match shape.weight {
            WeightShape::W4 { k, group_size, .. } => (k, group_size),
            WeightShape::Packed { k, group_size, levels, .. } => {
                self.wide += usize::from(matches!(levels, crate::tensor::LevelsForm::AffineWide(_)));
                (k, group_size)
            }
            _ => (1, 1),
        };
        if ggml.is_none() {
            self.groups.insert((group_size != k).then_some(group_size));
        }
        self.act_order += usize::from(shape.input.order.is_some());
        self.factors += usize::from(shape.input.factors.is_some());
        self.short_groups += usize::from(!k.is_multiple_of(group_size));
        let gptq = matches!(scheme.dialect, Dialect::Gptq | Dialect::GptqV2);
        self.no_zeros += usize::from(gptq && !has(".qzeros"));
        self.nested += usize::from(has(".weight.nested_absmax"));
        let last = module.rsplit('.').next().unwrap_or_default();
        if last.starts_with("embed") || last == "lm_head" {
            self.tables.push(module.to_owned());
        }
        bits
    }

    /// The width of most modules.
    fn most(&self) -> Option<u32> {
        self.widths.iter().max_by_key(|(_, count)| **count).map(|(bits, _)| *bits)
    }

    fn findings(&self, config: &Value) -> Vec<String> {
        let mut found = Vec::new();
        let of = |count: usize| format!("{count} of {} packed modules", self.modules);
        if self.widths.len() > 1 {
            let widths: Vec<_> = self.widths.iter().map(|(bits, count)| format!("{bits} bits in {count}")).collect();
            found.push(format!("mixed widths: {} modules", widths.join(", ")));
        }
        if self.blocks.len() > 1 {
            let names: Vec<_> = self.blocks.iter().copied().collect();
            found.push(format!("mixed block types: {}", names.join(", ")));
        }
        if self.dialects.len() > 1 {
            let names: Vec<_> = self.dialects.iter().copied().collect();
            found.push(format!("several layouts: {}", names.join(", ")));
        }
        if self.groups.len() > 1 {
            let size = |size: &Option<usize>| size.map_or("whole rows".to_owned(), |size| size.to_string());
            let sizes: Vec<_> = self.groups.iter().map(size).collect();
            found.push(format!("several group sizes: {}", sizes.join(", ")));
        }
        for (count, what) in [
            (self.act_order, "act-order: groups follow the order of activations in"),
            (self.factors, "inputs are multiplied with factors (pre_quant_scale) in"),
            (self.short_groups, "the last group of a row is shorter in"),
            (self.no_zeros, "missing zeros: none are stored, though the dialect has them, in"),
            (self.nested, "double quant: scales are quantized, too, in"),
            (self.wide, "scales that half precision does not hold in"),
        ] {
            if count > 0 {
                found.push(format!("{what} {}", of(count)));
            }
        }
        if !self.tables.is_empty() {
            found.push(format!("packed embedding or head: {}", self.tables.join(", ")));
        }
        // What a file says of its writer's search; the weights themselves do not tell.
        let section = config.get("quantization_config");
        let mse = section.and_then(|section| section.get("meta")?.get("mse")?.as_f64()).is_some_and(|mse| mse > 0.0);
        let observers = section.and_then(|section| section.get("config_groups")?.as_object().cloned());
        let observed = observers.is_some_and(|groups| {
            groups.values().any(|group| {
                let observer = group.get("weights").and_then(|weights| weights.get("observer"));
                observer.and_then(Value::as_str).is_some_and(|observer| observer.contains("mse"))
            })
        });
        if mse || observed {
            found
                .push("clipping: ranges were searched for the least error, so large weights may be clipped".to_owned());
        }
        found
    }
}

fn kind(tensor: &TensorView, part: Option<Part>) -> TensorKind {
    if let Some(part) = part {
        return match part {
            Part::Codes => TensorKind::Codes,
            Part::Scales => TensorKind::Scales,
            Part::Zeros => TensorKind::Zeros,
            Part::Factors | Part::Groups | Part::Metadata => TensorKind::Metadata,
        };
    }
    let name = tensor.name.as_str();
    let module = name.strip_suffix(".weight").unwrap_or_default();
    let last = module.rsplit('.').next().unwrap_or_default();
    match tensor.shape.len() {
        _ if name.ends_with(".bias") => TensorKind::Bias,
        2 if last.starts_with("embed") || last == "wte" => TensorKind::Embedding,
        2 if last == "lm_head" => TensorKind::Head,
        1 if last.contains("norm") => TensorKind::Norm,
        2 if !module.is_empty() => TensorKind::Linear,
        _ => TensorKind::Other,
    }
}
