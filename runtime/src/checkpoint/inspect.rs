//! What a checkpoint holds, as data for people and programs; and the full check of its tensors' values.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::quant::{self, Quantization};
use crate::tensor::W4Matrix;

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
    /// Bits of a packed weight.
    pub bits: Option<u32>,
    /// Input features that share a scale; `None` if nothing is packed or each row is one group.
    pub group_size: Option<usize>,
    /// Every tensor, sorted by name.
    pub tensors: Vec<TensorInfo>,
    /// Linear modules of decoder layers, and the output head, that stay in floating point.
    pub unquantized_linears: Vec<String>,
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

/// One thing that [`verify`] found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Whether the checkpoint can still be used.
    pub severity: Severity,
    /// Stable name of the error kind, see [`crate::ErrorKind::name`].
    pub kind: &'static str,
    /// File it concerns.
    pub file: Option<String>,
    /// Tensor it concerns.
    pub tensor: Option<String>,
    /// What was expected and found.
    pub message: String,
}

/// Weight of a [`Finding`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Unusual, but loads and runs.
    Warning,
    /// Does not load, or computes nonsense.
    Error,
}

/// Describes a checkpoint. Tensor data is not touched.
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
    for tensor in checkpoint.tensors() {
        let kind = kind(checkpoint, tensor);
        let quantized =
            matches!(kind, TensorKind::Codes | TensorKind::Scales | TensorKind::Zeros | TensorKind::Metadata);
        let in_layer = tensor.name.split('.').any(|part| part == "layers");
        if kind == TensorKind::Head || kind == TensorKind::Linear && in_layer {
            unquantized_linears.push(tensor.name.trim_end_matches(".weight").to_owned());
        }
        let bytes = tensor.byte_len() as u64;
        let on_device = match (kind, tensor.dtype) {
            (TensorKind::Codes, _) => packed_device_bytes(quantization.as_ref(), tensor),
            _ if quantized => 0,
            (_, Dtype::F16 | Dtype::BF16) if tensor.shape.len() == 1 => bytes.saturating_mul(2),
            _ => bytes,
        };
        device_bytes = device_bytes.saturating_add(on_device);
        tensors.push(TensorInfo {
            name: tensor.name.clone(),
            dtype: tensor.dtype.to_string(),
            shape: tensor.shape.clone(),
            bytes,
            quantized,
            kind,
        });
    }
    Ok(Inspection {
        architecture: text(architectures),
        model_type: text(config.get("model_type")),
        dialect: quantization.as_ref().map(|q| q.dialect().name()),
        bits: quantization.as_ref().map(|q| q.scheme().bits),
        group_size: quantization.as_ref().and_then(|q| q.scheme().group_size),
        tensors,
        unquantized_linears,
        bytes_on_disk: checkpoint.bytes_on_disk(),
        device_bytes,
    })
}

/// Reads every tensor and checks what [`Checkpoint::open`] cannot see in the headers: that packed modules are complete
/// and decode, that scales are finite and not zero, and that floating-point values are finite.
///
/// # Errors
/// Those of reading the quantization configuration; everything found in tensors is a [`Finding`].
pub fn verify(checkpoint: &Checkpoint) -> Result<Vec<Finding>> {
    let quantization = Quantization::of(checkpoint)?;
    let mut findings = Vec::new();
    for name in checkpoint.unlisted() {
        findings.push(warning(checkpoint.get(name)?, "in a shard, but not listed in the index"));
    }

    // Packed modules by name, with the tensor that stands for them in messages.
    let mut modules = BTreeMap::new();
    for tensor in checkpoint.tensors() {
        match packed_part(&tensor.name) {
            Some((module, TensorKind::Codes)) => {
                modules.insert(module, tensor);
            }
            Some((module, _)) if is_packed(checkpoint, module) => {}
            _ => check_dense(tensor, &mut findings),
        }
        tensor.release();
    }
    for (module, codes) in modules {
        match verify_packed(checkpoint, quantization.as_ref(), module, codes) {
            Err(error) => findings.push(finding(&error)),
            Ok(Some(matrix)) => {
                let zeros = matrix.group_params.iter().filter(|&&params| params & 0x7fff == 0).count();
                if zeros != 0 {
                    findings.push(warning(codes, format!("{zeros} of its groups have the scale zero")));
                }
            }
            Ok(None) => {}
        }
        codes.release();
    }
    if let Some(q) = &quantization {
        for tensor in checkpoint.tensors() {
            // A dense linear where the configuration says packed is found by the same question that loading asks.
            let is_matrix = tensor.shape.len() == 2 && tensor.dense_type().is_ok();
            let module = tensor.name.strip_suffix(".weight").filter(|_| is_matrix);
            if let Some(module) = module.filter(|module| !is_packed(checkpoint, module))
                && let Err(error) = quant::load_linear(checkpoint, Some(q), module, tensor.shape[0], tensor.shape[1])
            {
                findings.push(finding(&error));
            }
        }
    }
    Ok(findings)
}

fn verify_packed(
    checkpoint: &Checkpoint,
    quantization: Option<&Quantization>,
    module: &str,
    codes: &TensorView,
) -> Result<Option<W4Matrix>> {
    let Some((n, k)) = quantization.and_then(|q| q.dialect().stored_shape(&codes.shape, q.scheme().bits)) else {
        return Err(codes.error("packed codes that the configuration does not account for"));
    };
    match quant::load_linear(checkpoint, quantization, module, n, k)? {
        crate::tensor::Weight::W4(matrix) => Ok(Some(matrix)),
        _ => Ok(None),
    }
}

fn check_dense(tensor: &TensorView, findings: &mut Vec<Finding>) {
    let Ok(dtype) = tensor.dense_type() else { return };
    let bytes = match tensor.bytes() {
        Ok(bytes) => bytes,
        Err(error) => return findings.push(finding(&error)),
    };
    // In pieces: a widened embedding of a large model does not have to fit in memory.
    let mut values = vec![0.0; 1 << 16];
    for (i, bytes) in bytes.chunks(dtype.size() << 16).enumerate() {
        let values = &mut values[..bytes.len() / dtype.size()];
        dtype.widen(bytes, values);
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let error = tensor.error(format!("element {} is {}", (i << 16) + at, values[at]));
            findings.push(finding(&error));
            return;
        }
    }
}

fn finding(error: &Error) -> Finding {
    Finding {
        severity: Severity::Error,
        kind: error.kind().name(),
        file: error.file().map(|file| file.display().to_string()),
        tensor: error.tensor().map(str::to_owned),
        message: error.message().to_owned(),
    }
}

fn warning(tensor: &TensorView, message: impl Into<String>) -> Finding {
    Finding { severity: Severity::Warning, ..finding(&tensor.error(message)) }
}

/// Canonical form: four bits a weight, one word a group.
fn packed_device_bytes(quantization: Option<&Quantization>, codes: &TensorView) -> u64 {
    let Some((n, k)) = quantization.and_then(|q| q.dialect().stored_shape(&codes.shape, q.scheme().bits)) else {
        return 0;
    };
    let group_size = quantization.and_then(|q| q.scheme().group_size).unwrap_or(k).max(1);
    let (n, k) = (n as u64, k as u64);
    (n.saturating_mul(k) / 2).saturating_add(n.saturating_mul(k / group_size as u64).saturating_mul(4))
}

/// Module and role of a tensor whose suffix is one of a packed module's.
fn packed_part(name: &str) -> Option<(&str, TensorKind)> {
    let (module, suffix) = name.rsplit_once('.')?;
    let kind = match suffix {
        "qweight" | "weight_packed" => TensorKind::Codes,
        "scales" | "weight_scale" => TensorKind::Scales,
        "qzeros" | "weight_zero_point" => TensorKind::Zeros,
        "weight_shape" | "weight_g_idx" | "g_idx" => TensorKind::Metadata,
        _ => return None,
    };
    Some((module, kind))
}

fn is_packed(checkpoint: &Checkpoint, module: &str) -> bool {
    ["qweight", "weight_packed"].iter().any(|suffix| checkpoint.tensor(&format!("{module}.{suffix}")).is_some())
}

fn kind(checkpoint: &Checkpoint, tensor: &TensorView) -> TensorKind {
    if let Some((_, kind)) = packed_part(&tensor.name).filter(|(module, _)| is_packed(checkpoint, module)) {
        return kind;
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
